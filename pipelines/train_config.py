"""Options of the training loop that both stages share: steps, workers, checkpoints, the guard, and how data reach the workers.

Imports neither torch nor ray, like config.py, which hands these on.
"""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from jepa_core.config import GuardConfig
from pipelines.errors import UsageError

TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch and workers of a training run."""

    steps: int = MISSING
    stop_at: int = 0
    """End after so many steps, with a checkpoint, to go on some other time: schedules are those of `steps`. 0 is their end."""
    batch_size: int = 8
    """Samples of a step, over all workers."""
    microbatches: int = 0
    """Equal parts that every step is made of, whatever the number of workers: each is decoded, masked and computed as one. A
    worker that has several accumulates their gradients. 0 makes one for each worker of the run's first start."""
    num_workers: int = 1
    """Ray Train workers. 0 trains in the calling process, without a worker group."""
    min_workers: int = 0
    """Elastic when above 0: the run goes on with as many workers as there is room for, from here to num_workers."""
    cpus_per_worker: float = 1.0
    use_gpu: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several workers: each holds the whole model, or a shard of weights, moments and target encoder (FSDP2)."""
    deterministic: Literal["none", "canonical"] = "none"
    """canonical: gradients of the microbatches are added in their order, one after another, so that on CPUs losses and weights
    are the same bits for any number of workers. Costs a broadcast of all gradients for each microbatch; ddp only."""
    compile: bool = False
    """torch.compile the transformer blocks; the first step takes a minute longer and needs a C++ compiler on CPUs."""
    checkpoint_every: int = 0
    """Steps. 0 saves by the clock, at sqrt(2 x measured cost of saving x mttf_hours): Young's optimum."""
    mttf_hours: float = 24.0
    """Mean time between failures of the whole run; by Llama 3's public log some 50,000 GPU-hours divided by the GPUs."""
    keep_checkpoints: int = 2
    log_every: int = 10
    max_failures: int = 3
    """Restarts of the workers without a new checkpoint in between, before the run gives up."""
    peak_tflops: float = 0.0
    """Of one worker's device, dense, in the training precision: MFU is told relative to it. 0 asks the device."""
    trackers: list[str] = field(default_factory=list)
    """Where metrics go besides the run folder: tensorboard, wandb, mlflow."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done when the features collapse. Only pretraining moves its targets: in other stages it has nothing to watch."""

    @property
    def end(self) -> int:
        """The step after which this start of the run ends."""
        return min(self.stop_at or self.steps, self.steps)

    def logs(self, step: int) -> bool:
        """Whether a line of metrics follows after so many finished steps."""
        return step % self.log_every == 0 or step in (self.steps, self.end)


@dataclass(frozen=True)
class DataConfig:
    """How Ray Data feeds the workers."""

    decode_tasks: int = 0
    """Concurrent decode tasks; 0 leaves it to Ray Data."""
    decode_on: Literal["auto", "anywhere", "labelled"] = "auto"
    """auto: on nodes with Ray's label role=decode when there are such, else anywhere; labelled: only there, waiting for them."""
    max_replacements: int = 3
    """Further videos tried for one sample before the run stops; each failure is a row in the run's quarantine."""
    rows_in_memory: int = 1_000_000
    """A catalog with more videos is not held in memory: its rows are written below the run in the order of each epoch."""

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        if min(self.decode_tasks, self.max_replacements, self.rows_in_memory) < 0:
            raise UsageError("data.decode_tasks, data.max_replacements and data.rows_in_memory must not be negative")


def check_train(train: TrainConfig) -> None:
    """Raise UsageError for numbers that do not fit together."""
    if train.steps < 1:
        raise UsageError(f"train.steps={train.steps} must be at least 1")
    workers = max(1, train.num_workers)
    parts, name = (train.microbatches, "microbatches") if train.microbatches else (workers, "num_workers")
    if train.batch_size < 1 or train.batch_size % parts:
        raise UsageError(f"train.batch_size={train.batch_size} must be a positive multiple of train.{name}={parts}")
    if workers > parts:
        raise UsageError(f"train.num_workers={workers} leaves workers without any of the train.microbatches={parts} of a step")
    if train.min_workers > train.num_workers:
        raise UsageError(f"train.min_workers={train.min_workers} is above train.num_workers={train.num_workers}")
    if train.deterministic == "canonical" and train.parallel == "fsdp":
        raise UsageError("train.deterministic=canonical adds whole gradients: use train.parallel=ddp")
    if (
        train.stop_at < 0
        or train.checkpoint_every < 0
        or train.log_every < 1
        or train.keep_checkpoints < 1
        or train.mttf_hours <= 0
    ):
        raise UsageError(
            "train.stop_at and checkpoint_every must not be negative, log_every, keep_checkpoints and mttf_hours be positive"
        )
    if unknown := set(train.trackers) - set(TRACKERS):
        raise UsageError(f"train.trackers names {min(unknown)!r}: choose from {', '.join(TRACKERS)}")
    guard = train.guard
    if guard.warmup < 1 or guard.patience < 1 or guard.max_rollbacks < 0 or not 0 < guard.rollback_lr_scale <= 1:
        raise UsageError(
            "train.guard.warmup and patience must be at least 1, max_rollbacks not negative, rollback_lr_scale within 0..1"
        )
