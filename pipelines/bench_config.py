"""Options of `jepa bench` and of the video that it generates. See config.py for the other verbs."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError

LevelName = Literal["tiny", "plain", "photo"]
Split = Literal["pretrain", "train", "validation", "test"]


@dataclass(frozen=True)
class DigitsConfig:
    """Moving digits to generate: clips of each part."""

    seed: int = 0
    pretrain: int = 6000
    """Without labels."""
    train: int = 2000
    validation: int = 1000
    """Chooses the probe's regularisation."""
    test: int = 2000
    """Looked at once."""

    def __post_init__(self) -> None:
        """Refuse counts that cannot be meant."""
        for name in ("pretrain", "train", "validation", "test"):
            if getattr(self, name) < 1:
                raise UsageError(f"digits.{name}={getattr(self, name)} must be at least 1 clip")
        if self.seed < 0:
            raise UsageError(f"digits.seed={self.seed} must not be negative")


@dataclass(frozen=True)
class BenchConfig:
    """jepa bench probe: whether pretraining teaches more than its regulariser, random weights and pixels do."""

    what: Literal["probe"] = MISSING
    level: LevelName = "tiny"
    """tiny: 16 px; plain: 32 px; photo: 32 px before moving photos."""
    seeds: int = 3
    """Initial weights, order of clips and masks; the clips are the same."""
    base: str = "moving_digits_tiny"
    """Pretraining preset; sizes follow the level."""
    overrides: list[str] = field(default_factory=list)
    """Further key=value settings of pretraining."""
    steps: int = 0
    """Training steps of each run; 0 keeps the preset's."""
    supervised: bool = False
    """Also an encoder trained from scratch on the labels, as a bound."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    concurrency: int = 2
    """Runs at a time."""
    cpus_per_trial: float = 1.0
    require: bool = True
    """End with exit code 4 where a condition is missed; the table says which in any case."""
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if self.seeds < 1 or self.concurrency < 1 or self.steps < 0:
            raise UsageError("seeds and concurrency must be at least 1, steps must not be negative")
