"""What the workers of a run decide together: one small vector, summed over them once in a step.

Each number has a place of its own that one worker fills and the others leave at zero, so the sum is exact and every worker reads
the same: no clock, signal or preemption notice can make one of them leave a collective that the others are in.
"""

import math
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pipelines import gauges, run_folder, train_guard
from pipelines.relay import WARNING
from pipelines.run_folder import Checkpoint

if TYPE_CHECKING:
    from pipelines.train_state import Saver
    from pipelines.train_worker import Loop, StepResult

POLL_S = 1.0
"""How often rank 0 asks whether the run shall stop."""
PREEMPTION_S = 5.0
"""How often all workers ask Ray Train whether a node is about to go: a barrier, so not in every step."""
SHORTEST_S, LONGEST_S = 30.0, 3600.0
"""Bounds of the time between checkpoints by the clock."""
_STOP, _SAVE, _ASK = range(3)
_FLAGS = 3


@dataclass
class Decision:
    """What all workers do after a step's gradients."""

    losses: list[float] = field(default_factory=list)
    """Of the step's microbatches, in order."""
    save: bool = False
    urgent: bool = False
    """Wait until the checkpoint stands: a node is about to go."""
    stop: bool = False
    reason: str = ""
    forward_s: list[float] = field(default_factory=list)
    """By rank: see StepResult."""
    waits: list[float] = field(default_factory=list)
    """Seconds without data, by rank."""
    dataset_losses: dict[str, float] = field(default_factory=dict)
    """Mean over the step's samples of each dataset, where they are measured: in logged steps of runs that mix several."""

    @property
    def broken(self) -> list[int]:
        """Microbatches whose loss is not finite."""
        return [part for part, loss in enumerate(self.losses) if not math.isfinite(loss)]


class Control:
    """One worker's end of the agreement."""

    def __init__(self, loop: "Loop", rank: int, world: int) -> None:
        self.loop, self.rank, self.world = loop, rank, world
        self.group: ProcessGroup | None = None
        self.save_group: ProcessGroup | None = None
        """Of the thread that writes checkpoints: its collectives must not meet those of training."""
        names = [os.urandom(3).hex()]
        if world > 1:
            self.group, self.save_group = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
            dist.broadcast_object_list(names, src=0, group=self.group)
        self.attempt: str = names[0]
        self._started = self._asked = time.monotonic()
        self._saved_for_preemption = False
        self._stop_asked = threading.Event()
        self._closed = threading.Event()
        self.lr_scale = 1.0
        """What rollbacks have left of the learning rate."""
        if rank == 0 and loop.sink is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """End the thread that asks whether to stop."""
        self._closed.set()

    def start(self) -> tuple[Checkpoint | None, dict[str, str]]:
        """The newest sound checkpoint, and {} to go on from it or why the run ends here: it was refused, or starts again and
        again at one step. Rank 0 looks, all workers are told the same. `lr_scale` is set too.
        """
        told: list[Any] = [None, {}, 1.0]
        gauges.begin(self.loop.run_dir)
        if self.rank == 0:
            scale = train_guard.apply(self.loop.run_dir, self.loop.optim)
            found = run_folder.newest_sound_checkpoint(self.loop.run_dir)
            told = [found, {}, scale]
            if self.loop.sink is not None:
                for folder, reason in run_folder.damaged_checkpoints(self.loop.run_dir).items():
                    self.loop.sink.push.remote({WARNING: f"{folder} is passed over: {reason}"})
                step = found.step if found else 0
                told[1], restarts = ray.get(self.loop.sink.started.remote(step, self.loop.train.max_failures))
                if restarts:
                    gauges.count("restarts")
        if self.group is not None:
            dist.broadcast_object_list(told, src=0, group=self.group)
        self.lr_scale = told[2]
        return told[0], told[1]

    def share(self, value: Any) -> Any:
        """What rank 0 has, on all workers."""
        told = [value]
        if self.group is not None:
            dist.broadcast_object_list(told, src=0, group=self.group)
        return told[0]

    def agree(self, result: "StepResult", saver: "Saver", step: int, *, last: bool) -> Decision:
        """All workers call this after the gradients of a step, before anything is done with them."""
        parts = self.loop.train.microbatches
        names = self.loop.datasets
        vector = torch.zeros(_FLAGS + parts + 2 * self.world + 2 * len(names), dtype=torch.float64)
        for part, loss in result.losses.items():
            vector[_FLAGS + part] = loss.double().cpu()
        times = vector[_FLAGS + parts :][: 2 * self.world].view(2, self.world)
        by_dataset = vector[_FLAGS + parts + 2 * self.world :].view(2, -1)
        if result.by_dataset is not None:
            by_dataset += result.by_dataset.cpu()
        times[:, self.rank] = torch.tensor([result.forward_s, result.waited], dtype=torch.float64)
        if self.rank == 0:
            vector[_STOP] = self._stop_asked.is_set()
            vector[_SAVE] = not last and self._due(saver)
            vector[_ASK] = self.loop.train.num_workers > 0 and time.monotonic() - self._asked > PREEMPTION_S
        if self.group is not None:
            dist.all_reduce(vector, group=self.group)
        every = self.loop.train.checkpoint_every
        decision = Decision(
            losses=vector[_FLAGS : _FLAGS + parts].tolist(),
            save=bool(vector[_SAVE]) or bool(every and (step + 1) % every == 0),
            stop=bool(vector[_STOP]),
            reason="asked to stop (SIGTERM)" if vector[_STOP] else "",
            forward_s=times[0].tolist(),
            waits=times[1].tolist(),
            dataset_losses={n: (s / c).item() for n, s, c in zip(names, *by_dataset, strict=True) if c},
        )
        if vector[_ASK]:
            self._asked = time.monotonic()
            self._ask_for_preemption(decision)
        return decision

    def _due(self, saver: "Saver") -> bool:
        train = self.loop.train
        if train.checkpoint_every or saver.busy:
            return False
        if saver.committed == 0 and saver.failures == 0:
            return True  # the first one also measures what saving costs
        interval = math.sqrt(2 * max(saver.blocked_s, 0.05) * train.mttf_hours * 3600)
        return time.monotonic() - saver.began >= min(max(interval, SHORTEST_S), LONGEST_S)

    def _ask_for_preemption(self, decision: Decision) -> None:
        notice = ray.train.get_preemption_info()
        if notice is not None and not self._saved_for_preemption:
            decision.save = decision.urgent = self._saved_for_preemption = True
        elif notice is None:
            self._saved_for_preemption = False

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            try:
                if ray.get(self.loop.sink.stop_asked.remote()):
                    self._stop_asked.set()
                    return
            except ray.exceptions.RayError:  # the driver has gone, and takes the workers with it
                return
