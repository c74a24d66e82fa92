"""What a run does about an alarm of the guard: warn, end, or return to a sound checkpoint with a lower learning rate.

A rollback is one object in the run folder. With it the checkpoints since the onset do not count any more, and the learning rate
is lower; whoever starts the workers next, this driver or another, finds it and does the rest again: it cannot be half done.
"""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jepa_core.config import OptimConfig
from jepa_core.guard import Alarm
from pipelines import run_folder
from pipelines.run_folder import ROLLBACKS, Checkpoint

if TYPE_CHECKING:
    from pipelines.train_worker import Loop


def warning(run_dir: str, alarm: Alarm) -> str:
    """An alarm as a sentence: which signature, since which step, and where a rollback would go."""
    point = _point(run_dir, alarm)
    place = f"checkpoint before it is {point.uri}" if point else "sound state before it is the start of the run"
    return f"{alarm.signature} since step {alarm.since} ({alarm.told}): the last {place}"


def ending(loop: "Loop", alarm: Alarm, step: int) -> dict[str, Any]:
    """End the workers at an alarm: "refused" or "rolled_back" with a sentence. Rank 0 calls this when no checkpoint is in the
    making.
    """
    told, guard = warning(loop.run_dir, alarm), loop.train.guard
    if guard.action == "stop":
        advice = "train.guard.action=rollback returns there with a lower learning rate, train.guard.action=warn goes on"
        return {"step": step, "refused": f"{told}; {advice}"}
    done = read(loop.run_dir, loop.optim)
    if len(done) >= guard.max_rollbacks:
        return {"step": step, "refused": f"{told}; the run was rolled back {len(done)} times (train.guard.max_rollbacks)"}
    point = _point(loop.run_dir, alarm)
    to = point.step if point else 0
    aside = [found.uri.rpartition("/")[2] for found in run_folder.checkpoints(loop.run_dir) if found.step > to]
    note = asdict(alarm) | {"at": step, "to": to, "aside": aside, "lr_scale": guard.rollback_lr_scale, "time": time.time()}
    every = run_folder.read_json(loop.run_dir, ROLLBACKS) or []
    run_folder.write_json(loop.run_dir, ROLLBACKS, [*every, note | {"optim": asdict(loop.optim)}])
    apply(loop.run_dir, loop.optim)
    return {"step": step, "rolled_back": f"{told}; training returns there with {guard.rollback_lr_scale:g} x the learning rate"}


def read(run_dir: str, optim: OptimConfig) -> list[dict[str, Any]]:
    """Rollbacks of a run under these settings of the optimizer: a run that starts anew with others has none."""
    return [note for note in run_folder.read_json(run_dir, ROLLBACKS) or [] if OptimConfig(**note["optim"]) == optim]


def apply(run_dir: str, optim: OptimConfig) -> float:
    """Set aside the checkpoints that rollbacks left behind. Returns what the learning rate is multiplied with."""
    scale, notes = 1.0, read(run_dir, optim)
    present = {found.uri.rpartition("/")[2]: found for found in run_folder.checkpoints(run_dir)} if notes else {}
    for note in notes:
        scale *= note["lr_scale"]
        for name in present.keys() & set(note["aside"]):
            run_folder.set_aside(present[name], f"rolled back to step {note['to']}: {note['signature']} since {note['since']}")
    return scale


def _point(run_dir: str, alarm: Alarm) -> Checkpoint | None:
    return next((found for found in run_folder.checkpoints(run_dir) if found.step <= alarm.sound), None)
