"""Options of `jepa bench vidqa` and of the questions that it generates. See config.py for the other verbs.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

from dataclasses import dataclass, field

from pipelines.bench_config import LevelName
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError

KINDS = ("direction", "which", "speed", "digit")
PRETRAIN = "pretrain"
"""Value of `encoder` that is no URI."""


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions about moving digits to generate: clips of each part, one question each."""

    seed: int = 0
    level: LevelName = "tiny"
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Which questions, in turn."""
    train: int = 8000
    validation: int = 400
    """To find settings on; nothing that is reported looks at them."""
    test: int = 1600

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("train", "validation", "test"):
            if getattr(self, name) < 1:
                raise UsageError(f"questions.{name}={getattr(self, name)} must be at least 1 clip")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UsageError(f"questions.kinds={list(self.kinds)} must be some of {', '.join(KINDS)}, each once")
        if self.seed < 0:
            raise UsageError(f"questions.seed={self.seed} must not be negative")
