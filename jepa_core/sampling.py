"""Which video, which frames, which crop: pure functions of (seed, sample number). Numpy only.

A sample number n names one training clip for ever, whatever the number of workers, nodes or restarts. Step s of a run with
global batch G holds samples s*G .. (s+1)*G-1, so resuming is a number.
"""

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jepa_core.config import ClipConfig


class Stream(IntEnum):
    """Independent random streams of one seed. Numbers are part of the data contract: never reuse one."""

    ORDER = 0
    CLIP = 1
    MASK_SIZE = 2
    MASK_POSITION = 3
    MASK_CUT = 4
    TRAJECTORY = 5
    REPLACEMENT = 6


class Crop(NamedTuple):
    """A box in pixels of the (rotated) frame, and whether to mirror it."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """A counter-based generator: the same key and counters give the same numbers on every machine."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(counters)] = counters  # word 0 counts the draws themselves
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def video_of_sample(seed: int, n: int, num_videos: int, attempt: int = 0) -> int:
    """Row of the catalog that sample n shows: each epoch is a fresh permutation of all videos.

    When a video cannot be decoded, the documented rule draws another one: `attempt` 1, 2, ... picks uniformly by
    (seed, n, attempt), so the replacement is as reproducible as the choice.
    """
    if attempt:
        return int(generator(seed, Stream.REPLACEMENT, n, attempt).integers(num_videos))
    epoch, position = divmod(n, num_videos)
    return int(_permutation(seed, epoch, num_videos)[position])


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_videos: int) -> np.ndarray:
    return generator(seed, Stream.ORDER, epoch).permutation(num_videos)


def clip_frames(pts_seconds: np.ndarray, num_frames: int, fps: float, u: float) -> np.ndarray:
    """Indices int64 [num_frames] of the frames shown nearest after start + k / fps seconds.

    `pts_seconds` [F] are the presentation times of all frames, ascending; `u` in [0, 1) places the start. Times are physical:
    variable frame rates need no special case. A video shorter than the clip repeats its last frame.
    """
    begin, end = float(pts_seconds[0]), float(pts_seconds[-1])
    room = max(0.0, (end - begin) - (num_frames - 1) / fps)
    times = begin + u * room + np.arange(num_frames) / fps
    # The frame on screen at a time is the last one whose presentation has begun; half a microsecond absorbs rounding.
    return np.clip(np.searchsorted(pts_seconds, times + 5e-7, side="right") - 1, 0, len(pts_seconds) - 1)


def crop_box(width: int, height: int, config: ClipConfig, rng: np.random.Generator) -> Crop:
    """A random resized crop, one for the whole clip (torchvision's rule: 10 tries, then the centre)."""
    flip = bool(rng.random() < 0.5) and config.flip
    for _ in range(10):
        area = width * height * rng.uniform(*config.crop_scale)
        ratio = float(np.exp(rng.uniform(*np.log(config.crop_ratio))))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h, flip)
    return centre_crop(width, height, config.crop_ratio)._replace(flip=flip)


def centre_crop(width: int, height: int, ratio: tuple[float, float] = (1.0, 1.0)) -> Crop:
    """The largest centred box whose width / height lies within `ratio`."""
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return Crop((width - w) // 2, (height - h) // 2, w, h, False)
