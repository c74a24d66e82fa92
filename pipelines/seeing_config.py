"""Options of the evaluations that need no labels, and of those that make pictures. See evaluate_config.py for the others."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from jepa_core.config import LINEAR_GRID, AttentiveConfig, DecoderConfig, HeadGrid
from pipelines.config import PretrainConfig, RayConfig, RunConfig
from pipelines.errors import UsageError
from pipelines.evaluate_config import CONTROLS, EvaluationConfig, VideoEvaluationConfig, check_names, models, require_models

ARROW, SPEED, RETRIEVAL = "arrow", "speed", "retrieval"
TASKS = (ARROW, SPEED, RETRIEVAL)
READERS = ("linear", "attentive")


@dataclass(frozen=True)
class FootageConfig:
    """Which videos and clips are shown. Zeros take what the model was trained with."""

    only: str | None = None
    """Only videos whose URI, or name within a tar, holds this text."""
    max_videos: int = 200
    """At most so many, evenly spread over the catalog; 0 for all."""
    num_frames: int = 0
    crop_size: int = 0
    fps: float = 0.0
    moments: int = 8
    """Clips of each group."""
    least_videos: int = 8
    """With fewer source videos, pieces of them take their place and the result says `within videos`."""
    pieces: int = 16
    """Most pieces of one video."""
    gap: float = 1.0
    """Least seconds between two pieces of one shot."""

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if min(self.max_videos, self.num_frames, self.crop_size, self.fps, self.gap) < 0:
            raise UsageError("footage: max_videos, num_frames, crop_size, fps and gap cannot be negative")
        if min(self.moments, self.pieces, self.least_videos) < 1:
            raise UsageError("footage: moments, pieces and least_videos must be at least 1")


@dataclass(frozen=True)
class LabelFreeConfig(VideoEvaluationConfig):
    """jepa evaluate label-free: arrow of time, playback speed and instance retrieval on real footage, beside controls."""

    footage: FootageConfig = field(default_factory=FootageConfig)
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    probes: list[str] = field(default_factory=lambda: list(READERS))
    """How arrow and speed are read out. Retrieval needs no probe."""
    speeds: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """At speed s, frames lie s / fps seconds apart."""
    folds: int = 4
    """One to test on, one to choose the head by, the others to train on; every group is tested once for each seed."""
    attentive: AttentiveConfig = field(default_factory=lambda: AttentiveConfig(depth=1))
    grid: HeadGrid = field(default_factory=lambda: HeadGrid((3e-3, 1e-3, 3e-4), (0.01, 0.4), batch_size=64, warmup_epochs=1))
    """Heads of the attentive probe."""
    linear: HeadGrid = LINEAR_GRID
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    seeds: int = 3
    """Of folds, probes and random weights; of several models, one for each."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        self.footage.check()
        check_names("tasks", self.tasks, TASKS, least=1)
        check_names("probes", self.probes, READERS, least=1)
        check_names("controls", self.controls, CONTROLS)
        if len(self.speeds) < 2 or any(not speed > 0 for speed in self.speeds) or len(set(self.speeds)) < len(self.speeds):
            raise UsageError(f"speeds={list(self.speeds)}: give at least two different ones, above 0")
        if self.folds < 3:
            raise UsageError(f"folds={self.folds}: one to test on, one to choose by and one to train on make 3")
        if self.attentive.num_queries != 1:
            raise UsageError(f"attentive.num_queries={self.attentive.num_queries}: a probe of one label has one query")


@dataclass(frozen=True)
class RobotEvaluationConfig(EvaluationConfig):
    """jepa evaluate robot: where things are, read out of frozen features of a robot's frames by ridge regression."""

    trajectories: str = MISSING
    """DROID-raw folder, as `jepa record` writes it."""
    episodes: int = 0
    """At most so many, in order of URI; 0 for all. The last quarter is held out."""
    frames_per_episode: int = 12
    crop_size: int = 0
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    seeds: int = 3
    """Of random weights; of several models, one for each."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        check_names("controls", self.controls, CONTROLS)
        if self.frames_per_episode < 2 or min(self.episodes, self.crop_size) < 0:
            raise UsageError("frames_per_episode must be at least 2, episodes and crop_size not negative")


@dataclass(frozen=True)
class DecodeConfig(VideoEvaluationConfig):
    """jepa evaluate decode: pixels painted from frozen features by a small decoder, which shows what they keep."""

    footage: FootageConfig = field(default_factory=FootageConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    held_out: float = 0.25
    """Share of the groups that the decoder is not trained on."""
    seeds: int = 1
    """Of decoders and random weights; of several models, one for each."""
    shown: int = 6
    """Held-out clips on the contact sheet."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        self.footage.check()
        try:
            self.decoder.check()
        except ValueError as error:
            raise UsageError(f"decoder: {error}") from error
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out={self.held_out:g} must be a share between 0 and 1")
        if self.shown < 1:
            raise UsageError("shown must be at least 1")


@dataclass(frozen=True)
class FeaturePicturesConfig:
    """jepa evaluate features: the three main directions of features as colours, over real footage, as films and strips."""

    model: Any = MISSING
    catalog: str = MISSING
    footage: FootageConfig = field(default_factory=lambda: FootageConfig(max_videos=6, moments=4))
    """`moments`: clips of a video that follow one another."""
    side: int = 256
    """Pixels of a film's picture; even."""
    gpus: float = 0.0
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Options that cannot be meant."""
        if len(models(self.model)) > 1:
            raise UsageError("model: pictures are of one model")
        self.footage.check()
        if self.side < 32 or self.side % 2 or self.gpus < 0:
            raise UsageError(f"side={self.side} must be even and at least 32, gpus not negative")

    def preflight(self) -> None:
        """As of the other evaluations."""
        require_models(models(self.model))


@dataclass(frozen=True)
class MaskPicturesConfig(PretrainConfig):
    """jepa evaluate masks: what a pretraining preset (any of them) hides of real clips, before anything is trained."""

    clips: int = 6
    """Clips on the sheet, of each clip length."""
    measured_steps: int = 20
    """Steps whose masks are drawn for the effective ratios."""

    def check(self) -> None:
        """As a pretraining is checked."""
        super().check()
        if min(self.clips, self.measured_steps) < 1:
            raise UsageError("clips and measured_steps must be at least 1")
