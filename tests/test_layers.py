"""The arrows of the architecture, and bans that keep its rooms clear."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("jepa_core", "pipelines", "cluster", "configs") for path in (ROOT / room).rglob("*.py"))


def test_the_arrows_point_from_cluster_to_pipelines_to_jepa_core():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_jepa_core_imports_without_the_pipeline_libraries():
    modules = [f"jepa_core.{path.stem}" for path in (ROOT / "jepa_core").glob("*.py") if path.stem != "__init__"]
    banned = ("ray", "av", "pyarrow", "omegaconf", "boto3", "s3fs", "h5py", "mujoco", "pipelines")
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print(sorted(set({banned}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    assert len(text.splitlines()) <= 420
    assert ast.get_docstring(tree) or not text.strip()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 70, f"{node.name} is too long"


def test_only_storage_speaks_to_object_stores():
    for path in SOURCES:
        if path.name not in {"storage.py", "storage_s3.py"}:
            names = {alias.name.split(".")[0] for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Import) for alias in node.names}  # fmt: skip
            assert not names & {"boto3", "s3fs", "fsspec"}, path


def test_only_the_table_of_verbs_names_modules_of_cluster():
    """The command line finds the verbs of cluster/ by name when they run. Nothing else below may know of them."""
    named = set()
    for path in SOURCES:
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        if path.parent.name != "cluster" and any(re.fullmatch(r"cluster\.[a-z_]+", str(text)) for text in texts):
            named.add(path.name)
    assert named == {"verbs.py"}


@pytest.mark.parametrize("module", ["pipelines.clips", "pipelines.trajectories", "pipelines.ingest", "cluster.submit"])
def test_decode_and_submit_start_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def public_tensor_functions() -> list[tuple[str, str]]:
    """(where, docstring) of every public function or method of jepa_core that takes or gives a tensor."""
    found = []
    for path in sorted((ROOT / "jepa_core").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                annotations = [a.annotation for a in node.args.args + node.args.kwonlyargs] + [node.returns]
                if any("Tensor" in ast.unparse(a) for a in annotations if a is not None):
                    found.append((f"{path.name}:{node.name}", ast.get_docstring(node) or ""))
    return found


@pytest.mark.parametrize(("where", "doc"), public_tensor_functions(), ids=lambda value: value.split("\n")[0][:40])
def test_public_tensor_functions_give_shapes(where, doc):
    assert re.search(r"\[[A-Z.\d]|state|scalar", doc), f"{where}: say the shapes of its tensors"
