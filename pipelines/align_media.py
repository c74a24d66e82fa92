"""What a conversation shows: which frames of a video, and where their cached tokens lie.

Legend: F frames of a video, T frames of a clip, N tokens, D width of the encoder.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jepa_core.config import ClipConfig
from jepa_core.sampling import frames_on_screen
from pipelines import evaluate_rows
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_items import Item
from pipelines.conversations import IMAGE

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # image or video
        ("video", pa.string()),  # catalog id
        ("pts", pa.list_(pa.int64())),  # frames that are shown; the centred square of each
        ("uri", pa.string()),  # cached tokens: the file, null where they are not cached
        ("offset", pa.int64()),  # and their first byte
    ]
)


def spread(pts: np.ndarray, seconds: float, num_frames: int, start: float | None = None, stop: float | None = None) -> np.ndarray:
    """Frame times int64 [T]: what is on screen at as many times, evenly from the first frame to the last, both included.

    `pts` int64 [F] ascend, `seconds` is their unit; `start` and `stop` in seconds after the first frame bound the stretch. A
    single frame is the one in the middle; of fewer frames than asked for, some are shown again.
    """
    shown = pts * seconds
    first = shown[0] + max(0.0, start or 0.0)
    last = shown[-1] if stop is None else min(shown[-1], shown[0] + stop)
    last = max(first, last)
    times = np.linspace(first, last, num_frames) if num_frames > 1 else np.array([(first + last) / 2])
    return pts[frames_on_screen(shown, times)]


def table_of(ref: CatalogRef, wanted: Sequence[tuple[str, str]], num_frames: int) -> pa.Table:
    """SCHEMA of media (kind, catalog id), in their order, without cached tokens yet."""
    times = evaluate_rows.frame_times(ref, {video for _, video in wanted})
    rows = [
        {"kind": kind, "video": video, "pts": spread(*times[video], 1 if kind == IMAGE else num_frames)} for kind, video in wanted
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def items_of(media: pa.Table, kind: str) -> tuple[list[int], list[Item]]:
    """(rows of the table, items) of one kind, as features.fill takes them."""
    rows = [row for row, one in enumerate(media["kind"].to_pylist()) if one == kind]
    return rows, [Item(media["video"][row].as_py(), media["pts"][row].values.to_numpy()) for row in rows]


def clip_of_kind(clip: ClipConfig, kind: str) -> ClipConfig:
    """How a medium of one kind is read: an image is a clip of one frame."""
    return ClipConfig(num_frames=1 if kind == IMAGE else clip.num_frames, fps=clip.fps, crop_size=clip.crop_size)


def with_tokens(media: pa.Table, found: dict[int, tuple[str, int]]) -> pa.Table:
    """The table with where the tokens of some rows lie: {row: (file, first byte)}."""
    columns: dict[str, Any] = {name: media[name] for name in ("kind", "video", "pts")}
    columns["uri"] = pa.array([found.get(row, (None, None))[0] for row in range(media.num_rows)], pa.string())
    columns["offset"] = pa.array([found.get(row, (None, None))[1] for row in range(media.num_rows)], pa.int64())
    return pa.table(columns, SCHEMA)
