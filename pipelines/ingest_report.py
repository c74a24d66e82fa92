"""What an ingest brought, in numbers: counts by reason, codec, container and size class; what moved since the run before;
Prometheus counters.

A report is a dictionary that JSON can hold. `report` makes it from rows of `videos` and `quarantine`, of one run or of a whole
catalog, batch by batch; the run's report is kept in the column `report` of the table `runs`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.catalog_schema import CURRENT, REPLACED, VANISHED

VIDEO_COLUMNS = ("status", "keep", "size", "duration", "codec", "container", "width", "height", "fps")
QUARANTINE_COLUMNS = ("status", "reason")

RESOLUTION_EDGES = (240, 360, 480, 720, 1080, 2160)
"""Shorter side as displayed, pixels. A class holds its lower edge and not its upper one."""
FPS_EDGES = (12, 23, 26, 31, 61)
"""Frames per second: the classes between hold 24 and 25, 30, 50 and 60."""
DURATION_EDGES = (1, 10, 60, 600, 3600)
"""Seconds."""
CLASSES = {
    "resolution": ("<240p", "240-359p", "360-479p", "480-719p", "720-1079p", "1080-2159p", ">=2160p"),
    "fps": ("<12", "12-23", "23-26", "26-31", "31-61", ">=61"),
    "duration": ("<1 s", "1-10 s", "10-60 s", "1-10 min", "10-60 min", ">=1 h"),
}
UNKNOWN = "unknown"
NAMES = ("codec", "container")
DISTRIBUTIONS = (*NAMES, *CLASSES, "reasons")

PSI_MODERATE, PSI_LARGE = 0.1, 0.25
"""Population stability index: below 0.1 is read as stable, above 0.25 as another population."""
REFUSED_JUMP = 0.02
"""Rise of the refused share of items that is reported, where chance does not explain it."""
CHANCE_Z = 3.0
"""Standard errors beyond which a difference between two runs is not chance."""

ITEMS_COUNTER = "jepa_ingest_items"
"""Ray serves it as `ray_jepa_ingest_items_total{reason="..."}`."""
ACCEPTED = "accepted"


def report(videos: Iterable[pa.RecordBatch], quarantine: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    """Counts over rows with VIDEO_COLUMNS and QUARANTINE_COLUMNS, in the memory of one batch.

    `videos` counts rows by status (`kept` are current rows that training reads); everything else is about current rows.
    """
    status: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {name: Counter() for name in DISTRIBUTIONS}
    kept = size = 0
    seconds = kept_seconds = 0.0
    for batch in videos:
        status.update(_named(batch["status"]))
        rows = batch.filter(pc.equal(batch["status"], CURRENT))
        durations, keep = rows["duration"], pc.fill_null(rows["keep"], False)
        size += pc.sum(rows["size"]).as_py() or 0
        seconds += pc.sum(durations).as_py() or 0.0
        kept += pc.sum(keep).as_py() or 0
        kept_seconds += pc.sum(durations.filter(keep)).as_py() or 0.0
        for name in NAMES:
            counts[name].update(_named(rows[name]))
        shorter = pc.min_element_wise(rows["width"], rows["height"])
        counts["resolution"].update(_classed("resolution", shorter, RESOLUTION_EDGES))
        counts["fps"].update(_classed("fps", rows["fps"], FPS_EDGES))
        counts["duration"].update(_classed("duration", durations, DURATION_EDGES))
    for batch in quarantine:
        counts["reasons"].update(_named(batch.filter(pc.equal(batch["status"], CURRENT))["reason"]))
    return {
        "videos": {CURRENT: status[CURRENT], "kept": kept, REPLACED: status[REPLACED], VANISHED: status[VANISHED]},
        "quarantined": counts["reasons"].total(),
        "hours": seconds / 3600,
        "kept_hours": kept_seconds / 3600,
        "bytes": size,
        **{name: _ordered(name, found) for name, found in counts.items()},
    }


def drift(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What moved between two reports: a row per distribution, and one for the refused share of items.

    `level` is "none", "moderate" (population stability index over 0.1) or "large" (over 0.25), and "none" whenever samples of
    these two sizes from one population differ as much by chance. `new` are codecs, containers or reasons not seen before.
    A report without videos or refusals compares with nothing: the list is empty.
    """
    if not _items(now) or not _items(before):
        return []
    rows = [_shift(name, now[name], before[name]) for name in DISTRIBUTIONS if now[name] and before[name]]
    share, earlier = now["quarantined"] / _items(now), before["quarantined"] / _items(before)
    pooled = (now["quarantined"] + before["quarantined"]) / (_items(now) + _items(before))
    error = math.sqrt(pooled * (1 - pooled) * (1 / _items(now) + 1 / _items(before)))
    jump = share - earlier > max(REFUSED_JUMP, CHANCE_Z * error)
    level = "large" if jump else "none"
    new = sorted(set(now["reasons"]) - set(before["reasons"]))
    refused = {
        "distribution": "refused",
        "level": level,
        "psi": None,
        "value": "share",
        "share": share,
        "before": earlier,
        "new": new,
    }
    return [*rows, refused]


def metrics(report: Mapping[str, Any]) -> None:
    """Add a report to the Prometheus counter that Ray serves on every node's metrics port; needs an open Ray session.

    Call it once for each committed batch with that batch's report: a counter only grows.
    """
    from ray.util.metrics import Counter as RayCounter

    counter = RayCounter(ITEMS_COUNTER, "Items that jepa ingest has handled, by reason of refusal or accepted.", ("reason",))
    for reason, count in {ACCEPTED: report["videos"][CURRENT], **report["reasons"]}.items():
        if count:  # Ray refuses to add nothing
            counter.inc(count, {"reason": reason})


def _items(report: Mapping[str, Any]) -> int:
    return report["videos"][CURRENT] + report["quarantined"]


def _named(column: pa.Array) -> dict[str, int]:
    found = pc.value_counts(column)
    names, counts = found.field(0).to_pylist(), found.field(1).to_pylist()
    return {UNKNOWN if name is None else str(name): count for name, count in zip(names, counts, strict=True)}


def _classed(name: str, column: pa.Array, edges: tuple[float, ...]) -> dict[str, int]:
    values = pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy(zero_copy_only=False)
    unknown = len(edges) + 1
    codes = np.where(np.isnan(values), unknown, np.searchsorted(edges, values, side="right"))
    counts = np.bincount(codes, minlength=unknown + 1).tolist()
    return dict(zip((*CLASSES[name], UNKNOWN), counts, strict=True))


def _ordered(name: str, counts: Counter[str]) -> dict[str, int]:
    """Classes in their order, names by falling count; without those that do not occur."""
    keys = (*CLASSES[name], UNKNOWN) if name in CLASSES else sorted(counts, key=lambda key: (-counts[key], key))
    return {key: counts[key] for key in keys if counts[key]}


def _shift(name: str, now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, Any]:
    values = sorted({*now, *before})
    new, old = (np.array([counts.get(value, 0) for value in values], dtype=np.float64) for counts in (now, before))
    shares, earlier = new / new.sum(), old / old.sum()
    # Half an item in every class: the logarithm of an empty class has no value.
    p, q = (new + 0.5) / (new + 0.5).sum(), (old + 0.5) / (old + 0.5).sum()
    psi = float(((p - q) * np.log(p / q)).sum())
    # Of two samples of one population the index is about (1/n + 1/m) times a chi-squared of K - 1 degrees of freedom.
    freedom = max(1, len(values) - 1)
    chance = (1 / new.sum() + 1 / old.sum()) * (freedom + CHANCE_Z * math.sqrt(2 * freedom))
    level = "none" if psi <= max(PSI_MODERATE, chance) else "moderate" if psi <= PSI_LARGE else "large"
    most = int(np.argmax(np.abs(shares - earlier)))
    appeared = [value for value in values if not before.get(value)] if name not in CLASSES else []
    return {"distribution": name, "level": level, "psi": psi, "value": values[most], "share": float(shares[most]),
            "before": float(earlier[most]), "new": appeared}  # fmt: skip
