"""Exact clips of catalog videos: frame times and a square crop, not a draw; what does not come out is counted with its reason.

Legend: R items that came out, T frames, S crop size in pixels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jepa_core.config import ClipConfig
from jepa_core.sampling import Crop
from pipelines import catalog
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_reader import COLUMNS, read_frames, why
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused


class Item(NamedTuple):
    """One clip to read: its frames, in the order in which they are shown, and one of its square crops."""

    video: str
    """Catalog id."""
    pts: np.ndarray
    """int64 [T] in the video's time base; may descend and repeat."""
    view: int = 0
    views: int = 1
    """1: the centre; V: V squares spread evenly along the longer side of the frame as displayed, ends included."""


def square_crop(width: int, height: int, view: int, views: int) -> Crop:
    """The largest square of a frame of these sizes: the centre one, or number `view` of `views` along the longer side.

    As published, but for the order: the reference (evals/video_classification_frozen, short side to the crop size, then squares)
    scales the frame and then crops, here the square is cut out and scaled, so the edges of the outer squares and offsets of less
    than a pixel differ. For one view it scales the short side to 256/224 of the crop, and shows 88 % of what is shown here.
    """
    side = min(width, height)
    share = 0.5 if views == 1 else view / (views - 1)
    return Crop(round((width - side) * share), round((height - side) * share), side, side, False)


def entries_of(ref: CatalogRef, items: Sequence[Item], clip: ClipConfig) -> pa.Table:
    """The catalog rows of the items' videos. Raises InputRefused for items of videos that the catalog does not have."""
    wrong = next((n for n, item in enumerate(items) if len(item.pts) != clip.num_frames or not 0 <= item.view < item.views), None)
    if wrong is not None:
        item = items[wrong]
        raise ValueError(f"item {wrong}: {len(item.pts)} frames, view {item.view} of {item.views}; a clip has {clip.num_frames}")
    wanted = {item.video for item in items}
    rows = catalog.read_videos(ref, COLUMNS)
    rows = rows.filter(pc.is_in(rows["id"], pa.array(sorted(wanted), pa.string())))
    absent = sorted(wanted - set(rows["id"].to_pylist()))
    if absent:
        raise InputRefused(f"{ref} does not hold {len(absent)} of {len(wanted)} videos asked for: {', '.join(absent[:5])}")
    return rows.combine_chunks()


def read_items(
    ref: CatalogRef, items: Sequence[Item], entries: Sequence[dict[str, Any]], size: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Read items in this process; `entries` are the catalog's rows of their videos, `first` the number of the first item.

    Returns the numbers of those that came out int64 [R], their frames uint8 [R, T, S, S, 3], and a row for each of the others.
    Raises Retryable where the store does not answer.
    """
    out = np.empty((len(items), len(items[0].pts), 1, 1, 1, size, size, 3), np.uint8)
    kept, failures = [], []
    for number, (item, entry) in enumerate(zip(items, entries, strict=True), first):
        try:
            crop = square_crop(entry["width"], entry["height"], item.view, item.views)
            read_frames(ref, entry, item.pts, crop, out[len(kept)])
        except (VideoRefused, InputRefused) as error:
            failures.append(failure(number, entry, *why(error)))
        else:
            kept.append(number)
    return np.array(kept, np.int64), out[: len(kept), :, 0, 0, 0], failures


def failure(item: int, entry: dict[str, Any], reason: str, detail: str) -> dict[str, Any]:
    """The row that counts an item that did not come out."""
    return {"item": item, "video": entry["id"], "uri": entry["uri"], "reason": reason, "detail": detail}
