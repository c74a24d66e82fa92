"""The workers' part of the probe beside a pretraining (online_probe.py): every worker encodes its share, rank 0 reads it out.

All workers do the same number of passes, and meet in two small collectives, so none waits longer than one batch takes; a sharded
encoder is gathered block by block, as in training. No random number is drawn and no weight is touched.

Legend: K clips of the set, F feature width.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_core.optimization import PRECISIONS, autocast
from jepa_core.weights import TARGET_ENCODER
from pipelines.config import TrainConfig
from pipelines.online_probe import ProbeSet
from pipelines.train_log import PROBE_SECONDS

if TYPE_CHECKING:
    from pipelines.train_control import Control

NOW, RANDOM, PIXELS = "probe/", "probe_random/", "probe_pixels/"
"""What keys of metrics begin with: shares of right answers now, of the random weights of this seed, and of raw pixels."""


class OnlineProbe:
    """One worker's end. All workers make it, before the module is sharded, and call `measure` at the same steps."""

    def __init__(
        self, found: ProbeSet, every: int, train: TrainConfig, control: "Control", module: nn.Module, device: torch.device
    ) -> None:
        self.found, self.every, self.train, self.control, self.device = found, every, train, control, device
        self.size = max(1, train.batch_size // train.microbatches)  # what training holds, and keeps for its backward pass
        random, pixels = self._scores(module), found.pixels
        self.beside = {f"{RANDOM}{name}": score for name, score in random.items()}
        self.beside |= {f"{PIXELS}{name}": score for name, score in pixels.items()}

    def due(self, step: int) -> bool:
        """Whether to measure after so many finished steps: with the first line of metrics from each multiple of `every` on."""
        every, lines = self.every, self.train.log_every
        return step == self.train.steps or (step % lines == 0 and step // every > (step - lines) // every)

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Numbers for the line of metrics, the same on all workers; PROBE_SECONDS is what rank 0 took."""
        began = time.monotonic()
        scores = self._scores(module)
        told = {f"{NOW}{name}": score for name, score in scores.items()} | self.beside | {PROBE_SECONDS: time.monotonic() - began}
        return self.control.share(told)

    @torch.no_grad()
    def _scores(self, module: nn.Module) -> dict[str, float]:
        x = self._features(module.get_submodule(TARGET_ENCODER))
        return self.found.scores(x) if self.control.rank == 0 else {}

    def _features(self, encoder: nn.Module) -> Tensor:
        """Mean tokens float32 [K, F] of all clips, on all workers."""
        clips, found = self.found.tubelets, None
        for rows, own in turns(len(clips), self.size, self.control.rank, self.control.world):
            with autocast(self.device, PRECISIONS[self.train.precision]):
                mean = encoder(torch.from_numpy(clips[rows]).to(self.device), self.found.grid).float().mean(dim=1).cpu()
            found = mean.new_zeros(len(clips), mean.shape[1]) if found is None else found
            if own:
                found[rows] = mean
        if self.control.group is not None:
            dist.all_reduce(found, group=self.control.group)  # each row is one worker's, and zero elsewhere: exact
        return found


def turns(count: int, size: int, rank: int, world: int) -> Sequence[tuple[slice, bool]]:
    """Batches of `count` clips that one of `world` workers encodes: (rows, whether they are its own).

    All workers get equally many: one without a batch left repeats the last, because sharded encoders are gathered by all.
    """
    batches = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    mine = range(rank, -(-len(batches) // world) * world, world)
    return [(batches[min(turn, len(batches) - 1)], turn < len(batches)) for turn in mine]
