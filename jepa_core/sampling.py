"""Which frames, which crop: pure functions of (seed, sample number). Numpy only. Which video, jepa_core.order decides.

A sample number n names one training clip for ever, whatever the number of workers, nodes or restarts. Step s of a run with
global batch G holds samples s*G .. (s+1)*G-1, so resuming is a number.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from jepa_core.config import ClipConfig

_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_PHILOX_KEY_STEPS = np.arange(10, dtype=np.uint32)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint32)


class Stream(IntEnum):
    """Independent random streams of one seed. Numbers are part of the data contract: never reuse one."""

    ORDER = 0
    CLIP = 1
    MASK_SIZE = 2
    MASK_POSITION = 3
    MASK_CUT = 4
    TRAJECTORY = 5
    REPLACEMENT = 6
    PROBE = 7


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


def random_words(
    seed: int, stream: Stream | np.ndarray, index: int, samples: Sequence[int], first: int, count: int
) -> np.ndarray:
    """Random 64-bit words for many samples at once: uint64 [len(samples), 2 * count]. Numbers `first` to `first + count` of each.

    One call replaces a `generator` for each sample, which takes some 10 us to make. Philox4x32-10 turns a counter of four 32-bit
    words into four random ones. Counter: (number of the draw; stream + 256 * index; sample, low word; sample, high word). Key:
    the seed's two words. So all seeds and samples below 2**64, indices below 2**24 and draws below 2**32 are distinguished.
    `stream` may also be one for each row: [len(samples), 1].
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**24):
        raise ValueError(f"seed {seed} must be in [0, 2**64) and index {index} in [0, 2**24)")
    rows = np.asarray(samples, dtype=np.uint64)[:, None]
    counter = np.empty((4, len(rows), count), dtype=np.uint32)
    counter[0] = np.arange(first, first + count)
    counter[1] = stream + 256 * index
    counter[2] = rows & np.uint64(0xFFFFFFFF)
    counter[3] = rows >> np.uint64(32)
    words = philox(counter.reshape(4, -1), np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    return words.view("<u8").reshape(len(rows), 2 * count)


def unit_interval(words: np.ndarray) -> np.ndarray:
    """Random words uint64 as uniform numbers in [0, 1) with 53 random bits: float64 of the same shape."""
    return (words >> np.uint64(11)) * 2.0**-53


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: counters uint32 [4, n] under a key uint32 [2] -> random words uint32, little-endian, [n, 4].

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; tested with the vectors of its Random123 library.
    """
    multiplied, added = counter[0::2].copy(), counter[1::2]
    # Both products of a round at once. High and low halves are views of them, the pair swapped; a round still needs the low
    # halves of the one before, hence two buffers.
    products = np.empty((2, *multiplied.shape), dtype="<u8")
    halves = [(p, p.view("<u4")[::-1, 1::2], p.view("<u4")[::-1, 0::2]) for p in products]
    for number, round_key in enumerate(key[:, None] + _PHILOX_KEY_STEPS):
        product, high, low = halves[number % 2]
        np.multiply(multiplied, _PHILOX_MULTIPLIERS, out=product)
        np.bitwise_xor(high, added, out=multiplied)
        multiplied ^= round_key
        added = low
    words = np.empty((counter.shape[1], 4), dtype="<u4")
    words[:, 0::2], words[:, 1::2] = multiplied.T, added.T
    return words


def splitmix(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Words at some places of the SplitMix64 stream of each key: uint64 [n], uint64 [m] -> random words uint64 [n, m].

    A fifth of Philox's work, for bits in bulk. The words of one key all differ, so they can be keys in their turn. Source:
    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = keys[:, None] + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def clip_frames(pts_seconds: np.ndarray, num_frames: int, fps: float, u: float) -> np.ndarray:
    """Indices int64 [num_frames] of the frames shown nearest after start + k / fps seconds.

    `pts_seconds` [F] are the presentation times of all frames, ascending; `u` in [0, 1) places the start. Times are physical:
    variable frame rates need no special case. A video shorter than the clip repeats its last frame.
    """
    return frames_on_screen(pts_seconds, clip_times(np.array([[pts_seconds[0], pts_seconds[-1]]]), num_frames, fps, u))


def clip_times(shots: np.ndarray, num_frames: int, fps: float, u: float) -> np.ndarray:
    """Times float64 [num_frames] in seconds of a clip that lies within one shot.

    `shots` [S, 2] are the times of each shot's first and last frame. `u` in [0, 1) places the start evenly over all places where
    the whole clip fits into a shot. Where it fits nowhere, it begins with the longest shot and repeats its last frame.
    """
    rooms = np.maximum(0.0, (shots[:, 1] - shots[:, 0]) - (num_frames - 1) / fps)
    if rooms.any():
        ends = np.cumsum(rooms)
        place = u * ends[-1]
        shot = min(int(np.searchsorted(ends, place, side="right")), len(shots) - 1)
        start = shots[shot, 0] + place - (ends[shot] - rooms[shot])
    else:
        shot = int(np.argmax(shots[:, 1] - shots[:, 0]))
        start = shots[shot, 0]
    return np.minimum(start + np.arange(num_frames) / fps, shots[shot, 1])


def frames_on_screen(pts_seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the frame that is shown at each time: int64, the shape of `times`. `pts_seconds` [F] ascend.

    It is the last frame whose presentation has begun; half a microsecond absorbs rounding.
    """
    return np.clip(np.searchsorted(pts_seconds, times + 5e-7, side="right") - 1, 0, len(pts_seconds) - 1)


def reference_frames(count: int, average_fps: float, num_frames: int, fps: float, u: float) -> np.ndarray:
    """Frame numbers int64 [num_frames] of one clip as V-JEPA 2 samples a video of `count` frames.

    The step is the average rate, rounded up, over `fps`, rounded down. Numbers are spread over num_frames * step frames with both
    ends included, so a clip is slower than `fps`; where it would not fit, they run over the whole video and its last frame is
    repeated. `u` in [0, 1) places the window; as there, it never reaches the last frame. A rate below `fps`, which the reference
    refuses, gives every frame. Source: facebookresearch/vjepa2, src/datasets/video_dataset.py, loadvideo_decord.
    """
    step = max(1, int(math.ceil(average_fps) // fps))
    span = num_frames * step
    if count > span:
        start = int(u * (count - span))
        return np.clip(np.linspace(start, start + span, num_frames), start, start + span - 1).astype(np.int64)
    places = np.linspace(0, count, count // step)
    return np.clip(np.concatenate([places, np.full(num_frames - len(places), count)]), 0, count - 1).astype(np.int64)


def segment_times(first: float, last: float, num_frames: int, fps: float, segments: int) -> np.ndarray:
    """Times float64 [segments, num_frames] in seconds of the clips that stand for a whole video, whose frames run from `first` to
    `last`: one in the middle of each of as many equal parts. Where a part is too short the clips overlap, spread evenly from the
    first frame to the last; a video shorter than a clip repeats its last frame.
    """
    span, part = (num_frames - 1) / fps, (last - first) / segments
    if part >= span:
        starts = first + part * np.arange(segments) + (part - span) / 2
    else:
        starts = first + np.linspace(0.0, max(0.0, last - first - span), segments)
    return np.minimum(starts[:, None] + np.arange(num_frames) / fps, last)


def segment_frames(count: int, num_frames: int, step: int, segments: int) -> np.ndarray:
    """Frame numbers int64 [segments, num_frames] of the clips that stand for a whole video of `count` frames, as published.

    Source: facebookresearch/vjepa2, src/datasets/video_dataset.py, loadvideo_decord with overlap allowed. There a clip is placed
    at random in its part, in validation too; here in the middle. Numbers are spread over num_frames * step frames with both ends
    included, so a clip is a little slower than its step.
    """
    clip, part = num_frames * step, count // segments
    if part > clip:
        start = (part - clip) // 2
        numbers = np.clip(np.linspace(start, start + clip, num_frames), start, start + clip - 1)
        apart = part
    else:
        length = min(clip, count) - 1
        places = np.linspace(0, length, length // step)
        numbers = np.clip(np.concatenate([places, np.full(num_frames - len(places), length)]), 0, max(0, length - 1))
        apart = (count - clip) // (segments - 1) if count > clip else 0
    return numbers.astype(np.int64) + apart * np.arange(segments)[:, None]


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
