"""Options of `jepa bench vidqa` and of the questions that it generates. See config.py for the other verbs.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

from dataclasses import dataclass, field

from pipelines.bench_config import LevelName
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import UsageError
from pipelines.evaluate_config import check_names

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
    train_kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """The same of the training part, where some may come more often."""
    digits: list[int] = field(default_factory=lambda: list(range(10)))
    """Which digits are shown."""
    noise: float = 10.0
    """Deviation in grey levels. At moving_digits' own 40, a training of minutes does not read digits: see docs/vidqa.md."""
    train: int = 8000
    validation: int = 400
    """To find settings on. The preset's own were found on test clips of the default seed: docs/vidqa.md."""
    test: int = 1600

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("train", "validation", "test"):
            if getattr(self, name) < 1:
                raise UsageError(f"questions.{name}={getattr(self, name)} must be at least 1 clip")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UsageError(f"questions.kinds={list(self.kinds)} must be some of {', '.join(KINDS)}, each once")
        if set(self.train_kinds) != set(self.kinds):
            raise UsageError(
                f"questions.train_kinds={list(self.train_kinds)} must be the same questions as kinds, in any numbers"
            )
        if len(self.digits) < 2 or sorted(set(self.digits) & set(range(10))) != list(self.digits):
            raise UsageError(f"questions.digits={list(self.digits)} must be two or more of 0 to 9, ascending")
        if self.seed < 0 or self.noise < 0:
            raise UsageError(f"questions.seed={self.seed} and noise={self.noise:g} must not be negative")


@dataclass(frozen=True)
class VidQABenchConfig:
    """jepa bench vidqa: does the language model see? Questions about moving digits, beside words alone and shuffled frames."""

    encoder: str = PRETRAIN
    """pretrain: trained on the questions' own clips, for each seed; or the URI of a pretraining run or model folder, for all."""
    seeds: int = 3
    """Initial weights and order of the samples; the clips are the same."""
    pretrain: list[str] = field(default_factory=lambda: ["preset=moving_digits_tiny", "probe.every=0"])
    align: list[str] = field(default_factory=lambda: ["preset=moving_digits_tiny"])
    """Settings of the two trainings."""
    methods: list[str] = field(default_factory=lambda: ["likelihood", "letter"])
    lettered: float = 0.25
    """Share of the training samples that ask with lettered options."""
    control: bool = True
    """Also train everything on an encoder with random weights."""
    categories: list[str] = field(default_factory=lambda: ["direction", "which"])
    """Questions that must be answered `least` above both controls."""
    least: float = 20.0
    """Points, of the mean over seeds."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    require: bool = True
    """End with exit code 4 where a condition is missed; the table says which in any case."""
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Options that cannot be meant."""
        if self.seeds < 1 or not 0 <= self.lettered < 1:
            raise UsageError("seeds must be at least 1, lettered a share below 1")
        check_names("methods", self.methods, ("likelihood", "letter"), least=1)
        unknown = [name for name in self.categories if name not in self.questions.kinds]
        if unknown:
            raise UsageError(f"categories: {unknown[0]} is none of questions.kinds={list(self.questions.kinds)}")
