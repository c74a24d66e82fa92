"""What each Ray Train worker runs: steps of one or several microbatches, and what all workers must decide together.

Workers talk to each other twice in a step: gradients, and one small vector by which they agree on the loss, on whether it is
finite, whether to save, whether to stop. So no worker ever waits in a collective that another has left.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import ray.train
import torch
from ray.train.torch import get_device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from jepa_core.canonical import CanonicalGradients
from jepa_core.config import OptimConfig
from jepa_core.guard import Alarm
from jepa_core.health import CLIPS, SAMPLE_LOSS
from jepa_core.optimization import PRECISIONS, autocast, compile_blocks, make_optimizer, set_rates, shard
from jepa_core.schedules import learning_rate, weight_decay
from pipelines import run_folder, train_guard
from pipelines.config import TrainConfig
from pipelines.errors import JepaError, Retryable, unwrapped
from pipelines.run_folder import Checkpoint
from pipelines.train_control import Control, Decision
from pipelines.train_log import TrainLog
from pipelines.train_state import Saver, TrainState
from pipelines.units import FILLER, Span, Unit, unit_of

# Batches are read from shared memory without a copy, and never written.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Task(Protocol):
    """What a training stage brings to the loop."""

    module: nn.Module
    """Everything that is trained or saved. Called with `tensors(...)`, returns (loss, numbers to log)."""

    def tensors(self, unit: Unit) -> tuple[Any, ...]:
        """Arguments of the module for one microbatch."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, e.g. for the EMA of the target encoder."""
        ...

    def flops(self, unit: Unit, numbers: dict[str, Any]) -> float:
        """Floating-point operations that a microbatch took, forward and backward; 0 where they are not counted."""
        ...

    exports: tuple[str, ...]
    """Children of the module that others load: each is written as safetensors beside the state, under its own names."""

    leaves_unused: bool
    """Whether a step may leave parameters without a gradient, which DDP has to be told."""

    saves_frozen: bool
    """Whether checkpoints hold parameters that require no gradient; false where the task brings them itself at every start."""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first step of a run that has no checkpoint, e.g. to start from the weights of another run."""
        ...


@dataclass(frozen=True)
class Loop:
    """A picklable description of a run, as each worker receives it."""

    make_task: Any
    """device -> Task"""
    train: TrainConfig
    optim: OptimConfig
    run_dir: str
    seed: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What every COMMIT tells about the run: catalogs, configuration, code."""
    sink: Any = None
    datasets: tuple[str, ...] = ()
    """Names of the datasets that samples come from, in the order of Unit.datasets, where losses are told for each."""
    probe: tuple[Any, int] | None = None
    """(Ray's reference to an online_probe.ProbeSet, steps between measurements), where one watches the training."""


@dataclass
class StepResult:
    """One worker's part of a step."""

    losses: dict[int, Tensor]
    """Microbatch within the step -> its loss."""
    units: list[Unit]
    numbers: dict[str, Any]
    """Of the last microbatch."""
    flops: float
    waited: float
    """Seconds without data."""
    forward_s: float
    """Seconds until the loss was known: what this worker takes when it waits for no other."""
    clips: list[Tensor] = field(default_factory=list)
    """Mean tokens of the clips of each microbatch [B, D]."""
    by_dataset: Tensor | None = None
    """float64 [2, datasets]: sum of the samples' losses, and their number; None where they are not measured."""


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train to the last step. Returns how it ended: {"step": n} and "stopped", "refused" or "failed" with a sentence."""
    loop: Loop = config["loop"]
    torch.set_num_threads(max(1, int(loop.train.cpus_per_worker)))
    context = ray.train.get_context()
    control = Control(loop, context.get_world_rank(), context.get_world_size())
    try:
        with contextlib.closing(control):
            checkpoint, ending = control.start()
            if ending:
                return {"step": checkpoint.step if checkpoint else 0, **ending}
            return _Worker(loop, control, checkpoint).run()
    except Exception as error:
        inner = unwrapped(error)
        if isinstance(inner, JepaError) and not isinstance(inner, Retryable) and loop.sink is not None:
            # Ray Train starts the workers again whatever they died of; the next start is told that it is in vain.
            ray.get(loop.sink.refuse.remote(str(inner)))
        raise


class _Worker:
    """Model, optimizer, data and log of one rank."""

    def __init__(self, loop: Loop, control: Control, checkpoint: Checkpoint | None) -> None:
        self.loop, self.control = loop, control
        self.rank, self.world, self.parts = control.rank, control.world, loop.train.microbatches
        device = self.device = get_device() if loop.train.use_gpu else torch.device("cpu")
        torch.manual_seed(loop.seed)  # the same initial weights on every rank
        self.task: Task = loop.make_task(device)
        module = self.task.module
        self.probe = self._probe(module)
        if self.world > 1 and loop.train.parallel == "fsdp":
            shard(module, init_device_mesh(device.type, (self.world,)))
        self.state = TrainState(module, make_optimizer([module], loop.optim), frozen=self.task.saves_frozen)
        self.saver = Saver(loop.run_dir, loop.train.keep_checkpoints, loop.facts, control.attempt, control.save_group)
        self._restore(checkpoint)
        if loop.train.compile:
            compile_blocks(module)
        self.model = module
        self.canonical = None
        if loop.train.deterministic == "canonical":
            self.canonical = CanonicalGradients(list(module.parameters()))
        elif self.world > 1 and loop.train.parallel == "ddp":
            self.model = DistributedDataParallel(module, find_unused_parameters=self.task.leaves_unused)
        self.log = TrainLog(loop, self.rank, self.world, self.state.progress, device)

    def _probe(self, module: nn.Module) -> Any:
        if self.loop.probe is None:
            return None
        from pipelines.train_probe import OnlineProbe

        found, every = self.loop.probe
        return OnlineProbe(ray.get(found), every, self.loop.train, self.control, module, self.device)

    def _restore(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint:
            self.state.load(checkpoint)
            self.saver.committed, self.saver.seconds = checkpoint.step, self.state.progress.save_s
        else:
            self.task.begin(self.state.optimizer)
        first_step = self.state.progress.step
        self.span = Span(first_step, self.loop.train.end, self.parts)
        if self.rank == 0:
            run_folder.delete_parts_after(self.loop.run_dir, first_step)

    def run(self) -> dict[str, Any]:
        progress, steps = self.state.progress, self.loop.train.end
        units = _units()
        decision = Decision()
        while progress.step < steps and not decision.stop:
            began = time.monotonic()
            result = self._forward_backward(progress.step, units)
            last = progress.step + 1 == steps
            decision = self.control.agree(result, self.saver, progress.step, last=last)
            parts = self._gradient_norms() if self.loop.train.logs(progress.step + 1) else {}
            norm = self._gradient_norm()
            refusal = self._refusal(decision, norm, progress.step)
            if refusal:
                self.saver.finish()
                return {"step": progress.step, "refused": refusal}
            numbers = {"grad_norm": norm, **parts, "lr": self._update(progress.step)}
            progress.step += 1
            progress.useful_s += max(0.0, time.monotonic() - began - result.waited)
            numbers |= result.numbers
            if self.probe is not None and self.probe.due(progress.step):
                began = time.monotonic()
                numbers |= self.probe.measure(self.task.module)
                self.log.pause(time.monotonic() - began)
            alarm = self.log.step(progress, result, decision, numbers, self.saver)
            if ending := self._guarded(alarm):
                return ending
            if decision.save or decision.stop or last:
                self._save(wait=decision.stop or decision.urgent or last)
        self.saver.finish()
        return self._ending(decision)

    def _forward_backward(self, step: int, units: Iterator[tuple[Unit, float]]) -> StepResult:
        """Gradients of this worker's microbatches of a step, summed over the step's and over the workers'."""
        mine = [u for u in range(step * self.parts, (step + 1) * self.parts) if self.span.owner(u, self.world) == self.rank]
        result = StepResult({}, [], {}, 0.0, 0.0, 0.0)
        for slot in range(-(-self.parts // self.world)):
            if slot < len(mine):
                self._microbatch(step, mine[slot], slot + 1 == len(mine), units, result)
            if self.canonical:
                begin = step * self.parts + slot * self.world
                slots = range(begin, min(begin + self.world, (step + 1) * self.parts))
                self.canonical.add([self.span.owner(u, self.world) for u in slots])
        if self.canonical:
            self.canonical.finish(self.parts)
        return result

    def _microbatch(self, step: int, number: int, last: bool, units: Iterator[tuple[Unit, float]], result: StepResult) -> None:
        unit, waited = next(units)
        if unit.number != number or unit.step != step:
            raise RuntimeError(
                f"step {step} received microbatch {unit.number} of step {unit.step}, not {number}: "
                "data and checkpoint are out of step"
            )
        began = time.monotonic()
        tensors = self.task.tensors(unit)
        with self._synchronised(last), autocast(self.device, PRECISIONS[self.loop.train.precision]):
            loss, numbers = self.model(*tensors)
        result.losses[number - step * self.parts] = loss.detach()
        result.forward_s += time.monotonic() - began
        # DDP and FSDP take the mean over workers; the step's loss is the mean over its microbatches.
        scale = 1.0 if self.canonical else self.world / self.parts
        with self._synchronised(last):
            (loss * scale).backward()
        result.flops += self.task.flops(unit, numbers)
        result.waited += waited
        result.units.append(unit)
        if CLIPS in numbers:
            result.clips.append(numbers.pop(CLIPS))
        samples = numbers.pop(SAMPLE_LOSS, None)
        if samples is not None and self.loop.datasets:
            told = torch.stack([samples.double(), torch.ones_like(samples, dtype=torch.float64)]).cpu()
            empty = torch.zeros(2, len(self.loop.datasets), dtype=torch.float64)
            each = empty.index_add(1, torch.tensor(unit.datasets, dtype=torch.int64), told)
            result.by_dataset = each if result.by_dataset is None else result.by_dataset + each
        result.numbers = numbers

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients travel between workers with the last microbatch only."""
        for module in self.model.modules() if self.loop.train.parallel == "fsdp" and self.world > 1 else ():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(last, recurse=False)
        with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else contextlib.nullcontext():
            yield

    def _gradient_norm(self) -> float:
        """Of all gradients together, before they are cut to optim.clip_grad; the same on all workers."""
        limit = self.loop.optim.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in self.task.module.parameters() if p.grad is not None], limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _gradient_norms(self) -> dict[str, float]:
        """Of each network's gradients, where there are several; the same on all workers."""
        found = {}
        for name, network in self.task.module.named_children():
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            if gradients:
                norm = nn.utils.get_total_norm(gradients)
                found[f"grad_norm_{name}"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return found if len(found) > 1 else {}

    def _guarded(self, alarm: Alarm | None) -> dict[str, Any]:
        """How the run ends at an alarm of rank 0's guard, {} where it goes on; all workers do the same."""
        step, train = self.state.progress.step, self.loop.train
        if train.guard.action not in ("stop", "rollback") or not train.logs(step):
            return {}
        alarm = self.control.share(alarm)
        if alarm is None:
            return {}
        self.saver.finish()  # the checkpoint in the making may be the one to return to
        self.log.close_part(step)
        self.log.write_parts()  # what led to the alarm can be read until the run goes on
        return train_guard.ending(self.loop, alarm, step) if self.rank == 0 else {"step": step}

    def _refusal(self, decision: Decision, norm: float, step: int) -> str:
        """Why training must not go on with these gradients; the same sentence on all workers."""
        if not decision.broken and math.isfinite(norm):
            return ""
        broken = decision.broken or list(range(self.parts))
        what = f"loss is {decision.losses[broken[0]]}" if decision.broken else f"gradient's norm is {norm}"
        size = self.loop.train.batch_size // self.parts
        samples = [n for part in broken for n in range((step * self.parts + part) * size, (step * self.parts + part + 1) * size)]
        return (
            f"the {what} at step {step} for samples {samples}: "
            "lower optim.lr, or look at these samples; the last checkpoint is unharmed"
        )

    def _update(self, step: int) -> float:
        """One optimizer step and what follows it. Returns the learning rate."""
        train, optim, optimizer = self.loop.train, self.loop.optim, self.state.optimizer
        rate = learning_rate(step, train.steps, optim) * self.control.lr_scale
        set_rates(optimizer, rate, weight_decay(step, train.steps, optim))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.task.after_step(step)
        return rate

    def _save(self, *, wait: bool) -> None:
        self.log.close_part(self.state.progress.step)
        self.saver.begin(self.state, self.task.exports, self.log.write_parts)
        if wait:
            self.saver.finish()

    def _ending(self, decision: Decision) -> dict[str, Any]:
        step = self.state.progress.step
        if self.saver.error:
            return {"step": step, "failed": str(self.saver.error)}
        return {"step": step} | ({"stopped": decision.reason} if decision.stop and step < self.loop.train.steps else {})


def _units() -> Iterator[tuple[Unit, float]]:
    """(microbatch, seconds waited for it), in order: this rank's share."""
    shard = ray.train.get_dataset_shard("train")
    before, came = time.monotonic(), True
    while came:  # segments
        came = False
        # One ahead: with two, a worker holds some six units, which fills a small object store.
        for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            unit = unit_of(block)
            if unit.step != FILLER:
                yield unit, time.monotonic() - before
                before, came = time.monotonic(), True
    raise RuntimeError("the data ended before the last step")
