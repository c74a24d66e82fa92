"""Options of the evaluations of a world model that need no robot: `jepa evaluate rollout`, `energy` and `action-score`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from jepa_core.config import PlannerConfig
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError
from pipelines.evaluate_config import models


@dataclass(frozen=True)
class OfflineConfig:
    """What all three have."""

    model: Any = MISSING
    """URI of a post-training run, or of one of its checkpoints."""
    trajectories: str | None = None
    """Catalog or folder of episodes; by default those that the run held out."""
    clips: int = 32
    seed: int = 0
    concurrency: int = 2
    gpus: float = 0.0
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Options that cannot be meant."""
        if len(models(self.model)) > 1:
            raise UsageError("model: one world model is evaluated at a time")
        if min(self.clips, self.concurrency) < 1 or self.gpus < 0:
            raise UsageError("clips and concurrency must be at least 1, gpus not negative")


@dataclass(frozen=True)
class RolloutEvaluationConfig(OfflineConfig):
    """jepa evaluate rollout: latent error against horizon, beside copying the last frame and the actions of another clip."""

    clips: int = 64
    num_frames: int = 0
    """Frames of a clip, one more than the horizon; 0 takes the model's."""
    distance: Literal["l1", "l2"] = "l1"
    shown: int = 6
    """Clips on the sheet of nearest frames."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        if self.num_frames < 0 or self.num_frames == 1 or self.shown < 1:
            raise UsageError(f"num_frames={self.num_frames} must be 0 or at least 2, shown={self.shown} at least 1")


@dataclass(frozen=True)
class EnergyConfig(OfflineConfig):
    """jepa evaluate energy: how far from the recorded action the predicted outcome is nearest to the true one."""

    points: int = 5
    """Of the grid along each of x, y and z; odd, so that its centre is one."""
    radius: float = 0.075
    """Metres from the grid's centre to its faces."""
    centre: Literal["zero", "recorded"] = "zero"
    """zero: no motion, as in the released notebook; recorded: the recorded action."""
    distance: Literal["l1", "l2"] = "l1"
    shown: int = 4
    """Clips with a picture of their landscape."""
    batch: int = 125
    """Actions whose outcome is predicted at a time."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        if self.points < 3 or not self.points % 2 or not self.radius > 0 or self.batch < 1 or self.shown < 1:
            raise UsageError("points must be odd and at least 3, radius positive, batch and shown at least 1")


@dataclass(frozen=True)
class ActionScoreConfig(OfflineConfig):
    """jepa evaluate action-score: planned against recorded actions, beside doing nothing and random actions."""

    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """`horizon` actions are planned towards the frame that many steps ahead."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        self.planner.check()
