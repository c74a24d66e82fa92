"""What the documentation tells to type is something that the command line takes, and what it quotes is what the code says."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli, presets

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(bash|sh|console|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MARKERS = set(re.findall(r'^    "([a-z0-9]+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
OTHERS = {
    "kubectl",
    "docker",
    "aws",
    "pip",
    "apt-get",
    "git",
    "cd",
    "curl",
    "ray",
    "sky",
    "kustomize",
    "terraform",
    "export",
    "huggingface-cli",
    "hf",
}


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line within a fence, continued lines as one."""
    found = []
    for page in PAGES:
        for _, block in FENCE.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append((page.name, re.sub(r"\s+#\s.*$", "", line.strip()).removeprefix("$ ")))
    return found


def words_of(command: str) -> list[str]:
    """As a shell would split it, without variables that are set for it, and up to a pipe."""
    words = shlex.split(re.split(r"\s(?:\||&&|;|>|2>)\s", command)[0])
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


def check_jepa(words: list[str]) -> None:
    if not words or set(words) & {"--help", "-h"} or words == ["VERB"] or "VERB" in words:
        return
    own = [word for word in words if re.match(r"preset=[A-Z]+/", word)]  # a preset that an earlier command has written
    abbreviated = "..." in words or any(word.endswith("=...") for word in words) or bool(own)
    words = [word.replace("=...", "=x") for word in words if word not in ("...", *own)]
    name, rest = cli.split_verb(words)
    verb = cli.VERBS[name]
    given = cli.overrides(verb, [word for word in rest if word != "--dry-run"])
    try:
        presets.load(verb.options, name, given)
    except cli.UsageError as error:
        if not (abbreviated and "is missing" in str(error)):
            raise


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda text: text[:60])
def test_what_the_documentation_types_is_understood(page, command, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://localhost:8265")
    monkeypatch.chdir(ROOT)
    words = words_of(command)
    first = Path(words[0]).name if words else "export"
    if first == "jepa":
        check_jepa(words[1:])
    elif first == "make":
        assert {word for word in words[1:] if "=" not in word} <= MAKE, command
    elif first == "pytest":
        assert all(marker in MARKERS for marker in re.findall(r"-m (\w+)", command)), command
    elif first.startswith("python") and words[1:2] == ["-m"]:
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists() or words[2] in ("pytest", "pip", "venv"), command
    elif first.startswith("python"):
        assert (ROOT / words[1]).exists() or words[1].startswith("-"), command
    else:
        assert first in OTHERS, f"{command}: no test knows {first}"


def test_there_are_commands_and_a_wrong_one_is_noticed():
    assert len(commands()) > 50
    for wrong in (
        "jepa ingest sourze=a catalog=b",
        "jepa submit address=http://h:1 pretrain prezet=demo",
        "jepa catalogue show x",
    ):
        with pytest.raises(cli.UsageError):
            check_jepa(words_of(wrong)[1:])


def sentences() -> list[str]:
    """Every string of the product, with … for what is filled in."""
    found = []
    for path in sorted(path for room in ("pipelines", "cluster") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_what_the_code_says():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 30
    known = sentences()
    for sentence in quoted:
        if sentence.startswith("ray:"):
            continue
        parts = [part for part in re.split(r"\s*…\s*", sentence) if part]
        assert any(all(part in text for part in parts) for text in known), f"nothing in the code says: {sentence}"


def test_pages_link_to_pages_that_are_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_api_pages_come_from_the_docstrings(tmp_path):
    """As `make api` does for all: a page for each module, with the first words of every public function and class."""
    (recipe,) = re.findall(r"-m pdoc (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = recipe.replace("runs/api", str(tmp_path)).split()
    command = [sys.executable, "-m", "pdoc", *(word for word in words if word != "pipelines")]
    env = os.environ | {"PDOC_ALLOW_EXEC": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 0, result.stderr
    for path in (path for room in ("jepa_core", "cluster") for path in (ROOT / room).glob("[a-z]*.py")):
        page = (tmp_path / path.parent.name / f"{path.stem}.html").read_text("utf-8")
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert f'id="{node.name}"' in page, f"{path.stem}.{node.name}"
