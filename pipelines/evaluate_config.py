"""Options of `jepa evaluate`. See config.py for the other verbs."""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from jepa_core.config import LINEAR_GRID, AttentiveConfig, HeadGrid
from pipelines.config import RayConfig, RunConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.label_config import UNLISTED, ListFormat, list_files

PROBES = ("attentive", "linear", "knn")
MODEL = "model.json"
"""File of a model folder (pipelines.model_folder, which imports torch)."""
CONTROLS = ("random", "pixels", "frame_difference")


@dataclass(frozen=True)
class EvaluationConfig:
    """What every evaluation has."""

    model: Any = MISSING
    """URI of a pretraining run or model folder; a list of several is taken as seeds of one training."""
    seeds: int = 3
    """Of probes and of random weights; of several models, one for each."""
    concurrency: int = 2
    """Probes at a time."""
    gpus: float = 0.0
    """GPUs of a task; 0 encodes and probes on CPUs."""
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Options that cannot be meant."""
        models(self.model)
        if self.seeds < 1 or self.concurrency < 1 or self.gpus < 0:
            raise UsageError("seeds and concurrency must be at least 1, gpus not negative")

    def preflight(self) -> None:
        """What can be found wrong in a moment, before torch and Ray are imported."""
        require_models(models(self.model))


@dataclass(frozen=True)
class VideoEvaluationConfig(EvaluationConfig):
    """What every evaluation on the videos of a catalog has."""

    catalog: str = MISSING
    """URI of the catalog that holds the videos, `@version` pins one."""
    max_failed: float = 0.02
    """Share of the samples that may fail to decode."""
    max_gb: float = 64.0
    """Largest cache of features in GB; more is refused before anything is decoded."""

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        if not 0 <= self.max_failed < 1 or self.max_gb <= 0:
            raise UsageError("max_failed is a share from 0 to below 1, max_gb is above 0")


@dataclass(frozen=True)
class ViewsConfig:
    """Which clips of a video are shown to the encoder. Zeros take what the model was trained with."""

    num_frames: int = 0
    crop_size: int = 0
    fps: float = 0.0
    """Frames a second of a clip, by presentation times."""
    frame_step: int = 0
    """Instead of fps: every so many frames of the file, whatever its rate, as the published evaluations do."""
    segments: int = 1
    """Clips of a video, spread over it; their tokens are read together."""
    views: int = 1
    """Square crops along the longer side of held-out clips, whose probabilities are averaged; training sees the centre one."""

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if min(self.num_frames, self.crop_size, self.fps, self.frame_step) < 0 or min(self.segments, self.views) < 1:
            raise UsageError("clips.segments and clips.views must be at least 1, the other numbers of clips not negative")
        if self.fps and self.frame_step:
            raise UsageError(f"clips.fps={self.fps:g} and clips.frame_step={self.frame_step} say the same thing twice: give one")


@dataclass(frozen=True)
class ScratchConfig:
    """An encoder of the same shape, trained from random weights on the labels alone: what they are worth without pretraining."""

    epochs: int = 30
    lr: float = 1e-3
    weight_decay: float = 0.05
    batch_size: int = 64
    max_parameters: int = 12_000_000
    """Larger encoders are refused: the bound would cost more than the evaluation."""


@dataclass(frozen=True)
class ProbeEvaluationConfig(VideoEvaluationConfig):
    """jepa evaluate probe: classes read out of frozen features, beside random weights, pixels and frame differences."""

    labels: Any = None
    """URI of a labelled list, a list of them, or a mapping {train: URI, validation: URI, test: URI}."""
    classes: str | None = None
    """List of the classes in order (SSv2's labels.json, a text file); without it they are the labels found, sorted."""
    format: ListFormat = "auto"
    """folders takes classes from folder names, catalog the labels that the catalog holds already: neither needs `labels`."""
    max_missing: float = 0.0
    """Share of a list's rows that may name no video of the catalog."""
    whole: bool = False
    """Ignore start and stop of a list: the files are cut already."""
    validation_share: float = 0.1
    """Of the sources of train, where no validation split is given."""
    test_share: float = 0.2
    """Of the sources, where no split is given at all."""
    split_seed: int = 0
    clips: ViewsConfig = field(default_factory=ViewsConfig)
    blocks: list[int] = field(default_factory=list)
    """Encoder blocks whose normalised outputs the probes read, one after the other; none for the encoder's output."""
    probes: list[str] = field(default_factory=lambda: list(PROBES))
    """The first is the one whose confusion matrix is shown."""
    few_labels: list[float] = field(default_factory=list)
    """Shares of the training rows that the trained probes are repeated with."""
    attentive: AttentiveConfig = field(default_factory=AttentiveConfig)
    grid: HeadGrid = field(default_factory=HeadGrid)
    """Heads of the attentive probe."""
    linear: HeadGrid = LINEAR_GRID
    """Heads of the linear probe."""
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    scratch: bool = False
    """Also train an encoder from scratch on the labels."""
    from_scratch: ScratchConfig = field(default_factory=ScratchConfig)

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        list_files(self.labels)
        if self.labels is None and self.format not in UNLISTED:
            raise UsageError("labels is missing: give labels=URI, or format=folders or format=catalog")
        check_names("probes", self.probes, PROBES, least=1)
        check_names("controls", self.controls, CONTROLS)
        if not 0 <= self.max_missing < 1:
            raise UsageError(f"max_missing={self.max_missing:g} must be a share, from 0 to below 1")
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name):g} must be a share between 0 and 1")
        if any(not 0 < share < 1 for share in self.few_labels):
            raise UsageError(f"few_labels={list(self.few_labels)}: shares of the training rows lie between 0 and 1")
        if self.attentive.num_queries != 1:
            raise UsageError(f"attentive.num_queries={self.attentive.num_queries}: a probe of one label has one query")
        self.clips.check()


@dataclass(frozen=True)
class AnticipationConfig(VideoEvaluationConfig):
    """jepa evaluate anticipation: the verb, noun and action that come next (EPIC-KITCHENS-100 lists)."""

    train: str = MISSING
    """URI of the training annotations: CSV with video_id, start and stop (timestamps or seconds), verb_class, noun_class."""
    validation: str = MISSING
    """The annotations that are looked at once. The heads are chosen on videos cut from train."""
    protocol: Literal["strict", "reference"] = "strict"
    """strict: the clip ends `gap` seconds before the action starts. reference: it ends `gap` seconds before the action *stops*,
    as the released evaluation does, so it may show the action. Results carry the name and are not comparable."""
    gap: float = 1.0
    """Seconds."""
    train_gap: tuple[float, float] = (1.0, 1.0)
    """Range that the gap of a training clip is drawn from, once; (0.25, 1.75) in the reference, anew in every epoch."""
    train_point: tuple[float, float] = (0.0, 0.0)
    """reference only: share of the action's length that training clips are moved from its stop towards its start."""
    num_frames: int = 0
    crop_size: int = 0
    fps: float = 0.0
    max_missing: float = 0.0
    validation_share: float = 0.1
    """Of the training videos, to choose heads by."""
    split_seed: int = 0
    attentive: AttentiveConfig = field(default_factory=lambda: AttentiveConfig(num_queries=3))
    grid: HeadGrid = field(default_factory=lambda: HeadGrid(weight_decays=(1e-4, 1e-3, 1e-2, 1e-1), batch_size=128))
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))

    def check(self) -> None:
        """Options that cannot be meant."""
        super().check()
        check_names("controls", self.controls, CONTROLS)
        if self.gap < 0 or not 0 <= self.train_gap[0] <= self.train_gap[1]:
            raise UsageError(f"gap={self.gap:g} and train_gap={list(self.train_gap)} are seconds before the action, not negative")
        if not 0 <= self.train_point[0] <= self.train_point[1] <= 1:
            raise UsageError(f"train_point={list(self.train_point)} must be a rising range of shares")
        if self.protocol == "strict" and any(self.train_point):
            raise UsageError(
                f"train_point={list(self.train_point)} is the reference protocol's: strict clips end before the start"
            )
        if self.attentive.num_queries != 3:
            raise UsageError(f"attentive.num_queries={self.attentive.num_queries}: one query each for verb, noun and action")
        if min(self.num_frames, self.crop_size, self.fps) < 0:
            raise UsageError("num_frames, crop_size and fps must not be negative")
        if not 0 < self.validation_share < 1 or not 0 <= self.max_missing < 1:
            raise UsageError("validation_share and max_missing are shares")


def models(given: Any) -> list[str]:
    """The URIs of `model`. Raises UsageError."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else []
    if not found or not all(isinstance(uri, str) and uri for uri in found):
        raise UsageError(f"model={given}: give the URI of a run or model folder, or several as [a,b,c]")
    return found


def require_models(uris: list[str]) -> None:
    """Raises InputRefused for a URI at which there is neither a run nor a model folder, as far as their first file tells."""
    from pipelines import run_folder, storage

    for uri in uris:
        storage.check_bucket(uri)
        places = (run_folder.CONFIG, MODEL, run_folder.COMMIT)
        if not any(storage.exists(storage.join(storage.normalize(uri), name)) for name in places):
            raise InputRefused(
                f"model={uri} is no run, no checkpoint and no model folder (it holds none of {', '.join(places)}): check the URI"
            )


def check_names(option: str, given: list[str], known: tuple[str, ...], least: int = 0) -> None:
    """Raises UsageError for names that are not known, or named twice."""
    if wrong := [name for name in given if name not in known or given.count(name) > 1]:
        raise UsageError(f"{option}={list(given)}: {wrong[0]} is not one of {', '.join(known)}, each named once")
    if len(given) < least:
        raise UsageError(f"{option} is empty: choose from {', '.join(known)}")
