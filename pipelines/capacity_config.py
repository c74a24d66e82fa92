"""Options of `jepa plan-capacity`. See config.py for the other verbs."""

from dataclasses import dataclass, field

from pipelines.errors import UsageError
from pipelines.ingest_config import Validate


@dataclass(frozen=True)
class CorpusConfig:
    """The videos: how many hours, how long each, how large."""

    hours: float = 0.0
    video_minutes: float = 6.0
    """Mean length of a video."""
    gb_per_hour: float = 0.98
    """0.98 is 720p at about 2 Mbit/s."""
    validate: Validate = "sample"
    normalise: bool = False
    """Make shards once, and train from those."""


@dataclass(frozen=True)
class StageConfig:
    """One pretraining run: a preset of `jepa pretrain`, and what is changed in it."""

    preset: str = "vitl16_256_16f"
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PostStageConfig:
    """One post-training run on robot data: a preset of `jepa post-train`, and the encoder of a preset of `jepa pretrain`."""

    hours: float = 0.0
    """Of robot data that are seen; 0 leaves the stage out."""
    gb_per_hour: float = 16.0
    """DROID's raw recordings without stereo: 5.6 TB for 350 h, all cameras."""
    episode_seconds: float = 10.0
    preset: str = "droid_ac"
    overrides: list[str] = field(default_factory=list)
    encoder: StageConfig = field(default_factory=StageConfig)
    gpus: int = 0
    """0 takes those of pretraining."""
    crop_size: int = 256
    """Pixels along the side of the frames that the encoder sees."""


@dataclass(frozen=True)
class PricesConfig:
    """What you pay, in one currency. Nothing here is looked up; 0 leaves a cost out."""

    date: str = ""
    """When, and by which contract or list: printed beside every cost."""
    currency: str = "USD"
    gpu_hour: float = 0.0
    """Of one GPU with its share of the node."""
    core_hour: float = 0.0
    """Of one CPU core for ingestion and decoding."""
    million_requests: float = 0.0
    gb_month: float = 0.0
    """Of storage."""


def _stages() -> list[StageConfig]:
    return [StageConfig("vitl16_256_16f"), StageConfig("vitl16_256_64f_cooldown")]


@dataclass(frozen=True)
class CapacityConfig:
    """jepa plan-capacity: what ingestion, pretraining and post-training will take, from measured rates; or what a run took."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    stages: list[StageConfig] = field(default_factory=_stages)
    post_train: PostStageConfig = field(default_factory=PostStageConfig)
    gpus: int = 8
    gpu: str = "H100"
    """A name of jepa_core/flops.py's table of peaks, or cpu: then `gpus` counts cores."""
    ingest_cores: int = 1024
    """Cores that ingestion and normalising may use at once; as many tasks."""
    cores_per_node: int = 64
    """Of a decode node."""
    rates: str | None = None
    """YAML file of your own rates; the others are those of configs/rates.yaml."""
    prices: PricesConfig = field(default_factory=PricesConfig)
    run: str | None = None
    """A run of `jepa pretrain` or `post-train`, or a catalog: what it really took, beside what is planned for the same work."""
    out: str | None = None
    """Also write the tables there, as Markdown."""

    def check(self) -> None:
        """Numbers that cannot be meant."""
        sizes = {"corpus.hours": self.corpus.hours, "post_train.hours": self.post_train.hours}
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 0]:
            raise UsageError(f"{wrong[0]} must not be negative")
        if not self.run and not any(sizes.values()):
            raise UsageError("corpus.hours is missing: give corpus.hours=VALUE, post_train.hours=VALUE, or run=RUN")
        positive = {
            "corpus.video_minutes": self.corpus.video_minutes,
            "corpus.gb_per_hour": self.corpus.gb_per_hour,
            "post_train.episode_seconds": self.post_train.episode_seconds,
            "gpus": self.gpus,
            "ingest_cores": self.ingest_cores,
            "cores_per_node": self.cores_per_node,
        }
        if wrong := [f"{name}={value}" for name, value in positive.items() if value <= 0]:
            raise UsageError(f"{wrong[0]} must be positive")
        prices = self.prices
        amounts = (prices.gpu_hour, prices.core_hour, prices.million_requests, prices.gb_month)
        if min(amounts) < 0:
            raise UsageError("prices must not be negative")
        if max(amounts) > 0 and not prices.date:
            raise UsageError("prices.date is missing: say of which day and contract the prices are, prices.date=2026-11-23")
