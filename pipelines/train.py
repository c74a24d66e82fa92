"""One training loop for both stages, run by Ray Train workers on batches from Ray Data.

A stage brings a `Task` (module, loss, exports) and a dataset; the loop brings steps, learning rate, mixed precision, DDP,
metrics, checkpoints and exact resume. One block of the dataset is one worker's batch of one step, in order.
"""

import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray
import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from jepa_core.config import OptimConfig
from jepa_core.objective import feature_std, rank_me
from jepa_core.optimization import autocast, compile_blocks, make_optimizer, set_rates, shard
from jepa_core.pretraining import FEATURES
from jepa_core.schedules import learning_rate, weight_decay
from pipelines import run_folder, storage
from pipelines.columns import FAILURES, SAMPLE
from pipelines.config import TrainConfig
from pipelines.errors import InputRefused, JepaError, Retryable, UsageError, unwrapped
from pipelines.progress import Reporter
from pipelines.relay import Relay

Rows = dict[str, np.ndarray]
COLLECTIVE_TIMEOUT_S = 300
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHOWN = ("loss", "trivial", "clips_per_s", "data_wait")
"""Numbers beside the progress bar."""


class Task(Protocol):
    """What a training stage brings to the loop."""

    module: nn.Module
    """Everything that is trained or saved. Called with `tensors(...)`, returns (loss, numbers to log)."""

    def tensors(self, rows: Rows, step: int) -> tuple[Any, ...]:
        """Arguments of the module for one worker's batch at a step."""
        ...

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, e.g. for the EMA of the target encoder."""
        ...

    exports: tuple[str, ...]
    """Children of the module that others load: each is written as safetensors beside the state, under its own names."""

    leaves_unused: bool
    """Whether a step may leave parameters without a gradient, which DDP has to be told."""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the first step of a run that has no checkpoint, e.g. to start from the weights of another run."""
        ...


@dataclass(frozen=True)
class Loop:
    """A picklable description of a run, as each worker receives it."""

    make_task: Callable[[torch.device], Task]
    train: TrainConfig
    optim: OptimConfig
    run_dir: str
    seed: int
    sink: Any = field(default=None)


def fit(loop: Loop, make_dataset: Callable[[int], ray.data.Dataset], batch_bytes: int, stage: str, reporter: Reporter) -> None:
    """Train to `train.steps`, continuing from the last committed checkpoint. `batch_bytes`: size of one worker's batch.

    `make_dataset(first_step)` builds the remaining batches; Ray Train calls it again at every restart of the workers, so it
    reads the cursor that was *committed* then. Raises the worker's own JepaError, or Retryable.
    """
    relay = Relay(lambda line: reporter.advance(line["step"], **{key: line[key] for key in SHOWN if key in line}))
    loop = replace(loop, sink=relay.sink)

    def remaining() -> ray.data.Dataset:
        found = run_folder.latest_checkpoint(loop.run_dir)
        dataset = make_dataset(found.step if found else 0)
        dataset.context.execution_options.preserve_order = True  # without a worker group, Train's DataConfig is not asked
        # A block that Ray splits would give halves of one batch to two workers.
        dataset.context.target_max_block_size = max(dataset.context.target_max_block_size or 0, 2 * batch_bytes)
        return dataset

    options = ray.data.ExecutionOptions(preserve_order=True)
    filesystem, path = storage.arrow_filesystem(loop.run_dir)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"loop": loop},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=loop.train.num_workers,
            use_gpu=loop.train.use_gpu,
            resources_per_worker={"CPU": loop.train.cpus_per_worker} | ({"GPU": 1} if loop.train.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=run_folder.CHECKPOINTS,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=loop.train.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=loop.train.max_failures),
        ),
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=options),
    )
    reporter.start(stage, loop.train.steps, "steps")
    with relay:
        try:
            result = trainer.fit()
        except JepaError:
            raise
        except Exception as error:
            raise _worker_error(error) from error
    reporter.stop()
    if loop.train.num_workers == 0 and result.checkpoint:
        run_folder.commit_local(loop.run_dir, result.checkpoint.path, loop.train.steps)
        shutil.rmtree(result.checkpoint.path, ignore_errors=True)


def numbered_blocks(first_step: int, steps: int, batch_size: int, num_workers: int) -> ray.data.Dataset:
    """Sample numbers of the steps that remain, as one block per worker and step (column `id`, counted from first_step)."""
    blocks = max(1, (steps - first_step) * num_workers)
    return ray.data.range((steps - first_step) * batch_size, override_num_blocks=blocks)


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    loop: Loop = config["loop"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device() if loop.train.use_gpu else torch.device("cpu")
    torch.set_num_threads(max(1, int(loop.train.cpus_per_worker)))
    torch.manual_seed(loop.seed)  # the same initial weights on every rank
    task = loop.make_task(device)
    if world > 1 and loop.train.parallel == "fsdp":
        shard(task.module, init_device_mesh(device.type, (world,)))
    optimizer = make_optimizer([task.module], loop.optim)
    start = _restore(task, optimizer, loop)
    if not start:
        task.begin(optimizer)
    if loop.train.compile:
        compile_blocks(task.module)
    model = task.module
    if world > 1 and loop.train.parallel == "ddp":
        model = DistributedDataParallel(task.module, find_unused_parameters=task.leaves_unused)

    log = _Log(loop, rank, start)
    per_rank = loop.train.batch_size // world
    for step, rows, waited in _batches(start, per_rank, loop.train.batch_size):
        lr = learning_rate(step, loop.train.steps, loop.optim)
        set_rates(optimizer, lr, weight_decay(step, loop.train.steps, loop.optim))
        with autocast(device, PRECISIONS[loop.train.precision]):
            loss, numbers = model(*task.tensors(rows, step))
        _refuse_non_finite(loss, rows, step)
        loss.backward()
        limit = loop.optim.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_([p for p in task.module.parameters() if p.grad is not None], limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.after_step(step)
        log.step(step, rows, waited, {"loss": loss, "grad_norm": norm, "lr": lr, **numbers})
        done = step + 1
        if done % loop.train.checkpoint_every == 0 or done == loop.train.steps:
            log.flush(done)
            _checkpoint(task, optimizer, done, rank)


def _batches(start: int, per_rank: int, batch_size: int) -> Iterator[tuple[int, Rows, float]]:
    """(step, rows, seconds waited) for each remaining step; stops hard if data and weights disagree on the position."""
    shard = ray.train.get_dataset_shard("train")
    before = time.perf_counter()
    for offset, rows in enumerate(shard.iter_batches(batch_size=per_rank, batch_format="numpy", prefetch_batches=2)):
        step = start + offset
        if (rows[SAMPLE] // batch_size != step).any():
            raise RuntimeError(f"step {step} received samples {rows[SAMPLE].tolist()}: data and checkpoint are out of step")
        yield step, rows, time.perf_counter() - before
        before = time.perf_counter()


class _Log:
    """Collects metrics lines and quarantine rows, writes them as parts, and feeds the terminal."""

    def __init__(self, loop: Loop, rank: int, start: int) -> None:
        self.loop, self.rank, self.first = loop, rank, start
        self.lines: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.since, self.waited, self.clips = time.perf_counter(), 0.0, 0

    def step(self, step: int, rows: Rows, waited: float, numbers: dict[str, Any]) -> None:
        for text in rows[FAILURES]:
            self.failures += [{"step": step + 1, **failure} for failure in json.loads(text)] if text else []
        self.waited += waited
        self.clips += self.loop.train.batch_size
        if (step + 1) % self.loop.train.log_every and step + 1 != self.loop.train.steps:
            return
        features = numbers.pop(FEATURES, None)
        if features is not None:  # a decomposition: only for steps that are logged
            numbers |= {"feature_std": feature_std(features), "rank_me": rank_me(features)}
        seconds = time.perf_counter() - self.since
        rates = {"clips_per_s": self.clips / seconds, "data_wait": min(1.0, self.waited / seconds)}
        values = {key: value.item() if isinstance(value, Tensor) else value for key, value in numbers.items()}
        line = {"step": step + 1, "time": time.time(), **values, **rates}
        self.since, self.waited, self.clips = time.perf_counter(), 0.0, 0
        if self.rank == 0:
            self.lines.append(line)
            self.loop.sink.push.remote(line)

    def flush(self, done: int) -> None:
        if self.rank == 0 and self.lines:
            run_folder.write_part(self.loop.run_dir, run_folder.METRICS, self.first + 1, self.lines)
        if self.failures:
            run_folder.write_part(self.loop.run_dir, run_folder.QUARANTINE, self.first + 1, self.failures, self.rank)
        self.lines, self.failures, self.first = [], [], done


def _checkpoint(task: Task, optimizer: torch.optim.Optimizer, done: int, rank: int) -> None:
    """Report a checkpoint; every rank must take part, only rank 0 writes: whole tensors by name, sharded or not."""
    module, optimizer_state = get_state_dict(task.module, optimizer, options=WHOLE)
    if rank != 0:
        ray.train.report({"step": done})
        return
    folder = tempfile.mkdtemp(prefix="jepa-checkpoint-")
    torch.save({"module": module, "optimizer": optimizer_state, "step": done}, Path(folder) / run_folder.STATE)
    for stem in task.exports:
        part = {key.removeprefix(f"{stem}."): value for key, value in module.items() if key.startswith(f"{stem}.")}
        save_file({key: value.contiguous() for key, value in part.items()}, Path(folder) / f"{stem}.safetensors")
    ray.train.report(
        {"step": done},
        checkpoint=ray.train.Checkpoint.from_directory(folder),
        checkpoint_dir_name=run_folder.checkpoint_name(done),
        delete_local_checkpoint_after_upload=True,
    )


def _restore(task: Task, optimizer: torch.optim.Optimizer, loop: Loop) -> int:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            return load_state(task.module, optimizer, (Path(folder) / run_folder.STATE).read_bytes())
    # Without a worker group Ray Train knows of no earlier checkpoint.
    found = run_folder.latest_checkpoint(loop.run_dir) if loop.train.num_workers == 0 else None
    return load_state(task.module, optimizer, run_folder.read_state(found)) if found else 0


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, content: bytes) -> int:
    """Weights and optimizer moments of a checkpoint's state file, into a module that may be sharded. Returns its step."""
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    set_state_dict(module, optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"], options=WHOLE)
    return int(state["step"])


def _refuse_non_finite(loss: Tensor, rows: Rows, step: int) -> None:
    if not torch.isfinite(loss):
        raise InputRefused(
            f"the loss is {loss.item()} at step {step} for samples {rows[SAMPLE].tolist()}: "
            "lower optim.lr, or look at these samples; the last checkpoint is unharmed"
        )


def check_slots(train: TrainConfig) -> None:
    """Raise UsageError when the workers and a decode task do not fit, which would wait for ever.

    For the embedded instance: a cluster that scales itself may have no nodes yet.
    """
    workers = max(1, train.num_workers)
    resources = ray.cluster_resources()
    needed, there = workers * train.cpus_per_worker + 1, resources.get("CPU", 0)
    if needed > there:
        raise UsageError(
            f"train.num_workers={train.num_workers} x train.cpus_per_worker={train.cpus_per_worker} and one decode task need "
            f"{needed:g} CPUs, Ray has {there:g}: lower them, or raise ray.num_cpus"
        )
    if train.use_gpu and resources.get("GPU", 0) < workers:
        raise UsageError(f"train.use_gpu=true needs {workers} GPUs, Ray has {resources.get('GPU', 0):g}")


def _worker_error(error: Exception) -> JepaError:
    """The JepaError that a worker or a decode task raised, found through Ray's wrappers; else Retryable with the last line."""
    seen: list[BaseException] = [error, *getattr(error, "worker_failures", {}).values()]
    for candidate in seen:
        inner = unwrapped(candidate)
        if isinstance(inner, JepaError):
            return type(inner)(str(inner.args[0] if inner.args else inner))
    text = str(seen[-1]).strip().splitlines()
    return Retryable(f"training stopped: {text[-1] if text else type(error).__name__}; the same command continues it")
