"""MovingDigits-8: labelled video for probes, generated in seconds and encoded as H.264, so that it goes the way real video goes.

One handwritten digit drifts over a torus for 8 frames, in one of 8 directions, at a random speed, from a random place, in noise.
Where the digit is tells nothing about its direction, and no single frame does. Labels: direction (8) and digit (10). Digits are
the 1,797 real ones of scikit-learn (UCI "Optical Recognition of Handwritten Digits"), read as a file of its package; train,
validation and test show different ones, by order, so mostly also different writers.

    OUT/pretrain/*.tar    clips without labels, of the training part's digits
    OUT/probe/*.tar       train, validation and test
    OUT/labels.csv        member, split, direction, digit, instance of OUT/probe
    OUT/moving_digits.json  what was asked for; written last

Legend: T frames, S side of a frame in pixels, s side of a digit.
"""

import csv
import functools
import gzip
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.bench_config import DigitsConfig, LevelName, Split
from pipelines.errors import InputRefused, UsageError
from pipelines.video import encode_video

PACKAGE = "sklearn"
NUM_FRAMES, FPS = 8, 8.0
DIRECTIONS = 8
"""Compass points, counter-clockwise from east, as the eye sees the picture (y grows downwards)."""
INSTANCES = {"pretrain": (0, 1097), "train": (0, 1097), "validation": (1097, 1297), "test": (1297, 1797)}
"""Digits that each part shows, [first, end)."""
PHOTO_COLUMNS = {"pretrain": (0.0, 0.6), "train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
"""Share of a photo's width that each part takes its backgrounds from."""
PHOTOS = ("china.jpg", "flower.jpg")
SHRUNK = (1, 2)
"""Photos are also shown at these fractions of their size: more kinds of texture out of two pictures."""
PAN = 0.7
"""Largest motion of a photo along each axis, in pixels per frame."""
NOISE = 40.0
"""Standard deviation, in grey levels: no encoder can predict it, and one that keeps it has less room for what moves."""
CRF = 10
"""x264's quality: on noise of 8 grey levels a decoded pixel is off by 1.4 levels on average (crf 20: 4.1)."""
CLIPS_PER_TAR = 1000
LABELS, MARKER = "labels.csv", "moving_digits.json"
COLUMNS = ("member", "split", "direction", "digit", "instance")


class Level(NamedTuple):
    """How hard: size of frame and digit in pixels, range of speeds in pixels per frame, whether photos stand behind."""

    size: int
    digit: int
    speed: tuple[float, float]
    photo: bool


LEVELS: dict[str, Level] = {
    "tiny": Level(16, 8, (0.75, 1.75), False),
    "plain": Level(32, 14, (1.0, 3.0), False),
    "photo": Level(32, 14, (1.0, 3.0), True),
}


class Clip(NamedTuple):
    """One clip and what there is to know about it."""

    frames: np.ndarray
    """uint8 [T, S, S, 3]"""
    direction: int
    digit: int
    instance: int
    speed: float
    """Pixels per frame."""


def make_clip(level: LevelName, seed: int, split: Split, index: int) -> Clip:
    """Clip `index` of a part: the same arguments give the same pixels. Directions come in turn, all else is drawn."""
    rng = np.random.default_rng([seed, list(INSTANCES).index(split), index])
    size, _, speeds, _ = LEVELS[level]
    instance = int(rng.integers(*INSTANCES[split]))
    direction, speed = index % DIRECTIONS, float(rng.uniform(*speeds))
    track = rng.uniform(0, size, 2) + speed * heading(direction) * np.arange(NUM_FRAMES)[:, None]
    frames = shown(rng, level, split, ink(level, instance, track))
    return Clip(frames, direction, int(digits()[1][instance]), instance, speed)


def heading(direction: int) -> np.ndarray:
    """(y, x) of length 1 that points where DIRECTIONS says."""
    angle = 2 * np.pi * direction / DIRECTIONS
    return np.array([-np.sin(angle), np.cos(angle)])


def ink(level: LevelName, instance: int, track: np.ndarray) -> np.ndarray:
    """One digit on the torus, its upper left corner at `track` float [T, 2] of (y, x) pixels: float64 [T, S, S] in 0..1."""
    size, side, *_ = LEVELS[level]
    rows, columns = (_placed(track[:, axis], side, size) for axis in (0, 1))
    return np.einsum("tyi,ij,txj->tyx", rows, _enlarged(digits()[0][instance], side), columns)


def shown(rng: np.random.Generator, level: LevelName, split: Split, drawn: np.ndarray, noise: float | None = None) -> np.ndarray:
    """Ink [T, S, S] before a background, in noise (NOISE where none is given): uint8 [T, S, S, 3]."""
    size, _, _, photo = LEVELS[level]
    drawn = drawn[..., None]
    if photo:
        picture = 0.6 * _background(rng, size, split) + rng.uniform(70, 130) * drawn
    else:
        picture = rng.uniform(0, 40) + rng.uniform(140, 200) * drawn
    noisy = picture + (NOISE if noise is None else noise) * rng.standard_normal((NUM_FRAMES, size, size, 1))
    frames = np.broadcast_to(np.clip(noisy, 0, 255).round().astype(np.uint8), (NUM_FRAMES, size, size, 3))
    return np.ascontiguousarray(frames)


def write(level: LevelName, config: DigitsConfig, out: str, on_tar: Callable[[int], None] = lambda clips: None) -> None:
    """Generate and encode all parts below `out`, unless they are there. `on_tar` is told how many clips are done.

    Raises InputRefused where scikit-learn is not installed, UsageError when `out` holds clips of another configuration.
    """
    out, wanted = storage.normalize(out), {"level": level, **asdict(config)}
    marker = storage.join(out, MARKER)
    if storage.list_files(out, (MARKER,), missing_ok=True):
        if json.loads(storage.read_bytes(marker)) != wanted:
            raise UsageError(f"{out} holds moving digits of another configuration: choose another folder")
        return
    done, labels = 0, io.StringIO()
    table = csv.writer(labels, lineterminator="\n")
    table.writerow(COLUMNS)
    for split in INSTANCES:
        count, folder = getattr(config, split), "pretrain" if split == "pretrain" else "probe"
        for start in range(0, count, CLIPS_PER_TAR):
            data, rows = _tar(level, config.seed, split, range(start, min(start + CLIPS_PER_TAR, count)))
            storage.write_bytes(storage.join(out, folder, f"{split}-{start // CLIPS_PER_TAR:03}.tar"), data)
            if folder == "probe":
                table.writerows(rows)
            done += len(rows)
            on_tar(done)
    storage.write_bytes(storage.join(out, LABELS), labels.getvalue().encode())
    storage.write_bytes(marker, json.dumps(wanted).encode())


def _tar(level: LevelName, seed: int, split: Split, indices: range) -> tuple[bytes, list[tuple[Any, ...]]]:
    """(an uncompressed tar of these clips as MP4, their rows of COLUMNS)."""
    clips = {f"{split}-{index:06}.mp4": make_clip(level, seed, split, index) for index in indices}
    rows = [(name, split, clip.direction, clip.digit, clip.instance) for name, clip in clips.items()]
    return tar_of({name: clip.frames for name, clip in clips.items()}), rows


def tar_of(clips: Mapping[str, np.ndarray]) -> bytes:
    """An uncompressed tar of clips uint8 [T, S, S, 3] as MP4, by the names of its members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, frames in clips.items():
            data = encode_video(frames, FPS, crf=CRF)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@functools.cache
def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputRefused(
            "the digits are in the scikit-learn package, which is not installed: pip install 'jepa-pipeline[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "datasets"


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """(ink float64 [1797, 8, 8] in 0..1, classes int64 [1797])."""
    with gzip.open(_folder() / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int64)


@functools.cache
def _photo(name: str, shrunk: int) -> np.ndarray:
    """A photo at 1 / `shrunk` of its size, float64 [H, W, 3]."""
    with Image.open(_folder() / "images" / name) as image:
        return np.asarray(image.convert("RGB").reduce(shrunk), dtype=np.float64)


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """A digit [8, 8] -> [s, s], linear between the centres of its pixels."""
    old = len(image)
    places = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0, old - 1)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))
    return weights @ image @ weights.T


def _placed(starts: np.ndarray, side: int, size: int) -> np.ndarray:
    """[T, S, s]: how much of each pixel of a digit falls on each pixel of a ring, where the digit begins at `starts` [T]."""
    distance = (np.arange(size)[:, None] - np.arange(side) - starts[:, None, None]) % size
    return np.maximum(0, 1 - np.minimum(distance, size - distance))


def _background(rng: np.random.Generator, size: int, split: Split) -> np.ndarray:
    """A window that pans over the part's share of a photo: float64 [T, S, S, 3]."""
    photo = _photo(PHOTOS[rng.integers(len(PHOTOS))], SHRUNK[rng.integers(len(SHRUNK))])
    height, width = photo.shape[:2]
    left, right = (round(share * width) for share in PHOTO_COLUMNS[split])
    reach = int(PAN * (NUM_FRAMES - 1)) + 1
    start = rng.integers((reach, left + reach), (height - size - reach + 1, right - size - reach + 1))
    pan = np.floor(rng.uniform(-PAN, PAN, 2) * np.arange(NUM_FRAMES)[:, None]).astype(np.int64)
    return np.stack([photo[y : y + size, x : x + size] for y, x in start + pan])
