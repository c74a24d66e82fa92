"""The run folder: what a run leaves, on local disk or S3, and what counts as committed.

    config.yaml       the whole configuration, catalog version pinned
    provenance.json   code and library versions, start time
    metrics/          JSON lines, one part per checkpoint interval, named by its first step
    quarantine/       JSON lines: samples whose video failed to decode, the reason, and what replaced it
    checkpoints/      Ray Train's folder; a step counts only when checkpoint_manager_snapshot.json names it

Parts are rewritten when a run resumes from the step before them, so metrics never hold a step twice.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipelines import storage
from pipelines.config import RunConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import to_yaml

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
METRICS = "metrics"
QUARANTINE = "quarantine"
CHECKPOINTS = "checkpoints"
SNAPSHOT = "checkpoint_manager_snapshot.json"
STATE = "state.pt"
RESULT = "result.json"
FREE_TO_CHANGE = (
    *(
        "run",
        "ray",
        "data",
        "train.steps",
        "train.num_workers",
        "train.cpus_per_worker",
        "train.use_gpu",
        "train.parallel",
        "train.compile",
        "train.checkpoint_every",
    ),
    *("train.keep_checkpoints", "train.log_every", "train.max_failures"),
    *("seeds", "concurrency", "cpus_per_trial", "gpus_per_trial"),
)
"""Options that a resumed run may change without becoming another run."""


class Checkpoint(NamedTuple):
    """A committed checkpoint: its folder and the number of finished optimizer steps."""

    uri: str
    step: int


def latest_checkpoint(run_dir: str) -> Checkpoint | None:
    """The newest *committed* checkpoint; folders that no snapshot names may be torn and are ignored (ray issue 41700)."""
    folder = storage.join(storage.normalize(run_dir), CHECKPOINTS)
    snapshot = storage.join(folder, SNAPSHOT)
    if not storage.exists(snapshot):
        return None
    latest = json.loads(storage.read_bytes(snapshot)).get("latest_checkpoint_result")
    if not latest:
        return None
    name = latest["checkpoint_dir_name"]
    return Checkpoint(storage.join(folder, name), int(name.split("_")[1].split("-")[0]))


def require_checkpoint(run_dir: str) -> Checkpoint:
    """`latest_checkpoint`, or InputRefused."""
    found = latest_checkpoint(run_dir)
    if found is None:
        raise InputRefused(f"{run_dir} holds no committed checkpoint: run the training first, or check the path")
    return found


def checkpoint_name(step: int) -> str:
    """A name no other attempt uses, so that a retried upload never mixes with a torn one."""
    return f"step_{step:08d}-{os.urandom(3).hex()}"


def commit_local(run_dir: str, local_dir: str, step: int) -> None:
    """Publish a checkpoint of a run without a worker group: files first, then the snapshot that commits them."""
    name = checkpoint_name(step)
    folder = storage.join(storage.normalize(run_dir), CHECKPOINTS)
    for path in sorted(Path(local_dir).iterdir()):
        storage.upload(path, storage.join(folder, name, path.name))
    snapshot = {"latest_checkpoint_result": {"checkpoint_dir_name": name}}
    storage.write_bytes(storage.join(folder, SNAPSHOT), json.dumps(snapshot).encode())


def begin(run: RunConfig, config: Any) -> int:
    """Claim a run folder by the resume rule and write its configuration. Returns the step to continue from.

    Raises UsageError when the folder belongs to a different run, InputRefused when resume=must finds nothing.
    """
    run_dir = storage.normalize(run.dir)
    storage.check_bucket(run_dir)
    found = latest_checkpoint(run_dir)
    if found is None and run.resume == "must":
        raise InputRefused(f"run.resume=must, but {run_dir} holds no committed checkpoint: use run.resume=auto to start")
    if found is not None and run.resume == "never":
        raise UsageError(f"{run_dir} already holds step {found.step}: use run.resume=auto to continue, or another run.dir")
    if found is not None:
        refuse_other_run(run_dir, config)
    storage.write_bytes(storage.join(run_dir, CONFIG), to_yaml(config).encode())
    storage.write_bytes(storage.join(run_dir, PROVENANCE), json.dumps(provenance(), indent=1).encode())
    return found.step if found else 0


def is_run(run_dir: str) -> bool:
    """Whether a run was started in the folder."""
    return storage.exists(storage.join(storage.normalize(run_dir), CONFIG))


def read_config(run_dir: str) -> dict[str, Any]:
    """The configuration that a run was started with. Raises InputRefused where there is none."""
    if not is_run(run_dir):
        raise InputRefused(f"{run_dir} is not a run folder (no {CONFIG}): check the path")
    return yaml.safe_load(storage.read_bytes(storage.join(storage.normalize(run_dir), CONFIG)))


def refuse_other_run(run_dir: str, config: Any) -> None:
    """Raise UsageError when the folder was started with another configuration, beyond what a run may change."""
    old, new_flat = _flatten(read_config(run_dir)), _flatten(yaml.safe_load(to_yaml(config)))
    changed = sorted(key for key in old.keys() | new_flat.keys() if old.get(key) != new_flat.get(key))
    changed = [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{run_dir} was started with {key}={old.get(key)}, now it is {new_flat.get(key)}: "
            "give the old value to continue it, or another run.dir to start a new run"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in _flatten(value, f"{prefix}.{name}".lstrip(".")).items()}
    return {prefix: tree}


def provenance() -> dict[str, Any]:
    """What made this run: code, library versions, machine, time."""
    names = ("jepa-pipeline", "ray", "torch", "timm", "av", "pyarrow", "deltalake", "numpy")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git_revision(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "cpus": os.cpu_count(),
    }


def _git_revision() -> str | None:
    try:
        here = Path(__file__).parent
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def write_part(run_dir: str, kind: str, first_step: int, lines: Sequence[dict[str, Any]], rank: int = 0) -> None:
    """Write JSON lines of steps from `first_step` on; a resumed run overwrites the part of the same name."""
    text = "".join(json.dumps(line, default=float) + "\n" for line in lines)
    name = f"{first_step:08d}.jsonl" if rank == 0 else f"{first_step:08d}-r{rank}.jsonl"
    storage.write_bytes(storage.join(storage.normalize(run_dir), kind, name), text.encode())


def read_parts(run_dir: str, kind: str) -> list[dict[str, Any]]:
    """All lines of a kind in order of step. A part counts up to the first step of the next one."""
    folder = storage.join(storage.normalize(run_dir), kind)
    if not storage.exists(folder):
        return []
    parts = storage.list_files(folder, (".jsonl",))
    firsts = sorted({_first_step(part.uri) for part in parts})
    lines = []
    for part in parts:
        first = _first_step(part.uri)
        end = next((f for f in firsts if f > first), None)
        rows = [json.loads(text) for text in storage.read_bytes(part.uri).decode().splitlines()]
        lines += [row for row in rows if end is None or row["step"] < end]
    return sorted(lines, key=lambda row: row["step"])


def _first_step(uri: str) -> int:
    return int(Path(uri).name[:8])


def write_json(run_dir: str, name: str, value: Any) -> None:
    """One JSON object of a run."""
    storage.write_bytes(storage.join(storage.normalize(run_dir), name), json.dumps(value, indent=1, default=float).encode())


def read_json(run_dir: str, name: str) -> Any | None:
    """The object, or None when the run has none of that name."""
    uri = storage.join(storage.normalize(run_dir), name)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def read_state(checkpoint: Checkpoint) -> bytes:
    """The file that training continues from."""
    return storage.read_bytes(storage.join(checkpoint.uri, STATE))


def load_weights(checkpoint: Checkpoint, stem: str) -> dict[str, Any]:
    """Tensors of a checkpoint's `<stem>.safetensors` by name."""
    from safetensors.torch import load

    return load(storage.read_bytes(storage.join(checkpoint.uri, f"{stem}.safetensors")))
