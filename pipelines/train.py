"""One training loop for both stages, on Ray Train, fed by Ray Data. This is the driver's part; train_worker.py is the workers'.

A stage brings a `Task` (module, loss, exports) and a dataset of microbatches; the loop brings steps, learning rate, mixed
precision, DDP, FSDP2, metrics, checkpoints and exact resume.
"""

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines import run_folder, storage
from pipelines.config import TrainConfig
from pipelines.errors import InputRefused, JepaError, Retryable, UsageError, last_line, unwrapped
from pipelines.presets import to_yaml
from pipelines.progress import Reporter
from pipelines.relay import WARNING, Relay
from pipelines.trackers import open_trackers
from pipelines.train_worker import Loop, train_worker

COLLECTIVE_TIMEOUT_S = 300
RAY_FOLDER = "ray"
RESTARTS = 1000
"""Of the workers, with or without progress: so that an image that cannot even start ends some day."""

MakeDataset = Callable[[int, int], ray.data.Dataset]
"""(first step, fillers) -> the microbatches that remain: see units.dataset."""


def fit(loop: Loop, make_dataset: MakeDataset, stage: str, reporter: Reporter, config: Any) -> None:
    """Train to `train.steps`, continuing from the newest sound checkpoint.

    Ray Train asks for the dataset again at every start of the workers, so it begins where the checkpoints did *then*. SIGTERM
    makes the run save and end with Retryable. Raises the workers' own JepaError, or Retryable.
    """
    train = loop.train
    loop = replace(loop, facts=facts(loop, config))
    tree = run_folder.as_tree(config)
    trackers = open_trackers(train.trackers, tree, loop.run_dir, lambda text: reporter.event("warning", message=text))

    def show(line: dict[str, Any]) -> None:
        if WARNING in line:
            reporter.event("warning", message=line[WARNING])
            return
        reporter.training(line)
        trackers.log(line)

    relay = Relay(show)
    loop = replace(loop, sink=relay.sink)
    reporter.start(stage, train.steps, "steps")
    status = "failed"
    try:
        with relay, _stopping(relay.sink):
            while "rolled_back" in (ending := _trained(loop, make_dataset)):
                reporter.event("warning", message=ending["rolled_back"])
                ray.get(relay.sink.rolled_back.remote())
        status = "stopped" if "stopped" in ending else "failed" if ending.keys() & {"refused", "failed"} else "finished"
    finally:
        trackers.finish(status)
        reporter.stop()
    if "refused" in ending:
        raise InputRefused(ending["refused"])
    if "failed" in ending:
        raise Retryable(f"{ending['failed']}; the same command continues from the last checkpoint")
    if "stopped" in ending:
        raise Retryable(f"{ending['stopped']} after step {ending['step']}, which is saved: the same command continues there")


def facts(loop: Loop, config: Any) -> dict[str, Any]:
    """What every COMMIT tells about a run beside its step: enough to say which samples made these weights, and by which code."""
    return {
        **loop.facts,
        "cursor": {"batch_size": loop.train.batch_size, "microbatches": loop.train.microbatches, "seed": loop.seed},
        "config_hash": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:16],
        "code_version": run_folder.code_version(),
    }


def _trained(loop: Loop, make_dataset: MakeDataset) -> dict[str, Any]:
    """Run the workers. Returns how rank 0 ended."""
    train = loop.train
    workers = max(1, train.num_workers)

    def remaining() -> ray.data.Dataset:
        found = run_folder.latest_checkpoint(loop.run_dir)  # the workers have checked it by now
        return make_dataset(found.step if found else 0, workers - 1)

    filesystem, path = storage.arrow_filesystem(storage.join(loop.run_dir, RAY_FOLDER))
    elastic = train.min_workers and train.min_workers < train.num_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"loop": loop},
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(train.min_workers, train.num_workers) if elastic else train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": 1} if train.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=path,
            storage_filesystem=filesystem,
            # The workers themselves count starts without progress; Ray's count would end a month's run at its fourth lost node.
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS, controller_failure_limit=train.max_failures),
        ),
        datasets={"train": remaining},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )
    try:
        return trainer.fit().return_value
    except JepaError:
        raise
    except Exception as error:
        raise _worker_error(error) from error


@contextlib.contextmanager
def _stopping(sink: Any) -> Iterator[None]:
    """SIGTERM asks the workers to save and end, where this is the process's main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sink.stop.remote())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_slots(train: TrainConfig) -> None:
    """Raise UsageError when the workers and a decode task do not fit, which would wait for ever.

    For the embedded instance: a cluster that scales itself may have no nodes yet.
    """
    workers = max(1, train.min_workers or train.num_workers)
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
    return Retryable(f"training stopped: {last_line(seen[-1])}; the same command continues it")
