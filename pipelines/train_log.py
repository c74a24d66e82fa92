"""What a run tells while it trains: one line of metrics per interval, a digest of every microbatch, samples that failed.

Lines are kept until the next checkpoint and written with it, as parts named by their first step; the line of metrics also goes to
the driver at once.
"""

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jepa_core.flops import peak_tflops
from jepa_core.guard import Alarm, Guard
from jepa_core.health import FEATURES, RecentClips, effective_ranks, feature_std
from pipelines import gauges, run_folder, train_guard
from pipelines.relay import WARNING

if TYPE_CHECKING:
    from pipelines.train_control import Decision
    from pipelines.train_state import Progress, Saver
    from pipelines.train_worker import Loop, StepResult

PROBE_SECONDS = "probe_s"
"""Key of what a measurement of the probe beside the training took."""


@dataclass(frozen=True)
class Parts:
    """Lines of the steps since the last checkpoint, to be written before the next one counts."""

    run_dir: str
    first: int
    rank: int
    lines: dict[str, list[dict[str, Any]]]

    def write(self) -> None:
        """One object for each kind that has lines."""
        for kind, lines in self.lines.items():
            if lines:
                run_folder.write_part(self.run_dir, kind, self.first, lines, self.rank)


class TrainLog:
    """One worker's notes; rank 0 also makes the lines of metrics."""

    def __init__(self, loop: "Loop", rank: int, world: int, progress: "Progress", device: torch.device) -> None:
        self.loop, self.rank, self.world = loop, rank, world
        self.first = progress.step + 1
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.unwritten: list[Parts] = []
        self.peak = loop.train.peak_tflops
        if not self.peak and device.type == "cuda" and loop.train.precision == "bf16":  # what data sheets tell
            self.peak = peak_tflops(torch.cuda.get_device_name(device)) or 0.0
        self.run_started = (run_folder.read_json(loop.run_dir, run_folder.PROVENANCE) or {}).get("first_started", time.time())
        self.recent = RecentClips()
        self.guard = Guard(loop.train.guard, progress.guard)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self.since, self.steps, self.flops = time.monotonic(), 0, 0.0
        self.waits = [0.0] * self.world
        self.forwards = [0.0] * self.world

    def pause(self, seconds: float) -> None:
        """So much of the interval was not training."""
        self.since += seconds

    def step(
        self, progress: "Progress", result: "StepResult", decision: "Decision", numbers: dict[str, Any], saver: "Saver"
    ) -> Alarm | None:
        """Note a finished step; `progress` already counts it. Returns what the guard says of it, on rank 0."""
        for unit in result.units:
            self._add(run_folder.LEDGER, {"step": progress.step, "unit": unit.number, "digest": unit.digest})
            for failure in unit.failures:
                self._add(run_folder.QUARANTINE, {"step": progress.step, **failure})
                gauges.count("clips_failed", reason=failure["reason"], dataset=failure.get("dataset", ""))
        self.steps += 1
        self.flops += result.flops
        self.waits = [a + b for a, b in zip(self.waits, decision.waits, strict=True)]
        self.forwards = [a + b for a, b in zip(self.forwards, decision.forward_s, strict=True)]
        if self.rank == 0:
            for clips in result.clips:
                self.recent.add(clips)
        if not self.loop.train.logs(progress.step):
            return None
        alarm = None
        if self.rank == 0:
            line = self._line(progress, decision, numbers, saver)
            alarm = self._judged(line, result.units[-1].group)
            self._add(run_folder.METRICS, line)
            gauges.publish(line)
            if self.loop.sink is not None:
                self.loop.sink.push.remote(line)
        self._begin_interval()
        return alarm

    def _judged(self, line: dict[str, Any], group: int) -> Alarm | None:
        """What the guard says of a line, which gets it as `guard`; a new alarm is told, where the run goes on with it."""
        action = self.loop.train.guard.action
        alarm = self.guard.see(line, group) if action != "off" else None
        if alarm is not None:
            line["guard"] = f"{alarm.signature} since step {alarm.since}"
        if alarm is not None and alarm.first:
            gauges.count("guard_alarms", signature=alarm.signature)
            if action == "warn" and self.loop.sink is not None:
                self.loop.sink.push.remote({WARNING: train_guard.warning(self.loop.run_dir, alarm)})
        return alarm

    def close_part(self, done: int) -> None:
        """The checkpoint of a step is about to be written: its part of the history ends here, and the next one begins."""
        self.unwritten.append(Parts(self.loop.run_dir, self.first, self.rank, self.lines))
        self.lines, self.first = {}, done + 1

    def write_parts(self) -> None:
        """Write the closed parts; those that a failing store did not take are written with the next checkpoint. Thread-safe."""
        while self.unwritten:
            self.unwritten[0].write()
            del self.unwritten[0]

    def _add(self, kind: str, line: dict[str, Any]) -> None:
        self.lines.setdefault(kind, []).append(line)

    def _line(self, progress: "Progress", decision: "Decision", numbers: dict[str, Any], saver: "Saver") -> dict[str, Any]:
        train, seconds = self.loop.train, time.monotonic() - self.since
        features = numbers.pop(FEATURES, None)
        if features is not None:  # a decomposition: only for steps that are logged
            rank, directions = effective_ranks(features)
            numbers |= {"feature_std": feature_std(features), "rank_me": rank, "participation": directions}
            clips = self.recent.ranks()
            numbers |= {"rank_me_clip": clips[0], "participation_clip": clips[1]} if clips else {}
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in numbers.items()}
        slowest = max(range(self.world), key=self.forwards.__getitem__)
        # Against the others, not against all: of two ranks, one that is ten times slower would be 1.8 times the median.
        typical = statistics.median(seconds for rank, seconds in enumerate(self.forwards) if rank != slowest or self.world == 1)
        line = {
            "step": progress.step,
            "time": time.time(),
            "loss": statistics.fmean(decision.losses),
            **values,
            **{f"loss/{name}": loss for name, loss in decision.dataset_losses.items()},
            "clips_per_s": self.steps * train.batch_size / seconds,
            "data_wait": min(1.0, statistics.fmean(self.waits) / seconds),
            "step_s": seconds / self.steps,
            "goodput": min(1.0, progress.useful_s / max(1e-9, time.time() - self.run_started)),
            "eta_s": (train.steps - progress.step) * seconds / self.steps,
            "skew": self.forwards[slowest] / typical if typical else 1.0,
            "slowest_rank": slowest,
            "workers": self.world,
            "committed_step": saver.committed,
            "save_s": saver.seconds,
            "checkpoint_failures": saver.failures,
        }
        if saver.untidy:
            line["checkpoints_kept"] = saver.untidy
        if saver.error:
            line["checkpoint_error"] = str(saver.error)
        if PROBE_SECONDS in line:
            steps = max(self.loop.probe[1], train.log_every)
            line["probe_cost"] = line[PROBE_SECONDS] / (line["step_s"] * steps)
        if self.peak and self.flops:
            line["mfu"] = self.flops / seconds / (self.peak * 1e12)
        return line
