"""The run folder: what a run leaves, on local disk or S3, and what counts as committed.

    config.yaml       the whole configuration, catalog version pinned
    provenance.json   code and library versions, start time
    metrics/          JSON lines, one part per checkpoint interval, named by its first step
    quarantine/       JSON lines: samples whose video failed to decode, the reason, and what replaced it
    ledger/           JSON lines: a digest of the samples of every unit of every step
    checkpoints/      step_*/{state/, *.safetensors, COMMIT}; a step counts only when its COMMIT stands
    probe.json        what the probe beside the training asks, of which clips (online_probe.py)
    rollbacks.json    where the guard took the run back (train_guard.py)
    ray/              Ray Train's own notes

A run that resumes deletes the parts beyond its checkpoint and writes them again, so they never hold a step twice.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from pipelines import storage
from pipelines.config import RunConfig, TrainConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import from_tree, to_yaml

CONFIG = "config.yaml"
PROVENANCE = "provenance.json"
METRICS = "metrics"
QUARANTINE = "quarantine"
CHECKPOINTS = "checkpoints"
T = TypeVar("T")
COMMIT, DAMAGED = "COMMIT", "DAMAGED"
LEDGER = "ledger"
DIGEST_BYTES = 1 << 22
RESULT = "result.json"
ROLLBACKS = "rollbacks.json"
PROBE = "probe.json"
FREE_TO_CHANGE = (
    *(
        "run",
        "ray",
        "data",
        "train.steps",
        "train.stop_at",
        "train.num_workers",
        "train.cpus_per_worker",
        "train.use_gpu",
        "train.parallel",
        "train.compile",
        "train.checkpoint_every",
    ),
    *("train.min_workers", "train.mttf_hours", "train.keep_checkpoints", "train.log_every", "train.max_failures"),
    *("train.peak_tflops", "train.trackers", "train.guard"),
    *("seeds", "concurrency", "cpus_per_trial", "gpus_per_trial", "require", "num_workers", "max_failures", "num_settings"),
    *("gpus", "max_gb", "max_failed"),
    # The probe of a pretraining: no name of a sweep's probe, which decides the sweep's numbers, is among them.
    *(f"probe.{name}" for name in ("every", "catalog", "labels", "format", "max_clips", "max_mb")),
)
"""Options that a resumed run may change without becoming another run."""


class Checkpoint(NamedTuple):
    """A committed checkpoint: its folder and the number of finished optimizer steps."""

    uri: str
    step: int


def checkpoints(run_dir: str) -> list[Checkpoint]:
    """Committed checkpoints, newest first: those that have a COMMIT, and were not found damaged since."""
    folder = storage.join(storage.normalize(run_dir), CHECKPOINTS)
    marks: dict[str, set[str]] = {}
    for info in storage.list_files(folder, (COMMIT.lower(), DAMAGED.lower()), missing_ok=True):
        place, _, mark = info.uri.rpartition("/")
        marks.setdefault(place, set()).add(mark)
    found = [Checkpoint(place, _step_of(place)) for place, names in marks.items() if names == {COMMIT}]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.uri), reverse=True)


def latest_checkpoint(run_dir: str) -> Checkpoint | None:
    """The newest *committed* checkpoint; a folder without its COMMIT may be torn and does not count."""
    return next(iter(checkpoints(run_dir)), None)


def newest_sound_checkpoint(run_dir: str) -> Checkpoint | None:
    """The newest committed checkpoint whose files have the sizes and sha256 that were committed.

    Damaged ones get a mark with the reason, so that every later reader passes them over as well.
    """
    for found in checkpoints(run_dir):
        damage = _damage(found)
        if damage is None:
            return found
        set_aside(found, damage)
    return None


def set_aside(checkpoint: Checkpoint, reason: str) -> None:
    """Mark a checkpoint so that no reader takes it any more."""
    storage.write_bytes(storage.join(checkpoint.uri, DAMAGED), json.dumps({"reason": reason, "found": time.time()}).encode())


def checkpoint_at(uri: str) -> tuple[str, Checkpoint] | None:
    """(run folder, checkpoint) of the URI of a checkpoint's folder, None for another. Raises InputRefused where it is torn."""
    run_dir, found, name = storage.normalize(uri).rpartition(f"/{CHECKPOINTS}/")
    if not found or not name.startswith("step_"):
        return None
    if not storage.exists(storage.join(uri, COMMIT)):
        raise InputRefused(f"{uri} is no committed checkpoint (no {COMMIT}): choose another, or give the run")
    return run_dir, Checkpoint(storage.normalize(uri), _step_of(uri))


def damaged_checkpoints(run_dir: str) -> dict[str, str]:
    """{folder: reason} of checkpoints that were found damaged, or that the guard has set aside."""
    folder = storage.join(storage.normalize(run_dir), CHECKPOINTS)
    marks = storage.list_files(folder, (DAMAGED.lower(),), missing_ok=True)
    return {mark.uri.rpartition("/")[0]: json.loads(storage.read_bytes(mark.uri))["reason"] for mark in marks}


def read_commit(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the COMMIT says: step, cursor, catalogs, config_hash, code_version, progress, files. Raises InputRefused."""
    try:
        record = json.loads(storage.read_bytes(storage.join(checkpoint.uri, COMMIT)))
        outside = [name for name in record.get("files", ()) if name.startswith("/") or ".." in name.split("/")]
    except (ValueError, AttributeError) as error:
        raise InputRefused(f"{checkpoint.uri}/{COMMIT} is damaged ({error})") from error
    if outside:
        raise InputRefused(f"{checkpoint.uri}/{COMMIT} names files outside of its folder ({outside[0]}): none of ours does")
    return record


def _damage(checkpoint: Checkpoint) -> str | None:
    try:
        files = read_commit(checkpoint)["files"]
    except (InputRefused, KeyError, TypeError) as error:
        return f"{COMMIT}: {error}"
    for name, told in files.items():
        try:
            size, digest = digest_of(storage.join(checkpoint.uri, name))
        except InputRefused as error:
            return f"{name}: {error}"
        if (size, digest) != (told["size"], told["sha256"]):
            return f"{name}: {size} bytes with sha256 {digest[:12]}, committed were {told['size']} with {told['sha256'][:12]}"
    return None


def digest_of(uri: str) -> tuple[int, str]:
    """(bytes, sha256) of an object, read piece by piece. Raises InputRefused when there is none."""
    digest, size = hashlib.sha256(), 0
    with storage.open_file(uri) as file:
        while piece := file.read(DIGEST_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def _step_of(folder: str) -> int:
    return int(folder.rpartition("/")[2].split("_")[1].split("-")[0])


def require_checkpoint(run_dir: str) -> Checkpoint:
    """`latest_checkpoint`, or InputRefused."""
    found = latest_checkpoint(run_dir)
    if found is None:
        raise InputRefused(f"{run_dir} holds no committed checkpoint: run the training first, or check the path")
    return found


def checkpoint_folder(run_dir: str, step: int, attempt: str) -> str:
    """Where an attempt writes a step's checkpoint: a folder no other attempt uses, so that nothing mixes with a torn one."""
    return storage.join(storage.normalize(run_dir), CHECKPOINTS, f"step_{step:08d}-{attempt}")


def publish(local_dir: Path, uri: str) -> dict[str, dict[str, Any]]:
    """Copy the files of a local folder below `uri`. Returns {name: {size, sha256}}, as a COMMIT lists them."""
    files = {}
    for path in sorted(path for path in local_dir.rglob("*") if path.is_file()):
        name = path.relative_to(local_dir).as_posix()
        size, digest = digest_of(str(path))
        storage.upload(path, storage.join(uri, name))
        files[name] = {"size": size, "sha256": digest}
    return files


def commit(uri: str, record: dict[str, Any]) -> None:
    """Make a checkpoint's folder count. The last thing that is written; `record` has at least step and files."""
    storage.write_bytes(storage.join(uri, COMMIT), json.dumps(record, indent=1).encode())


def prune_checkpoints(run_dir: str, keep: int, sound: int | None = None) -> None:
    """Delete committed checkpoints beyond the newest `keep`, and what older attempts left torn or damaged.

    The newest one up to step `sound` stays too: the run may have to return there.
    """
    found = checkpoints(run_dir)
    kept = found[:keep]
    if sound is not None and all(checkpoint.step > sound for checkpoint in kept):
        kept += [checkpoint for checkpoint in found[keep:] if checkpoint.step <= sound][:1]
    if not kept:
        return
    folder = storage.join(storage.normalize(run_dir), CHECKPOINTS)
    stale: dict[str, list[str]] = {}
    for info in storage.list_files(folder):
        name = info.uri[len(folder) + 1 :].partition("/")[0]
        place = storage.join(folder, name)
        if place not in {found.uri for found in kept} and _step_of(place) <= kept[0].step:
            stale.setdefault(place, []).append(info.uri)
    for place, uris in stale.items():
        storage.delete([storage.join(place, COMMIT)])  # first, so that nothing reads a checkpoint that is half deleted
        storage.delete(uris)
        if not storage.is_s3(place):
            shutil.rmtree(place, ignore_errors=True)  # the folders that held them


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
    before = read_json(run_dir, PROVENANCE) or {}
    told = provenance() | {"starts": before.get("starts", 0) + 1}
    write_json(run_dir, PROVENANCE, told | {"first_started": before.get("first_started", time.time())})
    return found.step if found else 0


def claim(run: RunConfig, config: Any) -> None:
    """Claim a folder whose progress is in results, not in checkpoints: every option that matters is that of its first start.

    Raises UsageError when the folder is another run's; else as `was_begun`.
    """
    if was_begun(run):
        refuse_other_run(run.dir, config)  # its results would be taken for this run's
    begin(replace(run, resume="auto"), config)


def was_begun(run: RunConfig) -> bool:
    """Whether a folder without checkpoints of its own is a run's already, by the resume rule.

    Raises UsageError when resume=never finds one, InputRefused when resume=must finds none.
    """
    begun = is_run(run.dir)
    if not begun and run.resume == "must":
        raise InputRefused(f"run.resume=must, but {run.dir} holds no run: use run.resume=auto to start")
    if begun and run.resume == "never":
        raise UsageError(f"{run.dir} holds a run already: use run.resume=auto to continue, or another run.dir")
    return begun


def resolved(train: TrainConfig, run_dir: str) -> TrainConfig:
    """The configuration with its number of microbatches: what the run was started with, else one for each worker."""
    if train.microbatches:
        return train
    before = read_config(run_dir) if latest_checkpoint(run_dir) else {}
    made = before.get("train", {}).get("microbatches") or max(1, train.num_workers)
    if max(1, train.num_workers) > made:
        raise UsageError(
            f"train.num_workers={train.num_workers}, but {run_dir} was started with train.microbatches={made}: "
            "more workers than that would have nothing to do"
        )
    return replace(train, microbatches=made)


def is_run(run_dir: str) -> bool:
    """Whether a run was started in the folder."""
    return storage.exists(storage.join(storage.normalize(run_dir), CONFIG))


def read_config(run_dir: str) -> dict[str, Any]:
    """The configuration that a run was started with. Raises InputRefused where there is none."""
    if not is_run(run_dir):
        raise InputRefused(f"{run_dir} is not a run folder (no {CONFIG}): check the path")
    return yaml.safe_load(storage.read_bytes(storage.join(storage.normalize(run_dir), CONFIG)))


def config_of(run_dir: str, schema: type[T], stage: str) -> T:
    """The same, typed. Raises InputRefused, "... is not a `stage` run", for another kind of folder."""
    return from_tree(schema, read_config(run_dir), f"{run_dir} is not a {stage} run")


def refuse_other_run(run_dir: str, config: Any) -> None:
    """Raise UsageError when the folder was started with another configuration, beyond what a run may change."""
    old, new_flat = _flatten(read_config(run_dir)), _flatten(as_tree(config))
    changed = sorted(key for key in old.keys() | new_flat.keys() if old.get(key) != new_flat.get(key))
    changed = [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)]
    if changed:
        key = changed[0]
        raise UsageError(
            f"{run_dir} was started with {key}={old.get(key)}, now it is {new_flat.get(key)}: "
            "give the old value to continue it, or another run.dir to start a new run"
        )


def as_tree(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts."""
    return yaml.safe_load(to_yaml(config))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in _flatten(value, f"{prefix}.{name}".lstrip(".")).items()}
    return {prefix: tree}


def provenance() -> dict[str, Any]:
    """What made this run: code, library versions, machine, time."""
    names = ("jepa-pipeline", "ray", "torch", "timm", "av", "pyarrow", "deltalake", "numpy")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": code_version(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "cpus": os.cpu_count(),
    }


def code_version() -> str:
    """What git calls the code that runs; in an image without git, JEPA_CODE_VERSION or the package's version."""
    try:
        here = Path(__file__).parent
        result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=5)
        named = result.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        named = ""
    return named or os.environ.get("JEPA_CODE_VERSION") or metadata.version("jepa-pipeline")


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


def delete_parts_after(run_dir: str, step: int) -> None:
    """Forget what was written about steps beyond a checkpoint: the run is about to do them again."""
    run_dir = storage.normalize(run_dir)
    for kind in (METRICS, QUARANTINE, LEDGER):
        parts = storage.list_files(storage.join(run_dir, kind), (".jsonl",), missing_ok=True)
        storage.delete([part.uri for part in parts if _first_step(part.uri) > step])


def _first_step(uri: str) -> int:
    return int(Path(uri).name[:8])


def write_json(run_dir: str, name: str, value: Any) -> None:
    """One JSON object of a run."""
    storage.write_bytes(storage.join(storage.normalize(run_dir), name), json.dumps(value, indent=1, default=float).encode())


def read_json(run_dir: str, name: str) -> Any | None:
    """The object, or None when the run has none of that name."""
    uri = storage.join(storage.normalize(run_dir), name)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def load_weights(checkpoint: Checkpoint, stem: str) -> dict[str, Any]:
    """Tensors of a checkpoint's `<stem>.safetensors` by name."""
    from safetensors.torch import load

    return load(storage.read_bytes(storage.join(checkpoint.uri, f"{stem}.safetensors")))
