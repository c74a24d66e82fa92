"""Options of the verbs that make and look after a catalog: ingest, catalog, normalise. See config.py for the others."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from pipelines.config import RayConfig
from pipelines.curation import CurationConfig
from pipelines.curation import check as check_curation
from pipelines.errors import UsageError
from pipelines.reasons import REASONS

SourceKind = Literal["auto", "prefix", "list", "tars", "lerobot", "images"]
Validate = Literal["none", "sample", "full"]
"""In rising order of what is read."""


@dataclass(frozen=True)
class LimitsConfig:
    """What one file may cost. A file beyond them is quarantined as `too_large`, `limit_memory` or `limit_time`."""

    memory_mb: int = 2048
    """Address space beyond what the reading process starts with."""
    cpu_s: int = 1200
    """CPU time; a full validation of one hour of 720p takes about 240 s."""
    idle_s: float = 60.0
    """Seconds in which the process neither asks for bytes nor uses CPU time."""
    max_pixels: int = 8192 * 8192
    max_frames: int = 20_000_000
    max_streams: int = 64
    max_index_mb: int = 256
    """Size of an MP4's `moov` box."""


@dataclass(frozen=True)
class IngestConfig:
    """jepa ingest: list a source, probe what is new, commit it to the catalog."""

    source: str = MISSING
    """A prefix (videos and WebDataset tars), a list (.csv, .parquet, .jsonl), a LeRobot v3 dataset, or a folder of images."""
    catalog: str = MISSING
    kind: SourceKind = "auto"
    suffixes: list[str] = field(
        default_factory=lambda: [".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ogv", ".ts", ".gif"]
    )
    validate: Validate = "sample"
    """none: demux only. sample: also decode a few frames at three places. full: decode every frame and digest every byte."""
    curation: CurationConfig = field(default_factory=CurationConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    retry_refused: list[str] = field(default_factory=list)
    """Reason codes whose quarantined items are tried again although unchanged: after an upgrade, or with other limits."""
    redo: bool = False
    """Read known videos again that were validated less than `validate` asks, or not curated."""
    max_refused: float = 1.0
    """Share of the new items that may be refused; above it the run ends with exit code 3, after its commits."""
    plan: bool = False
    """Ingest nothing: measure on the catalog what streaming the source costs against normalising it."""
    plan_clips_per_s: float = 100.0
    """The trainers' demand that the plan reckons with."""
    run: str | None = None
    """Name of this run, unique in the catalog; a schedule gives its window's. By default the time and a random word."""
    files_per_task: int = 64
    tasks: int = 0
    """Concurrent tasks; 0 leaves it to Ray Data."""
    commit_every: int = 4096
    """Items of one commit; a commit is also made every minute."""
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Numbers and codes that cannot be meant."""
        if self.files_per_task < 1 or self.commit_every < 1:
            raise UsageError("files_per_task and commit_every must be at least 1")
        if unknown := sorted(set(self.retry_refused) - set(REASONS)):
            raise UsageError(f"retry_refused: unknown reason {unknown[0]!r}: choose from {', '.join(REASONS)}")
        if not 0 <= self.max_refused <= 1:
            raise UsageError(f"max_refused={self.max_refused} is a share: 0 to 1")
        check_curation(self.curation)


@dataclass(frozen=True)
class CatalogConfig:
    """jepa catalog ACTION URI[@VERSION]: look at a catalog, compare, check, take out, tidy."""

    action: Literal["show", "history", "diff", "verify", "quarantine", "sample", "export", "compact", "vacuum"] = MISSING
    catalog: str = MISSING
    other: str | None = None
    """The second catalog@version of `diff`."""
    out: str | None = None
    """File that `sample` (PNG), `export` and `quarantine` (CSV or Parquet) write."""
    format: Literal["csv", "parquet"] | None = None
    """Of `out`; by its suffix where it is not given."""
    count: int = 16
    """Clips of `sample`, items of `verify`, versions of `history`; 0 is all of the latter two."""
    seed: int = 0
    retention_hours: float = 168.0
    """`vacuum` removes what no version of these last hours needs: an older version that a run has pinned can then not be read."""
    dry_run: bool = False
    """`vacuum` only counts."""


@dataclass(frozen=True)
class NormaliseConfig:
    """jepa normalise: re-encode a catalog's videos into shards that are several times cheaper to decode, and catalogue those."""

    catalog: str = MISSING
    out: str = MISSING
    """Prefix for the shards."""
    target_catalog: str | None = None
    """Where the shards are catalogued; `out`/catalog by default."""
    short_side: int = 256
    gop: int = 32
    crf: int = 23
    preset: str = "veryfast"
    """x264's, from ultrafast to veryslow."""
    shard_mb: int = 256
    ray: RayConfig = field(default_factory=RayConfig)

    def check(self) -> None:
        """Sizes that no encoder takes."""
        if self.short_side < 16 or self.short_side % 2:
            raise UsageError(f"short_side={self.short_side} must be an even number of at least 16 pixels")
        if self.gop < 1 or not 0 <= self.crf <= 51 or self.shard_mb < 1:
            raise UsageError("gop and shard_mb must be at least 1, crf must lie between 0 and 51")
