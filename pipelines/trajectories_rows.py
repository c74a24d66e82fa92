"""Rows of the table `trajectories` from what the readers give: frames matched to states, times checked, statistics.

Legend: F frames of an episode, P shown frames of a video.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pipelines import packet_index, sandbox, storage
from pipelines.catalog_schema import CURRENT
from pipelines.ingest_config import LimitsConfig
from pipelines.robot.mapping import deltas, statistics
from pipelines.robot.recording import MAX_LENGTH_DIFFERENCE, Item, Recording, Refused
from pipelines.robot.refusals import EpisodeRefused
from pipelines.trajectories_schema import row_id
from pipelines.video import VideoRefused

KEPT_PROBES = 16
"""Videos of many episodes are probed once, not once for each of them."""


class Probed(NamedTuple):
    """What is needed to know of a video."""

    stream: int
    width: int
    height: int
    pts: np.ndarray
    """int64 [P], ascending."""
    seconds: float
    """Of one unit of `pts`."""

    @property
    def fps(self) -> float:
        """The header's rate: frames come at even times there."""
        return (len(self.pts) - 1) / ((self.pts[-1] - self.pts[0]) * self.seconds) if len(self.pts) > 1 else 0.0


def rows_of(item: Item, found: Iterable[Recording | Refused], layout: str, time_base: str) -> list[dict[str, Any]]:
    """All rows of one item, columns of TRAJECTORY_SCHEMA less those of the ingest run."""
    rows = [_row(recording, time_base) for recording in found]
    for row in rows:
        row["layout"], row["time_base"], row["status"] = layout, time_base, CURRENT
        row["item"], row["fingerprint"], row["item_rows"] = item.uri, item.fingerprint, len(rows)
        row["id"] = row_id(item.uri, item.fingerprint, row["uri"], row["camera"])
    return rows


def _row(found: Recording | Refused, time_base: str) -> dict[str, Any]:
    facts = {name: getattr(found, name) for name in ("uri", "episode", "camera", "robot", "task", "success")}
    if isinstance(found, Refused):
        return facts | {"reason": found.refusal.reason, "detail": found.refusal.detail}
    try:
        return facts | _usable(found, time_base)
    except EpisodeRefused as refusal:
        return facts | {"reason": refusal.reason, "detail": refusal.detail, "video_uri": found.video_uri}


def _usable(found: Recording, time_base: str) -> dict[str, Any]:
    if found.places is not None:
        count = _common(len(found.states), len(found.places), "JPEGs")
        steps, pts, fps = np.arange(count), found.places[:count, 0], 0.0
        video = {"stream": 0, "width": found.size[0], "height": found.size[1], "sizes": found.places[:count, 1].astype(np.int32)}
    else:
        probed = _probed(found.video_uri, found.etag)
        steps, pictures = _matched(found, probed)
        pts, fps = probed.pts[pictures], probed.fps
        video = {"stream": probed.stream, "width": probed.width, "height": probed.height}
    times = _times(found, steps, time_base, fps)
    states = found.states[steps]
    return {
        **video,
        "video_uri": found.video_uri,
        "etag": found.etag,
        "pts": pts,
        "times": times,
        "states": states.ravel(),
        "num_frames": len(steps),
        "seconds_per_frame": float(np.median(np.diff(times))),
        "state_statistics": statistics(states),
        "action_statistics": statistics(deltas(states)),
    }


def _matched(found: Recording, probed: Probed) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the steps, and of their pictures in the video: int64 [F] each."""
    if found.video_times is None:
        count = _common(len(found.states), len(probed.pts), "video frames")
        return np.arange(count), np.arange(count)
    shown = (probed.pts - probed.pts[0]) * probed.seconds
    after = np.clip(np.searchsorted(shown, found.video_times), 1, max(1, len(shown) - 1))
    before = after - 1
    after = np.minimum(after, len(shown) - 1)
    nearest = np.where(found.video_times - shown[before] <= shown[after] - found.video_times, before, after)
    good = np.abs(shown[nearest] - found.video_times) <= 0.5 / found.fps + 1e-6
    good[1:] &= np.diff(nearest) > 0  # two steps cannot have one picture
    count = len(good) if good.all() else int(np.argmin(good))
    if len(good) - count > MAX_LENGTH_DIFFERENCE or not count:
        worst = float(np.abs(shown[nearest] - found.video_times).max())
        told = f"{int((~good).sum())} of {len(good)} steps have no picture of their own within half a frame of their time"
        raise EpisodeRefused("bad_timestamps", f"{told}, the worst is {worst:.3f} s off")
    _common(count, count, "pictures")
    return np.arange(count), nearest[:count]


def _common(states: int, pictures: int, what: str) -> int:
    """Steps that have both a state and a picture, by number."""
    if abs(states - pictures) > MAX_LENGTH_DIFFERENCE:
        raise EpisodeRefused("length_mismatch", f"{states} states, {pictures} {what}")
    if min(states, pictures) < 2:
        raise EpisodeRefused("too_short", f"{min(states, pictures)} steps: an action needs two")
    return min(states, pictures)


def _times(found: Recording, steps: np.ndarray, time_base: str, fps: float) -> np.ndarray:
    """Seconds from the first frame, float64 [F]."""
    if time_base == "header":
        if not fps:
            raise EpisodeRefused("bad_time_base", "no container whose header says a rate: ingest it with time_base=physical")
        return np.arange(len(steps)) / fps
    if found.times is None or len(found.times) < len(steps):
        raise EpisodeRefused("bad_time_base", f"no recorded time for each of {len(steps)} frames")
    times = found.times[steps]
    if not np.isfinite(times).all():
        raise EpisodeRefused("bad_time_base", f"the time of frame {int(np.argmin(np.isfinite(times)))} is no number")
    if (np.diff(times) <= 0).any():
        raise EpisodeRefused("bad_time_base", f"times do not increase at frame {int(np.argmax(np.diff(times) <= 0)) + 1}")
    return times - times[0]


def _probed(uri: str, etag: str) -> Probed:
    try:
        return _probe(uri, etag)
    except VideoRefused as refusal:
        raise EpisodeRefused("unreadable_video", f"{uri}: {refusal}") from refusal


@functools.lru_cache(KEPT_PROBES)
def _probe(uri: str, etag: str) -> Probed:
    info = storage.stat_many([uri])[uri]
    if info is None:
        raise VideoRefused("missing", f"{uri} does not exist")
    facts, _ = sandbox.probe(sandbox.item_source(uri, 0, info.size, info.etag), LimitsConfig())
    pts = packet_index.shown(packet_index.decode(facts["blob"], facts["index_directory"]))
    return Probed(facts["stream"], facts["width"], facts["height"], pts, facts["time_base_num"] / facts["time_base_den"])
