"""Options of `jepa evaluate vidqa` and `jepa ask`. See config.py for the other verbs.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from pipelines.errors import InputRefused, UsageError
from pipelines.evaluate_config import VideoEvaluationConfig, check_names

FORMATS = ("table", "perception_test", "mvbench", "tempcompass", "tvbench")
FormatName = Literal["table", "perception_test", "mvbench", "tempcompass", "tvbench"]
LIKELIHOOD, LETTER, OPEN = METHODS = ("likelihood", "letter", "open")


@dataclass(frozen=True)
class VideoQuestionsConfig(VideoEvaluationConfig):
    """jepa evaluate vidqa: questions about videos, beside the same model blind and before shuffled frames."""

    questions: str = MISSING
    """URI of a file of questions, or of the folder that holds several."""
    format: FormatName = "table"
    """table: rows of video, question, answer and maybe id, options, category, start, end."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """likelihood and letter are for questions with options, open is for those without."""
    categories: list[str] = field(default_factory=list)
    """Ask these alone; none for all."""
    max_missing: float = 0.0
    """Share of the questions whose video the catalog may lack."""
    max_bad: float = 0.02
    """Share of the rows that may be no question that can be asked."""
    normalise: bool = False
    """Compare likelihoods of options by token, for options of very different lengths."""
    max_new_tokens: int = 16
    """Of a generated answer."""
    shuffle_seed: int = 0
    chunk: int = 128
    """Questions of a unit of work: what a killed evaluation repeats at most."""
    batch: int = 16
    """Questions that a model is asked at a time."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        check_names("methods", self.methods, METHODS, least=1)
        if not 0 <= self.max_missing < 1 or not 0 <= self.max_bad < 1:
            raise UsageError("max_missing and max_bad are shares from 0 to below 1")
        if min(self.max_new_tokens, self.chunk, self.batch) < 1 or self.shuffle_seed < 0:
            raise UsageError("max_new_tokens, chunk and batch must be at least 1, shuffle_seed not negative")


@dataclass(frozen=True)
class AskConfig:
    """jepa ask: one question about one video or picture, answered on the terminal."""

    model: str = MISSING
    """URI of a run of jepa align, or of one of its checkpoints."""
    video: str = MISSING
    question: str = MISSING
    options: list[str] = field(default_factory=list)
    """Also compare how likely these answers are."""
    frames: str | None = None
    """Write the frames that were looked at here, as a PNG."""
    blind: bool = False
    """Also answer without the video: what words alone give."""
    start: float | None = None
    """Seconds after the first frame."""
    end: float | None = None
    max_new_tokens: int = 32
    device: Literal["cpu", "cuda"] = "cpu"

    def check(self) -> None:
        """Options that cannot be meant."""
        if self.max_new_tokens < 1 or (self.start or 0) < 0 or (self.end is not None and self.end <= (self.start or 0)):
            raise UsageError("max_new_tokens must be at least 1, start not negative, end after start")
        if not self.question.strip():
            raise UsageError("question is empty: jepa ask RUN VIDEO 'QUESTION'")

    def preflight(self) -> None:
        """What can be found wrong in a moment, before torch is imported."""
        if "://" not in self.video and not os.path.isfile(self.video):
            raise InputRefused(f"{self.video} is no file: give the path of a video")
