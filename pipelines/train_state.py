"""Everything that a training run resumes from, as one object, and its way to storage and back.

A checkpoint is a folder that each worker adds its shards to (torch's distributed checkpoint, DCP), with the weights that others
load as safetensors beside them. It counts when its COMMIT stands, which rank 0 writes last, with size and sha256 of every file.
Copying is all that training waits for; writing happens in a thread, over a process group of its own.
"""

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from jepa_core.guard import sound_step
from pipelines import checkpoint_reader, run_folder, storage
from pipelines.errors import JepaError, Retryable
from pipelines.run_folder import Checkpoint

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a run in one process needs none

STATE = "state"
"""Folder of the DCP files within a checkpoint."""


@dataclass
class Progress:
    """Where a run stands. All other numbers are functions of the step."""

    step: int = 0
    """Finished optimizer steps; also the data cursor: step s holds samples s * batch_size and on."""
    useful_s: float = 0.0
    """Seconds of computing that this history of steps took."""
    save_s: float = 0.0
    """What the last checkpoint took, from the copy to its COMMIT."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard knows of the run so far (jepa_core.guard); rank 0's counts."""


class TrainState:
    """Weights, optimizer moments and progress of one worker."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, frozen: bool = True) -> None:
        """`frozen`: parameters that require no gradient belong to it."""
        self.module, self.optimizer, self.progress = module, optimizer, Progress()
        self.options = StateDictOptions(ignore_frozen_params=not frozen)

    def tensors(self) -> dict[str, Any]:
        """What DCP saves: this worker's shards by name."""
        module, optimizer = get_state_dict(self.module, self.optimizer, options=self.options)
        return {"module": module, "optimizer": optimizer}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take weights, moments and progress of a checkpoint; it may come from any number of workers, sharded or not.

        All workers call this. Raises InputRefused where the COMMIT is damaged or the state could run code, and RuntimeError or
        ValueError for other shapes.
        """
        record = run_folder.read_commit(checkpoint)
        names = [name for name in record["files"] if name.startswith(f"{STATE}/")]
        tensors = self.tensors()
        with _LocalCopy(checkpoint.uri, names) as folder:
            checkpoint_reader.load(tensors, folder / STATE, alone=not dist.is_initialized())
        # What is left out stays as it is; everything that was asked for has been found, or the reader would have raised.
        options = replace(self.options, strict=not self.options.ignore_frozen_params)
        states = {"model_state_dict": tensors["module"], "optim_state_dict": tensors["optimizer"]}
        set_state_dict(self.module, self.optimizer, **states, options=options)
        self.progress = Progress(**record["progress"])


class _LocalCopy:
    """A folder on this node with some files of a checkpoint. One worker of a node fetches them, the others wait for it."""

    def __init__(self, uri: str, names: Sequence[str]) -> None:
        self.uri, self.names = uri, names
        self.fetches = not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"
        self.folder = Path(uri)
        self.remote = storage.is_s3(uri)
        if self.remote:
            # The port is the same for the workers of a run, and another for other runs on the node.
            meeting = os.environ["MASTER_PORT"] if dist.is_initialized() else f"alone-{os.getpid()}"
            self.folder = Path(tempfile.gettempdir()) / f"jepa-{uri.rpartition('/')[2]}-{meeting}"

    def __enter__(self) -> Path:
        if self.remote and self.fetches:
            for name in self.names:
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with storage.open_file(storage.join(self.uri, name)) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, run_folder.DIGEST_BYTES)
        _barrier()
        return self.folder

    def __exit__(self, *_: object) -> None:
        _barrier()
        if self.remote and self.fetches:
            shutil.rmtree(self.folder, ignore_errors=True)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class Saver:
    """Writes one worker's part of checkpoints in the background. All workers call `begin` and `finish` at the same steps."""

    def __init__(self, run_dir: str, keep: int, facts: Mapping[str, Any], attempt: str, group: ProcessGroup | None) -> None:
        """`facts` go into the COMMIT; `attempt` is the same on all workers and new at every start; `group` is the saver's own."""
        self.run_dir, self.keep, self.facts, self.attempt, self.group = run_dir, keep, facts, attempt, group
        self.rank = dist.get_rank() if group else 0
        self.committed = 0
        """Step of the last checkpoint that counts."""
        self.failures = 0
        """Checkpoints that could not be written since the last one that could."""
        self.error: JepaError | None = None
        self.untidy: str | None = None
        """Why old checkpoints stay, if they do."""
        self.seconds = 0.0
        """What the last checkpoint took."""
        self.blocked_s = 0.0
        """What training waited for it: the copy."""
        self.began = time.monotonic()
        """When the last one began."""
        # One thread for all checkpoints: the allocator gives each new thread another of its arenas in turn, and each would keep
        # the room of a checkpoint's buffers.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def begin(self, state: TrainState, exports: Sequence[str], before_commit: Callable[[], None]) -> None:
        """Copy the state, and write it while training goes on. `before_commit` writes what the checkpoint's history needs."""
        self.finish()
        if state.progress.step == self.committed:
            return
        self.began = began = time.monotonic()
        stager = DefaultStager(StagingOptions(False, False, False, False))
        tensors = stager.stage(state.tensors())
        stager.close()
        weights = _whole_weights(state, exports) if self.rank == 0 or _is_sharded(state.module) else {}
        progress = asdict(state.progress)
        self.blocked_s = time.monotonic() - began
        self._writing = self._writer.submit(self._save, tensors, weights, progress, before_commit, began)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any; `error` tells how it went."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _save(
        self, tensors: dict[str, Any], weights: dict[str, dict[str, Tensor]], progress: dict[str, Any],
        before_commit: Callable[[], None], began: float,
    ) -> None:  # fmt: skip
        step = progress["step"]
        uri = run_folder.checkpoint_folder(self.run_dir, step, self.attempt)
        local = Path(tempfile.mkdtemp(prefix="jepa-checkpoint-"))
        try:
            told = self._gathered(self._write(tensors, weights, local, uri, before_commit))
            if self.rank == 0:
                seconds = time.monotonic() - began
                merged = {name: entry for part in told for name, entry in part.items()}
                record = {"step": step, **self.facts, "progress": {**progress, "save_s": seconds}, "files": merged}
                run_folder.commit(uri, record)
            self.committed, self.failures, self.error, self.seconds = step, 0, None, time.monotonic() - began
            if self.rank == 0:
                self._tidy(progress)
        except Exception as error:  # noqa: BLE001, whatever it was, training must not die of it
            self.failures += 1
            self.error = Retryable(f"the checkpoint of step {step} was not written to {uri}: {_reason(error)}")
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _tidy(self, progress: dict[str, Any]) -> None:
        """Delete old checkpoints. What cannot be deleted stays, and is told; the new one stands all the same."""
        try:
            run_folder.prune_checkpoints(self.run_dir, self.keep, sound_step(progress["guard"]))
            self.untidy = None
        except JepaError as error:
            self.untidy = f"old checkpoints of {self.run_dir} were not deleted: {_reason(error)}"

    def _write(
        self, tensors: dict[str, Any], weights: dict[str, dict[str, Tensor]], local: Path, uri: str,
        before_commit: Callable[[], None],
    ) -> dict[str, Any]:  # fmt: skip
        """Files of one worker: {name: {size, sha256}}, or {"error": why there are none}."""
        dcp.save(tensors, checkpoint_id=str(local / STATE), process_group=self.group, no_dist=self.group is None)
        try:
            if self.rank == 0:
                for stem, part in weights.items():
                    save_file(part, local / f"{stem}.safetensors")
            before_commit()
            return run_folder.publish(local, uri)
        except Exception as error:  # noqa: BLE001, the others wait to hear of it
            return {"error": _reason(error)}

    def _gathered(self, files: dict[str, Any]) -> list[dict[str, Any]]:
        """All workers' files. Raises on all of them when one has failed."""
        told: list[Any] = [files]
        if self.group is not None:
            told = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(told, files, group=self.group)
        for rank, part in enumerate(told):
            if "error" in part:
                raise Retryable(f"rank {rank}: {part['error']}")
        return told


def _whole_weights(state: TrainState, exports: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Copies of the children that others load, whole and by their own names. Where they are sharded, all workers take part."""
    whole = replace(state.options, full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(state.module, options=whole)
    parts = {stem: {k.removeprefix(f"{stem}."): v for k, v in found.items() if k.startswith(f"{stem}.")} for stem in exports}
    return {stem: {key: value.clone().contiguous() for key, value in part.items()} for stem, part in parts.items()}


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__
