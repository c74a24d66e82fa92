"""Probe tasks without labels: which frames to show, and what is to be told from them. Arithmetic on frame times; numpy only.

All rows of one video show the same moment, so what is seen in them, and how it was coded, says nothing about the label.

Legend: F frames of the video, T frames of a clip, K classes, S shots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jepa_core.sampling import Stream, clip_times, frames_on_screen, generator

DIRECTIONS = ("forward", "reversed")


class Questions(NamedTuple):
    """Frames to decode, int64 [K, T], in the order in which they are to be shown, and the label of each row, int64 [K]."""

    frames: np.ndarray
    labels: np.ndarray


def arrow_of_time(
    pts_seconds: np.ndarray, num_frames: int, fps: float, seed: int, item: int, shots: np.ndarray | None = None
) -> Questions:
    """One clip forward (label 0) and the same frames backward (label 1): int64 [2, T].

    `pts_seconds` [F] are the times of all frames, ascending; `shots` [S, 2] the times of each shot's first and last frame, the
    whole video if None. The place is a function of (seed, item). Raises ValueError where no shot holds a whole clip, or where
    a frame would be shown twice: the place of a still frame would give the direction away.
    """
    frames = _frames(pts_seconds, _times(pts_seconds, shots, num_frames, fps, seed, item))
    return Questions(np.stack([frames, frames[::-1]]), np.arange(2))


def playback_speed(
    pts_seconds: np.ndarray,
    num_frames: int,
    fps: float,
    seed: int,
    item: int,
    shots: np.ndarray | None = None,
    speeds: Sequence[float] = (1.0, 2.0, 4.0),
) -> Questions:
    """Clips of T frames around the same moment, one at each speed: int64 [K, T], label k is speeds[k].

    At speed s the frames lie s / fps seconds apart. Arguments and errors as for arrow_of_time: the clip at the highest speed must
    fit into a shot, and at the lowest no frame may be shown twice.
    """
    widest = _times(pts_seconds, shots, num_frames, fps / max(speeds), seed, item)
    middle = (widest[0] + widest[-1]) / 2
    offsets = (np.arange(num_frames) - (num_frames - 1) / 2) / fps
    return Questions(np.stack([_frames(pts_seconds, middle + speed * offsets) for speed in speeds]), np.arange(len(speeds)))


def _times(pts_seconds: np.ndarray, shots: np.ndarray | None, num_frames: int, fps: float, seed: int, item: int) -> np.ndarray:
    if shots is None:
        shots = np.array([[pts_seconds[0], pts_seconds[-1]]])
    needed, longest = (num_frames - 1) / fps, float((shots[:, 1] - shots[:, 0]).max())
    if longest < needed:
        raise ValueError(f"a clip of {num_frames} frames at {fps:g} fps lasts {needed:.2f} s, the longest shot {longest:.2f} s")
    return clip_times(shots, num_frames, fps, generator(seed, Stream.PROBE, item).random())


def _frames(pts_seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    frames = frames_on_screen(pts_seconds, times)
    if (np.diff(frames) <= 0).any():
        step = (times[-1] - times[0]) / max(1, len(times) - 1)
        raise ValueError(f"frames {step:.3f} s apart repeat: the video does not have one for each of {len(times)} times")
    return frames
