"""Secrets stay out of what is written and said; nothing unpickles what others wrote; verbs write only where they were told."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from conftest import jepa, make_corpus

from pipelines import cli, redact
from pipelines.errors import UsageError
from pipelines.progress import Reporter

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for room in ("jepa_core", "pipelines", "cluster", "configs") for path in (ROOT / room).rglob("*.py"))
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/secret+0123456789abcdefghij",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "WANDB_API_KEY": "planted0123456789abcdef0123456789abcdef01",
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "RAY_AUTH_TOKEN": "f00d" * 16,
    "MLFLOW_TRACKING_PASSWORD": "planted-password-1",
}
RUNS_CODE = {"load", "loads", "Unpickler", "read_pickle", "full_load", "unsafe_load", "load_all"}
OWN = {
    "checkpoint_reader.py": "looks through what it hands to torch's reader, see test_checkpoints_that_bring_code_are_refused",
    "clip_apart.py": "between a process and the one that it has started itself, through a pipe",
}


def unsafe_calls(path: Path) -> list[str]:
    """Calls that would run code which a file brings."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module, name = ast.unparse(node.func.value).split(".")[-1], node.func.attr
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{path.name}:{node.lineno} {module}.{name}"
        pickles = module in ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal") and name in RUNS_CODE | {"open"}
        tensors = module == "torch" and name == "load" and options.get("weights_only") != "True"
        arrays = name in ("load", "loadtxt", "fromregex") and options.get("allow_pickle", "False") != "False"
        trees = module == "yaml" and name in RUNS_CODE and "Safe" not in options.get("Loader", "")
        parsed = (module, name) in {("distributed.checkpoint", "load"), ("dcp", "load"), ("hub", "load")}
        if pickles or tensors or arrays or trees or parsed or name == "read_pickle":
            found.append(where)
    return found


def test_nothing_unpickles_what_it_did_not_write_itself():
    assert [call for path in SOURCES if path.name not in OWN for call in unsafe_calls(path)] == []


def test_the_search_for_unsafe_calls_finds_them(tmp_path):
    bad = ["pickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"]
    bad += ["yaml.load(t)", "pd.read_pickle(p)", "joblib.load(p)"]
    (tmp_path / "bad.py").write_text("\n".join(bad))
    assert len(unsafe_calls(tmp_path / "bad.py")) == len(bad)
    (tmp_path / "good.py").write_text("torch.load(p, weights_only=True)\nnp.load(p)\nyaml.safe_load(t)\njson.loads(t)")
    assert unsafe_calls(tmp_path / "good.py") == []


class Runs:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "model.pth"])
def test_weights_that_bring_code_are_refused(tmp_path, name):
    import torch

    torch.save({"encoder": Runs(str(tmp_path / "ran")), "target_encoder": {}}, tmp_path / name)
    result = jepa("convert", "--from", "vjepa2", "--to", "jepa", str(tmp_path / name), str(tmp_path / "out"))
    assert result.returncode == 3, result.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_bring_code_are_refused(tmp_path):
    """torch's distributed checkpoint pickles its index, and what is no tensor; `init=RUN` may read a stranger's."""
    import torch
    import torch.distributed.checkpoint as dcp

    from pipelines import checkpoint_reader
    from pipelines.errors import InputRefused

    def saved(name: str, extra) -> Path:
        state = {"module": {"w": torch.ones(2)}, "optimizer": {"extra": extra}}
        dcp.save(state, checkpoint_id=str(tmp_path / name), no_dist=True)
        return tmp_path / name

    def load(folder: Path) -> dict:
        state = {"module": {"w": torch.zeros(2)}, "optimizer": {"extra": None}}
        checkpoint_reader.load(state, folder, alone=True)
        return state

    assert load(saved("good", 0.125))["optimizer"]["extra"] == 0.125
    within, index = saved("within", Runs(str(tmp_path / "ran"))), saved("index", 1)
    (index / ".metadata").write_bytes(pickle.dumps(Runs(str(tmp_path / "ran"))))
    for folder in (within, index):
        with pytest.raises(InputRefused, match="could run code"):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [RAN]", "a: &a [x]\nb: !!python/name:os.system"])
def test_yaml_that_brings_code_is_refused(tmp_path, text):
    preset = tmp_path / "mine.yaml"
    preset.write_text(text.replace("RAN", str(tmp_path / "ran")))
    result = jepa("ingest", f"preset={preset}", "source=a", "catalog=b", "--dry-run")
    assert result.returncode == 2, result.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("GET s3://bucket/key?X-Amz-Signature=0123456789abcdef0123&x=1", "x=1"),
        ("https://user:hunter22222@host/path", "@host/path"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer"),
        ("key AKIAIOSFODNN7EXAMPLE refused", "refused"),
        (f"wrong token {PLANTED['RAY_AUTH_TOKEN']}!", "wrong token"),
        (f"{PLANTED['AWS_SECRET_ACCESS_KEY']} and {PLANTED['HF_TOKEN']}", "and"),
    ],
)
def test_what_is_secret_is_hidden(monkeypatch, text, kept):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    shown = redact.redacted(text)
    assert redact.HIDDEN in shown
    assert kept in shown
    for secret in (*PLANTED.values(), "hunter22222", "abcdefghijklmnop", "AKIAIOSFODNN7EXAMPLE", "0123456789abcdef0123"):
        assert secret not in shown


PLAIN = [
    "s3://bucket/a@12",
    "step 3 of 10 at loss 0.47",
    "token_secret: jepa-ray-token",
    "http://127.0.0.1:8265",
    "https://h:1/a@b",
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert redact.redacted(text) == text


def test_no_secret_gets_into_errors_events_and_configurations(monkeypatch, capsys, tmp_path):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    stream = StringIO()
    reporter = Reporter(stream)
    for value in PLANTED.values():
        reporter.event("warning", message=f"the store said {value}")
        reporter.table("t", ["a"], [[f"x{value}x"]])
        reporter.training({"step": 1, "loss": 0.1, "checkpoint_error": f"denied for {value}"})
        assert cli.main(["ingest", f"source=s3://bucket/{value}", f"catalog={tmp_path}/c"]) == 2
        assert cli.main(["catalog", "show", f"{tmp_path}/{value}"]) == 2
        preset = tmp_path / "mine.yaml"
        preset.write_text(f"source: 's3://bucket/{value}'\n")
        assert cli.main(["ingest", f"preset={preset}", f"catalog={tmp_path}/c"]) == 2
    said = capsys.readouterr()
    for value in PLANTED.values():
        assert value not in stream.getvalue() + said.out + said.err
    assert not (tmp_path / "c").exists()


@pytest.mark.ray
def test_a_run_writes_where_it_was_told_and_no_secret(tmp_path):
    """ingest, pretrain and report in a home, a working folder and a temporary folder of their own, with secrets planted."""
    make_corpus(tmp_path / "videos")
    before = snapshot(tmp_path / "videos")
    for name in ("home", "cwd"):
        (tmp_path / name).mkdir()
    temporary = tempfile.mkdtemp(prefix="jepa-")  # Ray's sockets need a short path
    environment = PLANTED | {"HOME": str(tmp_path / "home"), "TMPDIR": temporary, "RAY_AUTH_MODE": "token"}
    environment["PYTHONPATH"] = str(ROOT)
    run, catalog = tmp_path / "run", tmp_path / "catalog"
    for command in (
        ["ingest", f"source={tmp_path}/videos", f"catalog={catalog}"],
        ["pretrain", "preset=demo", "smoke=true", f"catalog={catalog}", f"run.dir={run}", "train.steps=2", "train.num_workers=0"],
        ["report", str(run)],
        ["catalog", "export", str(catalog), f"out={tmp_path}/out.csv"],
    ):
        base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        words = [sys.executable, "-m", "pipelines.cli", *command]
        result = subprocess.run(words, env=base | environment, cwd=tmp_path / "cwd", capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        for value in PLANTED.values():
            assert value not in result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "home", "cwd", "run", "catalog", "out.csv"}
    assert snapshot(tmp_path / "videos") == before
    assert list((tmp_path / "cwd").rglob("*")) == []
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    for path in [*run.rglob("*"), *catalog.rglob("*"), tmp_path / "out.csv"]:
        if path.is_file():
            data = path.read_bytes()
            assert not [name for name, value in PLANTED.items() if value.encode() in data], path
    shutil.rmtree(temporary, ignore_errors=True)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_names_from_files_do_not_lead_out_of_a_folder(tmp_path):
    """A model folder whose description names files elsewhere, and a checkpoint whose COMMIT does."""
    from pipelines import model_folder, run_folder
    from pipelines.errors import InputRefused

    folder = tmp_path / "model"
    folder.mkdir()
    tree = {"format": model_folder.FORMAT, "version": model_folder.VERSION, "parts": ["../../etc/passwd"]}
    (folder / "model.json").write_text(json.dumps(tree))
    with pytest.raises((InputRefused, UsageError)):
        model_folder.read(str(folder))
    (folder / "COMMIT").write_text(json.dumps({"step": 1, "files": {"state/../../../.bashrc": {"size": 1, "sha256": ""}}}))
    with pytest.raises(InputRefused, match="outside of its folder"):
        run_folder.read_commit(run_folder.Checkpoint(str(folder), 1))


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ('print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1"}]}]}\')', 1, "a 1: X-1"),
        ('print(\'{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}\')', 0, "0 of 1 packages"),
        ('print(\'{"dependencies": [{"name": "a", "skip_reason": "not found"}]}\')', 0, "knows none of the installed packages"),
        ("raise SystemExit('requests.exceptions.ConnectionError: no name')", 0, "does not answer"),
        ("raise SystemExit('boom')", 1, "boom"),
    ],
)
def test_an_audit_that_asked_nobody_is_not_called_clean(tmp_path, answer, code, said):
    package = tmp_path / "pip_audit"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(answer)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "infra" / "audit.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
