"""What every reader of episodes gives: one camera's view of an episode, or why there is none.

Legend: F steps of an episode.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipelines.robot.refusals import EpisodeRefused
from pipelines.trajectories_config import MappingConfig

MAX_LENGTH_DIFFERENCE = 2
"""States and pictures may differ by one or two: DROID's MP4s end a frame before their HDF5 does (droid#54)."""


@dataclass(frozen=True)
class Recording:
    """One camera of one episode, before its video is looked into."""

    uri: str
    """Names the episode: its folder, or the file or dataset that holds it with `#` and its place."""
    episode: str
    """Name that its source gives it: DROID's uuid, or a number."""
    camera: str
    states: np.ndarray
    """float64 [F, 7]: xyz metres, extrinsic xyz Euler radians, gripper closedness."""
    video_uri: str
    etag: str
    times: np.ndarray | None = None
    """Physical seconds of each step, float64 [F]; None where there are none."""
    video_times: np.ndarray | None = None
    """Seconds in the video at which each step's picture is shown, float64 [F]; None: step k has picture k."""
    fps: float = 0.0
    """Nominal steps per second, where `video_times` follow from it."""
    places: np.ndarray | None = None
    """int64 [F, 2]: first byte and size of each step's JPEG in `video_uri`, which is no video then."""
    size: tuple[int, int] | None = None
    """(width, height) of those JPEGs."""
    robot: str = ""
    task: str = ""
    success: bool | None = None


class Refused(NamedTuple):
    """An episode (camera "") or one of its cameras that cannot be used."""

    uri: str
    episode: str
    camera: str
    refusal: EpisodeRefused
    robot: str = ""
    task: str = ""
    success: bool | None = None


class Item(NamedTuple):
    """A piece of a source that is read in one go: an episode folder, a shard, a file of a dataset."""

    uri: str
    fingerprint: str
    """Of its bytes, by the listing: another one means that it is to be read again."""
    payload: dict[str, Any]
    """What the reader wants to know; JSON."""


class Reading(NamedTuple):
    """How items are read."""

    time_base: str
    mapping: MappingConfig
    rlds_hz: float


Reader = Callable[[Item, Reading], Iterator[Recording | Refused]]
