"""From samples to clips and back: which frames stand for a labelled video, and the rows of features that a probe reads.

Legend: R rows, V views, G clips (segments) of a row, T frames, N tokens, D feature width.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jepa_core.config import ClipConfig
from jepa_core.readout import Rows, Splits
from jepa_core.sampling import frames_on_screen, segment_frames, segment_times
from pipelines import catalog, label_lists, label_match, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_reader import COLUMNS
from pipelines.errors import InputRefused
from pipelines.evaluate_config import ProbeEvaluationConfig, ViewsConfig
from pipelines.features import Features, Item
from pipelines.label_config import list_files
from pipelines.label_match import Labelled, Sample

READERS = 16
"""Packet indices that are read at a time."""
CHUNK = 256
OUTSIDE = "outside"
"""Reason of a sample whose stretch of the video shows no frame."""


class Plan(NamedTuple):
    """The clips of a list: `rows[split]` are item numbers int64 [R, V, G], `labels[split]` int64 [R]."""

    items: list[Item]
    rows: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    samples: dict[str, list[Sample]]
    failures: list[dict[str, Any]]
    count: int
    """Items, also where `items` was emptied to travel."""


def labelled(config: ProbeEvaluationConfig, ref: CatalogRef) -> Labelled:
    """Read the lists and match them. Raises InputRefused as label_lists and label_match do."""
    where = str(config.labels or config.format)
    columns = (*label_match.COLUMNS, "label")
    videos = catalog.read_videos(ref, columns).to_pylist()
    if config.format == "folders":
        rows = label_lists.from_folders([label_match.path_of(video) for video in videos])
    elif config.format == "catalog":
        rows = [label_lists.Label(label_match.path_of(video), video["label"]) for video in videos if video["label"]]
        if not rows:
            raise InputRefused(f"{ref} holds no labels: ingest a list that has some, or give labels=URI")
    else:
        rows = []
        for split, uri in list_files(config.labels):
            rows += label_lists.parse(storage.read_bytes(uri), uri, config.format, split)
    classes = label_lists.class_names(storage.read_bytes(config.classes), config.classes) if config.classes else ()
    return label_match.build(
        rows,
        videos,
        where,
        classes=classes,
        max_missing=config.max_missing,
        validation_share=config.validation_share,
        test_share=config.test_share,
        seed=config.split_seed,
        whole=config.whole,
    )


def segment_pts(pts: np.ndarray, seconds: float, views: ViewsConfig, clip: ClipConfig, sample: Sample) -> np.ndarray | None:
    """Frame times int64 [G, T] of the clips that stand for a sample; None where its stretch shows no frame.

    `pts` int64 [F] are the times of all frames of the video, `seconds` their unit.
    """
    shown = pts * seconds
    first = shown[0] + (sample.start or 0.0)
    last = shown[-1] if sample.stop is None else shown[0] + sample.stop
    begin, end = np.searchsorted(shown, first - 1e-6), np.searchsorted(shown, last + 1e-6)
    inside, times = pts[begin:end], shown[begin:end]
    if not len(inside):
        return None
    if views.frame_step:
        return inside[segment_frames(len(inside), clip.num_frames, views.frame_step, views.segments)]
    wanted = segment_times(times[0], times[-1], clip.num_frames, clip.fps, views.segments)
    return inside[frames_on_screen(times, wanted)]


def frame_times(ref: CatalogRef, videos: set[str]) -> dict[str, tuple[np.ndarray, float]]:
    """By catalog id: times of all frames int64 [F], and their unit in seconds."""
    table = catalog.read_videos(ref, (*COLUMNS, "index_size"))
    entries = table.filter(pc.is_in(table["id"], pa.array(sorted(videos), pa.string()))).to_pylist()
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda entry: catalog.frame_times(ref, entry), entries)
        return {
            entry["id"]: (pts, entry["time_base_num"] / entry["time_base_den"]) for entry, pts in zip(entries, found, strict=True)
        }


def plan(ref: CatalogRef, samples: Sequence[Sample], views: ViewsConfig, clip: ClipConfig) -> Plan:
    """The clips of all samples: G segments each, held-out ones in V views."""
    times = frame_times(ref, {sample.video for sample in samples})
    items, failures = [], []
    rows: dict[str, list[np.ndarray]] = {split: [] for split in label_lists.SPLITS}
    kept: dict[str, list[Sample]] = {split: [] for split in label_lists.SPLITS}
    for sample in samples:
        clips = segment_pts(*times[sample.video], views, clip, sample)
        if clips is None:
            detail = f"no frame from {sample.start} to {sample.stop} s: set whole=true where files are cut already"
            failures.append({"video": sample.video, "name": sample.name, "reason": OUTSIDE, "detail": detail})
            continue
        count = 1 if sample.split == label_lists.TRAIN else views.views
        rows[sample.split].append(len(items) + np.arange(count * len(clips)).reshape(count, len(clips)))
        items += [Item(sample.video, pts, view, count) for view in range(count) for pts in clips]
        kept[sample.split].append(sample)
    return Plan(
        items,
        {split: np.stack(found) if found else np.empty((0, 1, 1), np.int64) for split, found in rows.items()},
        {split: np.array([sample.label for sample in found], np.int64) for split, found in kept.items()},
        kept,
        failures,
        len(items),
    )


def without(plan: Plan, found: Features, max_failed: float, where: str) -> Plan:
    """The plan's rows of which every clip came out. Raises InputRefused, with names, where more than `max_failed` did not."""
    came = np.zeros(plan.count, bool)
    came[found.kept] = True
    total = sum(len(rows) for rows in plan.rows.values()) + len(plan.failures)
    whole = {split: came[rows].all(axis=(1, 2)) for split, rows in plan.rows.items()}
    reasons = {row["video"]: row for row in reversed(found.failures)}
    lost = [s for split, kept in whole.items() for s, k in zip(plan.samples[split], kept, strict=True) if not k]
    told = ("reason", "detail")
    failures = [
        *plan.failures,
        *({"video": s.video, "name": s.name} | {key: reasons[s.video][key] for key in told} for s in lost),
    ]
    gone = total - sum(int(kept.sum()) for kept in whole.values())
    if gone > max_failed * total:
        names = label_match.few([f"{row['name']} ({row['reason']})" for row in failures])
        raise InputRefused(f"{where}: {gone} of {total} samples do not decode, more than max_failed={max_failed:g}: {names}")
    return Plan(
        plan.items,
        {split: rows[whole[split]] for split, rows in plan.rows.items()},
        {split: labels[whole[split]] for split, labels in plan.labels.items()},
        {split: [s for s, k in zip(found, whole[split], strict=True) if k] for split, found in plan.samples.items()},
        failures,
        plan.count,
    )


def splits_of(plan: Plan, found: Features, x: Tensor, names: Sequence[str], pool: str) -> Splits:
    """Rows of features for the probes of jepa_core.readout.

    `x` are those of the items in `found.kept`, [K, D] or [K, N, D]. `pool` joins the clips of a row: "tokens" one after the
    other, "mean" to their mean over clips and tokens, "flat" as well and over views (k-NN takes one feature a row).
    """
    place = np.full(plan.count, -1)
    place[found.kept] = np.arange(len(found.kept))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "tokens": lambda part: part.flatten(2, 3),
        "mean": lambda part: _means(part),
        "flat": lambda part: _means(part).mean(1, keepdim=True),
    }
    parts = []
    for split in label_lists.SPLITS:
        rows = place[plan.rows[split]]
        chunks = [ways[pool](x[torch.from_numpy(rows[start : start + CHUNK])]) for start in range(0, len(rows), CHUNK)]
        joined = torch.cat(chunks) if chunks else torch.empty(0)
        joined = joined.squeeze(1) if joined.ndim > 1 and joined.shape[1] == 1 else joined
        parts.append(Rows(joined, torch.from_numpy(plan.labels[split])))
    return Splits(*parts, names)


def _means(part: Tensor) -> Tensor:
    """[R, V, G, D] or [R, V, G, N, D] -> float32 [R, V, D]."""
    part = part.float()
    return part.mean(2) if part.ndim == 4 else part.mean((2, 3))
