"""jepa ingest --plan: what training from the source costs against training from normalised shards, measured on the catalog.

Some clips are decoded, their surroundings transcoded, and the same clips decoded from the result, all in CPU time.
Videos are drawn in proportion to their duration, so plain means over the samples are means over the hours of the corpus.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jepa_core.config import ClipConfig
from jepa_core.sampling import clip_frames, crop_box
from pipelines import catalog, sandbox
from pipelines.catalog_schema import VIDEOS, CatalogRef
from pipelines.errors import InputRefused, UsageError
from pipelines.ingest_config import LimitsConfig
from pipelines.progress import Reporter
from pipelines.transcode import Settings
from pipelines.video import VideoRefused

LEAST_SECONDS = 5.0
"""Transcoded around each clip."""


@dataclass(frozen=True)
class PlanOptions:
    """What to compare. A clip is `clip_frames` frames at `fps`; an epoch shows as many as fit into the corpus side by side."""

    clips_per_s: float = 100.0
    clip_frames: int = 16
    fps: float = 4.0
    crop_size: int = 256
    epochs: float = 10.0
    samples: int = 8
    seed: int = 0
    settings: Settings = field(default_factory=Settings)

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if min(self.clips_per_s, self.clip_frames, self.fps, self.epochs, self.samples, self.crop_size) <= 0:
            raise UsageError("clips_per_s, clip_frames, fps, crop_size, epochs and samples must be positive")


@dataclass(frozen=True)
class Corpus:
    """The kept videos of a catalog."""

    videos: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Cost:
    """Means over the samples: CPU seconds and bytes of one clip, from the source and from shards, and of making shards."""

    source_clip_cpu_s: float
    source_clip_bytes: float
    clip_cpu_s: float
    clip_bytes: float
    encode_cpu_s: float
    """To normalise one second of video, decoding and scaling included."""
    bytes_per_s: float
    """Of normalised video."""


def run_plan(ref: CatalogRef, options: PlanOptions, reporter: Reporter) -> dict[str, Any]:
    """Measure, print the table and the recommendation; returns the numbers of `arithmetic`.

    Raises InputRefused when the catalog holds no kept video, or when no sampled video decodes.
    """
    options.check()
    ref = catalog.pin(ref)
    videos = catalog.read_videos(ref, ("id", "duration", "size", "num_frames"))
    corpus = Corpus(len(videos), pc.sum(videos["duration"]).as_py() or 0.0, pc.sum(videos["size"]).as_py() or 0)
    drawn = draw(videos["duration"].to_numpy(), videos["num_frames"].to_numpy(), options.samples, options.seed)
    if not len(drawn):
        raise InputRefused(f"{ref} holds no kept video of two frames: nothing to plan with")
    ids = videos["id"].take(drawn).to_pylist()
    rows = {row["id"]: row for row in catalog.read(ref, VIDEOS, None, pc.field("id").isin(sorted(set(ids)))).to_pylist()}
    reporter.start("plan", len(ids), "clips")
    costs, refused = [], []
    for number, name in enumerate(ids):
        try:
            costs.append(Cost(**_measure_item(rows[name], catalog.frame_times(ref, rows[name]), number, options)))
        except VideoRefused as refusal:
            refused.append(f"{rows[name]['uri']}: {refusal}")
        reporter.advance(number + 1, refused=len(refused))
    reporter.stop()
    if not costs:
        raise InputRefused(f"{ref}: none of {len(ids)} sampled videos decodes: {refused[0]}")
    numbers = {"catalog": str(ref), **arithmetic(corpus, mean(costs), options), "samples": len(costs), "samples_refused": refused}
    reporter.table(
        f"{numbers['hours']:.4g} h of {ref}, {len(costs)} clips measured", ("", "source", "normalised"), table(numbers)
    )
    reporter.event("recommendation", text=numbers["recommendation"])
    return numbers


def draw(durations: np.ndarray, num_frames: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Row numbers int64 [samples], drawn in proportion to duration, with replacement; none when no video has two frames."""
    weights = np.where(num_frames > 1, durations, 0.0)
    if weights.sum() <= 0:
        return np.empty(0, np.int64)
    ends = np.cumsum(weights)
    points = np.random.default_rng(seed).random(samples) * ends[-1]
    return np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)


def mean(costs: Sequence[Cost]) -> Cost:
    """The mean of each number."""
    return Cost(**{name: float(np.mean([getattr(cost, name) for cost in costs])) for name in asdict(costs[0])})


def arithmetic(corpus: Corpus, cost: Cost, options: PlanOptions) -> dict[str, Any]:
    """Core-hours, bytes, cores and the break-even, as documented in docs/normalise.md.

    An epoch has corpus seconds / clip seconds clips. `break_even_epochs` is None when shards do not make clips cheaper.
    """
    clips = corpus.seconds * options.fps / options.clip_frames
    to_make = cost.encode_cpu_s * corpus.seconds
    saved = clips * (cost.source_clip_cpu_s - cost.clip_cpu_s)
    numbers: dict[str, Any] = {
        "videos": corpus.videos,
        "hours": corpus.seconds / 3600,
        "clips_per_epoch": clips,
        "clips_per_s": options.clips_per_s,
        "epochs": options.epochs,
    }
    ways = (
        ("source", cost.source_clip_cpu_s, cost.source_clip_bytes, float(corpus.bytes), 0.0),
        ("normalised", cost.clip_cpu_s, cost.clip_bytes, cost.bytes_per_s * corpus.seconds, to_make),
    )
    for name, cpu_s, clip_bytes, stored, once in ways:
        numbers[name] = {
            "gb": stored / 1e9,
            "core_hours_to_make": once / 3600,
            "cpu_ms_per_clip": cpu_s * 1e3,
            "mb_per_clip": clip_bytes / 1e6,
            "cores": options.clips_per_s * cpu_s,
            "core_hours_per_epoch": clips * cpu_s / 3600,
            "gb_per_epoch": clips * clip_bytes / 1e9,
            "core_hours": (once + options.epochs * clips * cpu_s) / 3600,
        }
    numbers["break_even_epochs"] = to_make / saved if saved > 0 else None
    numbers["recommendation"] = recommendation(numbers)
    return numbers


def recommendation(numbers: dict[str, Any]) -> str:
    """One sentence: which way takes fewer core-hours over the epochs asked for, and the cores that each way keeps busy."""
    source, normalised, even = numbers["source"], numbers["normalised"], numbers["break_even_epochs"]
    if even is None:
        return "stream the source: a clip from normalised shards is not cheaper for this corpus"
    cheaper, dearer = ("normalise", "streaming") if even <= numbers["epochs"] else ("stream the source", "normalising")
    low, high = sorted((source["core_hours"], normalised["core_hours"]))
    return (
        f"{cheaper}: {numbers['epochs']:g} epochs take {low:.3g} core-hours against {high:.3g} by {dearer}, "
        f"break-even at {even:.2g} epochs; {numbers['clips_per_s']:g} clips/s keep {source['cores']:.3g} cores busy "
        f"from the source, {normalised['cores']:.3g} from shards"
    )


def table(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows (what, source, normalised) to print."""
    names = {
        "gb": "stored, GB",
        "core_hours_to_make": "core-hours to make",
        "cpu_ms_per_clip": "CPU ms per clip",
        "mb_per_clip": "MB fetched per clip",
        "cores": f"cores to feed {numbers['clips_per_s']:g} clips/s",
        "core_hours_per_epoch": "core-hours per epoch",
        "gb_per_epoch": "GB fetched per epoch",
        "core_hours": f"core-hours, {numbers['epochs']:g} epochs and making",
    }
    rows = [(text, *(f"{numbers[way][key]:.4g}" for way in ("source", "normalised"))) for key, text in names.items()]
    even = numbers["break_even_epochs"]
    return [*rows, ("break-even, epochs", "", "never" if even is None else f"{even:.3g}")]


def _measure_item(row: dict[str, Any], pts: np.ndarray, number: int, options: PlanOptions) -> dict[str, float]:
    """The cost of one random clip of a video, drawn as training draws it."""
    rng = np.random.default_rng((options.seed, number))
    time_base = Fraction(row["time_base_num"], row["time_base_den"])
    seconds = pts * float(time_base)
    frames = clip_frames(seconds, options.clip_frames, options.fps, float(rng.random()))
    last = np.searchsorted(seconds, max(seconds[frames[-1]], seconds[frames[0]] + LEAST_SECONDS), side="right") - 1
    crop = crop_box(row["width"], row["height"], ClipConfig(crop_size=options.crop_size), rng)
    source = sandbox.item_source(row["uri"], row["offset"], row["size"], row["etag"])
    costs, _ = sandbox.call(
        "measure",
        source,
        LimitsConfig(),
        stream=row["stream"],
        time_base=(time_base.numerator, time_base.denominator),
        width=row["width"],
        pts=pts[frames].tolist(),
        last=int(pts[last]),
        crop=tuple(crop),
        size=options.crop_size,
        **asdict(options.settings),
    )
    return costs
