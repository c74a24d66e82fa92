"""One training clip: which frames, by the catalog's packet index; their packets, by one ranged read; their crop, into tubelets.

A clip that does not come out is tried by slower ways: without skipping frames, then through the file's container with a cache of
blocks. Every way gives the same pixels, those of a sequential decode, or the video is refused with a reason. See docs/decode.md.

Legend: T frames of a clip, S crop size in pixels, t x h x w tubelets of d frames of p x p pixels.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import av
import numpy as np

from jepa_core.config import ClipConfig
from jepa_core.sampling import Crop, clip_times, crop_box, frames_on_screen, reference_frames
from pipelines import catalog, packet_decode, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.errors import InputRefused
from pipelines.packet_index import PacketIndex, shown
from pipelines.video import SKIPPABLE_CODECS, Scaler, VideoRefused, frames_at

COLUMNS = (
    *("id", "uri", "offset", "size", "etag", "stream", "codec", "extradata", "direct", "width", "height", "rotation", "fps"),
    *("num_frames", "time_base_num", "time_base_den", "start_pts", "end_pts", "cuts"),
    *("index_pack", "index_offset", "index_directory"),
)
"""What reading a clip needs to know of a video: columns of the catalog's `videos`."""
PACKETS, PACKETS_UNSKIPPED, CONTAINER = "packets", "packets_unskipped", "container"
MERGED_GAP = 1 << 20
"""Bytes between two wanted stretches that are read with them: a store sends them sooner than it answers another request."""


class ClipInfo(NamedTuple):
    """What was read: times of the first and the last frame in the stream's time base, and the way in which they were decoded."""

    first_pts: int
    last_pts: int
    way: str


def read_clip(ref: CatalogRef, entry: dict[str, Any], clip: ClipConfig, rng: np.random.Generator, out: np.ndarray) -> ClipInfo:
    """Read a random clip of one video into `out` uint8 [t, h, w, d, p, p, 3], C-contiguous: its tubelets in raster order.

    `entry` is a row of the catalog with COLUMNS. The start and then the crop are drawn from `rng`, before anything is read.
    Raises VideoRefused when the frames cannot be had, ObjectChanged or InputRefused when the object is not the one in the catalog
    or the index is damaged, Retryable when the store does not answer.
    """
    _check_shape(out, clip.num_frames, clip.crop_size)
    start = float(rng.random())
    crop = crop_box(entry["width"], entry["height"], clip, rng)
    index, pts = clip_packets(ref, entry, clip, start)
    return _decoded(entry, index, pts, crop, out)


def read_frames(ref: CatalogRef, entry: dict[str, Any], pts: np.ndarray, crop: Crop, out: np.ndarray) -> ClipInfo:
    """Read the frames at times `pts` int64 [T], in this order and as often as they are named, into `out` as `read_clip` does.

    Raises VideoRefused("frames_missing") for a time that is no frame's, and whatever `read_clip` raises.
    """
    _check_shape(out, len(pts), out.shape[1] * out.shape[4])
    if not entry["start_pts"] <= pts.min() <= pts.max() <= entry["end_pts"]:
        raise VideoRefused("frames_missing", f"nothing is shown from {pts.min()} to {pts.max()}")
    index = catalog.packets_between(ref, entry, int(pts.min()), int(pts.max()))
    absent = np.setdiff1d(pts, shown(index))
    if len(absent):
        raise VideoRefused("frames_missing", f"{len(absent)} of {len(pts)} times are no frame's, first {absent[0]}")
    return _decoded(entry, index, pts, crop, out)


def why(error: VideoRefused | InputRefused) -> tuple[str, str]:
    """(reason, detail) of a clip that could not be read, for the row that counts it."""
    if isinstance(error, VideoRefused):
        return error.reason, error.detail
    return "changed" if isinstance(error, storage.ObjectChanged) else "vanished", str(error)


def _check_shape(out: np.ndarray, num_frames: int, size: int) -> None:
    t, h, w, d, p = out.shape[:5]
    if out.shape != (t, h, w, d, p, p, 3) or (t * d, h * p, w * p) != (num_frames, size, size):
        raise ValueError(f"out is {list(out.shape)}, which is no clip of {num_frames} x {size} x {size}")


def _decoded(entry: dict[str, Any], index: PacketIndex, pts: np.ndarray, crop: Crop, out: np.ndarray) -> ClipInfo:
    t, h, w, d, p = out.shape[:5]
    row = np.dtype(f"V{3 * p}")  # a tubelet's row of pixels is one item to copy
    by_frame = out.reshape(t, h, w, d, p, 3 * p).view(row)[..., 0].transpose(0, 3, 1, 4, 2)  # [t, d, h, p, w]
    places: dict[int, list[np.ndarray]] = {}
    for number, time in enumerate(pts.tolist()):
        places.setdefault(time, []).append(by_frame[number // d, number % d])
    scaler = Scaler(crop, h * p, entry["rotation"], (entry["width"], entry["height"]))
    for way, frames in _ways(entry, index, pts):
        try:
            for frame in frames:
                image = scaler(frame).reshape(h, p, w, 3 * p).view(row)[..., 0]
                for place in places[frame.pts]:
                    place[...] = image
        except (packet_decode.Incomplete, av.FFmpegError):
            continue
        return ClipInfo(int(pts[0]), int(pts[-1]), way)
    raise AssertionError("the last way gives every frame or raises VideoRefused")


def clip_packets(ref: CatalogRef, entry: dict[str, Any], clip: ClipConfig, u: float) -> tuple[PacketIndex, np.ndarray]:
    """The part of the packet index that one clip needs, and the presentation times of its frames int64 [T]. `u` places it."""
    seconds = entry["time_base_num"] / entry["time_base_den"]
    if clip.sampling == "reference":
        # Times are rounded to the time base, and a rate that is a little too high would be rounded up to the next number.
        span = (entry["end_pts"] - entry["start_pts"] + 1) * seconds
        numbers = reference_frames(entry["num_frames"], (entry["num_frames"] - 1) / span, clip.num_frames, clip.fps, u)
        index, first = catalog.packets_of_frames(ref, entry, int(numbers[0]), int(numbers[-1]))
        return index, shown(index)[numbers - first]
    times = clip_times(shots(entry) * seconds, clip.num_frames, clip.fps, u)
    # One unit more on each side: rounding must not lose the frame on screen at the first time, or at the last.
    begin, end = math.floor(times[0] / seconds) - 1, math.ceil(times[-1] / seconds) + 1
    index = catalog.packets_between(ref, entry, max(begin, entry["start_pts"]), end)
    pts = shown(index)
    return index, pts[frames_on_screen(pts * seconds, times)]


def shots(entry: dict[str, Any]) -> np.ndarray:
    """First and last frame of each shot, int64 [S, 2] in pts: a whole video where no cuts were looked for."""
    cuts = np.array(entry["cuts"] or [], dtype=np.int64)
    frame = round(entry["time_base_den"] / (entry["time_base_num"] * entry["fps"])) if entry["fps"] else 1
    starts = np.concatenate([[entry["start_pts"]], cuts])
    ends = np.concatenate([np.maximum(cuts - frame, starts[:-1]), [entry["end_pts"]]])
    return np.stack([starts, ends], axis=1)


def _ways(entry: dict[str, Any], index: PacketIndex, pts: np.ndarray) -> Iterator[tuple[str, Iterator[av.VideoFrame]]]:
    """The ways to decode the frames at times `pts`, fastest first."""
    wanted = set(pts.tolist())
    if entry["direct"] and entry["codec"] in packet_decode.BARE_CODECS:
        spans = packet_decode.runs(index, pts)
        parts = [(start, _read(entry, start, stop)) for start, stop in packet_decode.byte_ranges(index, spans, MERGED_GAP)]
        if entry["codec"] in SKIPPABLE_CODECS:
            yield PACKETS, packet_decode.frames(entry, index, spans, parts, wanted, skip=True)
        yield PACKETS_UNSKIPPED, packet_decode.frames(entry, index, spans, parts, wanted, skip=False)
    with storage.open_file(entry["uri"], offset=entry["offset"], size=entry["size"], etag=entry["etag"]) as file:
        yield CONTAINER, frames_at(file, entry["stream"], wanted)


def _read(entry: dict[str, Any], start: int, stop: int) -> bytes:
    """Bytes of the item. Over plain http not read twice: a flipped bit costs one clip, reading twice half of the network."""
    at = entry["offset"]
    return storage.read_range(entry["uri"], at + start, at + stop, entry["etag"], verify=False)
