"""Options of `jepa bench planning`. See config.py for the verbs that it runs.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from jepa_core.config import PlannerConfig
from pipelines.config import RayConfig, RunConfig, SimConfig
from pipelines.errors import UsageError

PRETRAIN, UNTRAINED = "pretrain", "random"
"""Values of `encoder` that are no URI."""


@dataclass(frozen=True)
class PcaConfig:
    """The baseline: a world model of principal components of frames and a small network."""

    components: int = 96
    size: int = 64
    """Pixels along the side of the frames it sees."""
    hidden: int = 256
    """Width of its two hidden layers."""
    epochs: int = 40
    lr: float = 1.0e-3
    max_frames: int = 20_000
    """Episodes beyond those that hold so many frames are left out, for memory."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be meant."""
        for name in ("components", "hidden", "epochs", "max_frames"):
            if getattr(self, name) < 1:
                raise UsageError(f"baseline.{name}={getattr(self, name)} must be at least 1")
        if self.size < 8:
            raise UsageError(f"baseline.size={self.size} must be at least 8 pixels")


@dataclass(frozen=True)
class PlanningBenchConfig:
    """jepa bench planning: record, train, and plan in closed loop, beside what needs no learning and a baseline that learns."""

    task: Literal["reach", "push", "pick", "all"] = "reach"
    encoder: str = PRETRAIN
    """pretrain: trained on the recorded videos; random: the same, untrained; or the URI of a pretraining run or model folder."""
    episodes: int = 50
    """Scenes that every agent plays."""
    steps: int = 8
    """Actions towards each goal image: reach has one, push two, pick three."""
    seed: int = 1_000_000
    """Of the scenes; far from the recorder's seeds."""
    success_distance: float = 0.05
    record: list[str] = field(default_factory=lambda: ["preset=demo"])
    """Settings of `jepa record`; push and pick are recorded with play=mixed."""
    pretrain: list[str] = field(default_factory=lambda: ["preset=demo"])
    post_train: list[str] = field(default_factory=lambda: ["preset=demo"])
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """Of the JEPA model and of the baseline alike."""
    economical: bool = True
    """The JEPA model plans the same episodes again with the planner of `jepa plan preset=economical`."""
    baseline: PcaConfig = field(default_factory=PcaConfig)
    checkpoints: int = 6
    """Checkpoints of post-training that are scored offline and in closed loop, to see whether both order them alike; 0: none."""
    checkpoint_episodes: int = 20
    sim: SimConfig = field(default_factory=SimConfig)
    require: bool = True
    """End with exit code 4 where a condition of task=reach is missed; the table says which in any case."""
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if self.episodes < 2 or self.steps < 1:
            raise UsageError("episodes must be at least 2 and steps at least 1")
        if self.checkpoints and (self.checkpoints < 3 or not 2 <= self.checkpoint_episodes <= self.episodes):
            raise UsageError(
                f"checkpoints={self.checkpoints} with checkpoint_episodes={self.checkpoint_episodes}: a rank correlation needs 3 "
                f"checkpoints or more (0 for none), of 2 to episodes={self.episodes} episodes each"
            )
        self.planner.check()
        if self.sim.camera != "left":
            raise UsageError(f"sim.camera={self.sim.camera}: training reads the left camera, so planning needs it as well")
        if self.encoder == "":
            raise UsageError(f"encoder is empty: give {PRETRAIN}, {UNTRAINED}, or the URI of a pretraining run or model folder")


TASKS = ("reach", "push", "pick")


def tasks_of(config: PlanningBenchConfig) -> tuple[str, ...]:
    """The tasks of a benchmark, in order."""
    return TASKS if config.task == "all" else (config.task,)
