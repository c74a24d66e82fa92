"""Curation scores of one video from its decoded frames, near-duplicates across a catalog, and the decision: docs/curation.md.

Nothing is removed: scores and decisions are columns of the catalog. Legend: F shown frames, V videos, S hash slots of a video.

This module imports numpy alone, so that a configuration that nests CurationConfig is read at once.
"""

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pipelines.errors import UsageError

SLOTS = 8
"""Frames hashed per video: those on display at 1/16, 3/16 ... 15/16 of its time."""
TICK_S = 0.25
"""Seconds between the pictures that motion, static and black look at."""
BLACK_LUMA, BLACK_AREA = 25.5, 0.98
"""A picture is black when this share of its area has a lower luma (0 to 255): FFmpeg's blackdetect has the same two numbers."""
STATIC_LUMA = 0.5
"""Two pictures a tick apart are static when their mean absolute luma difference is below this."""
FLAT_STD = 4.0
"""A picture whose luma, averaged to 32 x 32, deviates less than this is flat: its hash would be coding noise."""
NO_HASH = 0
"""Stands for the hash of a flat picture, and matches nothing. A real hash has about 32 bits set."""

_HASH_BLOCKS, _HASH_BLOCKS_EQUAL = 5, 2
_NEIGHBOURS = 16
_PAIRS_AT_ONCE = 1 << 16
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)).astype(np.float32)
_FILTERS = ("motion", "static", "black", "duplicate")


@dataclass(frozen=True)
class CurationConfig:
    """What to measure about every video, and which scores take it out of training. Everything is off by default."""

    shots: bool = False
    """Find hard cuts with PySceneDetect's ContentDetector; needs `pip install 'jepa-pipeline[curation]'`."""
    shot_threshold: float = 27.0
    """Mean change of hue, saturation and value (0 to 255) between two frames that counts as a cut."""
    min_shot_s: float = 0.5
    """Seconds: cuts that follow each other faster are merged into one."""
    duplicates: bool = False
    """Hash frames, and keep one video of every group of near-duplicates in the catalog."""
    duplicate_distance: int = 3
    """Bits of 64 in which the hashes of two matching frames may differ."""
    motion: bool = False
    """Measure motion, the share of static time and the share of black time."""
    min_motion: float = 0.0
    """Videos with a lower motion score (0 to 255) are not kept; 0 keeps all."""
    max_static: float = 1.0
    """Videos with a larger share of static time are not kept; 1 keeps all."""
    max_black: float = 1.0
    """Videos with a larger share of black time are not kept; 1 keeps all."""

    @property
    def enabled(self) -> bool:
        """Whether any part needs decoded frames."""
        return self.shots or self.duplicates or self.motion


def check(config: CurationConfig) -> None:
    """Refuse numbers that mean nothing and parts that are not installed. Raises UsageError."""
    if config.shots and not (importlib.util.find_spec("scenedetect") and importlib.util.find_spec("cv2")):
        raise UsageError("curation.shots needs PySceneDetect: pip install 'jepa-pipeline[curation]', or set curation.shots=false")
    ranges = {
        "shot_threshold": (0.0, 255.0),
        "min_shot_s": (0.0, 3600.0),
        "duplicate_distance": (0, 16),
        "min_motion": (0.0, 255.0),
        "max_static": (0.0, 1.0),
        "max_black": (0.0, 1.0),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise UsageError(f"curation.{name} is {value}: give a number from {low} to {high}")
    filters = config.min_motion > 0 or config.max_static < 1 or config.max_black < 1
    if filters and not config.motion:
        raise UsageError("curation.min_motion, max_static and max_black need scores: set curation.motion=true")


class Survey:
    """Scores of one video, gathered while its frames pass by in presentation order.

    Times are the video's own: a picture counts for as long as it is on display, so a variable frame rate, another frame rate of
    the same footage, or a picture that stands for a minute, are measured by the clock and not by the frame.
    """

    def __init__(self, config: CurationConfig, num_frames: int, pts: np.ndarray, time_base: float) -> None:
        """`pts` int64 [F], sorted: times of the `num_frames` shown frames, in units of `time_base` seconds."""
        seconds = (pts - pts[0]) * time_base
        end = seconds[-1] * num_frames / max(1, num_frames - 1)
        self._shots = _Shots(config, int(pts[0]), time_base) if config.shots else None
        self._hashes = np.full(SLOTS, NO_HASH, dtype=np.int64) if config.duplicates else None
        self._slots: dict[int, list[int]] = {}
        self._ticks: dict[int, int] = {}
        if config.duplicates:
            # The last frame stands for a usual interval: then half the frame rate, or repeated frames left out, moves no slot.
            usual = float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0
            moments = (np.arange(SLOTS) + 0.5) / SLOTS * (seconds[-1] + usual)
            for slot, index in enumerate(np.searchsorted(seconds, moments, side="right") - 1):
                self._slots.setdefault(int(pts[index]), []).append(slot)
        if config.motion:
            # Ticks before a time; the millionth keeps one that falls on a frame with that frame despite rounding.
            before = np.ceil(np.append(seconds, end) / TICK_S - 1e-6).astype(np.int64)
            before[-1] = max(before[-1], 1)  # a still image, too, is looked at once
            count = np.diff(before)
            self._ticks = dict(zip(pts[count > 0].tolist(), count[count > 0].tolist(), strict=True))
        self._last: np.ndarray | None = None
        self._seen = self._black = self._static = 0
        self._change = 0.0

    def wants(self, pts: int) -> bool:
        """Whether `add` does anything with this frame: one that is not wanted need not be scaled."""
        return self._shots is not None or pts in self._slots or pts in self._ticks

    def add(self, pts: int, frame: np.ndarray) -> None:
        """Take the frame shown at `pts`: uint8 [h, w, 3], RGB, the same size for the whole video, long side about 256."""
        if self._shots is not None:
            self._shots.add(pts, frame)
        slots = self._slots.pop(pts, None)
        ticks = self._ticks.pop(pts, None)
        if slots is None and ticks is None:
            return
        luma = frame @ _LUMA
        if slots is not None and self._hashes is not None:
            self._hashes[slots] = frame_hash(luma)
        if ticks is not None:
            self._look(_averaged(luma, 36, 64), ticks)

    def facts(self) -> dict[str, Any]:
        """The scores so far: cuts (pts, int64), motion, black, static (floats), hashes (int64 [S]); None where not looked for.

        motion and static are None too where the video is not longer than a tick.
        """
        pairs = self._seen - 1
        return {
            "cuts": None if self._shots is None else np.array(self._shots.cuts, dtype=np.int64),
            "motion": self._change / pairs if pairs > 0 else None,
            "black": self._black / self._seen if self._seen else None,
            "static": self._static / pairs if pairs > 0 else None,
            "hashes": self._hashes,
        }

    def _look(self, luma: np.ndarray, ticks: int) -> None:
        """A picture [36, 64] that is on display for `ticks` ticks: changed at the first, at rest for the others."""
        if self._last is not None:
            change = float(np.abs(luma - self._last).mean())
            self._change += change
            self._static += change < STATIC_LUMA
        self._static += ticks - 1
        self._black += ticks * bool((luma < BLACK_LUMA).mean() >= BLACK_AREA)
        self._seen += ticks
        self._last = luma


class _Shots:
    """PySceneDetect's ContentDetector, fed with frames and their own times."""

    def __init__(self, config: CurationConfig, start: int, time_base: float) -> None:
        # Imported here: most corpora are ingested without, and the import takes a third of a second.
        import cv2
        from scenedetect import ContentDetector, FrameTimecode
        from scenedetect.common import Timecode

        cv2.setNumThreads(0)  # threads of a pool do not survive the fork that this runs in
        self.cuts: list[int] = []
        self._detector = ContentDetector(threshold=config.shot_threshold, min_scene_len=float(config.min_shot_s))
        unit = Fraction(time_base).limit_denominator(10**9)
        # The rate is a formality: the detector compares times that carry their own unit.
        self._timecode = lambda pts: FrameTimecode(Timecode(pts - start, unit), fps=30.0)
        self._start = start

    def add(self, pts: int, frame: np.ndarray) -> None:
        found = self._detector.process_frame(self._timecode(pts), np.ascontiguousarray(frame[:, :, ::-1]))
        self.cuts.extend(time.pts + self._start for time in found)


def frame_hash(luma: np.ndarray) -> int:
    """Perceptual hash (pHash) of luma [h, w], a signed 64-bit integer: which of the 8 x 8 lowest frequencies
    of 32 x 32 pixels exceed their median.

    It is NO_HASH for a flat picture.
    """
    small = _averaged(luma, 32, 32)
    if small.std() < FLAT_STD:
        return NO_HASH
    low = _COSINES @ small @ _COSINES.T
    return int(np.packbits(low > np.median(low)).view(">i8")[0])


def _averaged(luma: np.ndarray, height: int, width: int) -> np.ndarray:
    """Luma [h, w] to [height, width]: every new pixel is the mean of the area that it covers."""
    return _areas(luma.shape[0], height) @ luma @ _areas(luma.shape[1], width).T


def _areas(size: int, cells: int) -> np.ndarray:
    """Weights [cells, size]: how much of each old pixel lies in each new one."""
    edges = np.arange(cells + 1) * size / cells
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * cells / size).astype(np.float32)


def duplicate_groups(ids: Sequence[str], hashes: tuple[np.ndarray, np.ndarray], max_distance: int) -> np.ndarray:
    """Index of the video that stands for each video's group of near-duplicates: int64 [V], its own where it has none.

    `hashes` is (values int64 [K], offsets int64 [V + 1]), slot by slot. Two videos are near-duplicates when the hashes of at
    least half of the slots differ by at most `max_distance` bits; groups are what such pairs connect. The smallest id stands for
    a group, so the order of the input changes nothing.
    """
    rows = _slot_matrix(*hashes)
    needed = max(1, -(-rows.shape[1] // 2))
    hashed = np.flatnonzero((rows != NO_HASH).sum(axis=1) >= needed)
    distinct, which = _distinct(rows[hashed])
    parents = np.arange(len(distinct))
    for left, right in _candidates(distinct, needed, max_distance):
        apart = _roots(parents, left) != _roots(parents, right)
        left, right = left[apart], right[apart]
        near = _near(distinct[left], distinct[right], max_distance).sum(axis=1) >= needed
        if near.any():
            _join(parents, left[near], right[near])
    return _representatives(ids, hashed, _roots(parents, which))


def _slot_matrix(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Ragged hashes as int64 [V, S], NO_HASH where a list is shorter than the longest."""
    lengths = np.diff(offsets)
    slots = int(lengths.max(initial=1))
    if len(lengths) and (lengths == slots).all():
        return values[offsets[0] : offsets[-1]].reshape(-1, slots)
    rows = np.full((len(lengths), slots), NO_HASH, dtype=np.int64)
    rows[np.arange(slots) < lengths[:, None]] = values[offsets[0] : offsets[-1]]
    return rows


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows without repetitions, in the order of their values, and for each row the index of its equal.

    A million copies of one video cost one row, and an order by value makes what follows independent of the input's order.
    """
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    which = np.empty(len(rows), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    return ordered[new], which


def _candidates(rows: np.ndarray, needed: int, max_distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows, by index, one of whose slots matches and shares two of five blocks of bits; a pair may come several times.

    Three wrong bits spoil at most three of five blocks, and where `needed` slots match, one of the slots looked at here does: up
    to three bits every pair is found. Where more than _NEIGHBOURS rows share two blocks, each meets its next _NEIGHBOURS in the
    order of values, so that no popular picture costs more than linear time.
    """
    bits = np.uint64(len(rows).bit_length())
    mask = (np.uint64(1) << bits) - np.uint64(1)
    for slot in range(rows.shape[1] - needed + 1):
        column = np.ascontiguousarray(rows[:, slot])
        owners = np.flatnonzero(column != NO_HASH)
        for blocks in itertools.combinations(range(_HASH_BLOCKS), _HASH_BLOCKS_EQUAL):
            packed = (_key(column[owners].view(np.uint64), blocks) << bits) | owners.astype(np.uint64)
            packed.sort()
            key, owner = packed >> bits, (packed & mask).astype(np.int64)
            at = np.arange(len(key))
            for shift in range(1, _NEIGHBOURS + 1):
                at = at[: np.searchsorted(at, len(key) - shift)]
                at = at[key[at] == key[at + shift]]
                for start in range(0, len(at), _PAIRS_AT_ONCE):
                    part = at[start : start + _PAIRS_AT_ONCE]
                    left, right = owner[part], owner[part + shift]
                    near = _near(column[left], column[right], max_distance)
                    yield left[near], right[near]


def _key(column: np.ndarray, blocks: tuple[int, ...]) -> np.ndarray:
    """The bits of some blocks of each hash, side by side: at most 26 bits, beside which 38 remain for an index."""
    key = np.zeros_like(column)
    for block in blocks:
        low, high = 64 * block // _HASH_BLOCKS, 64 * (block + 1) // _HASH_BLOCKS
        key = (key << np.uint64(high - low)) | (column >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
    return key


def _near(left: np.ndarray, right: np.ndarray, max_distance: int) -> np.ndarray:
    """Which hashes are within the distance of each other: bool, shaped as they are. A missing hash is near nothing."""
    return (np.bitwise_count(left ^ right) <= max_distance) & (left != NO_HASH) & (right != NO_HASH)


def _roots(parents: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The root of each node's tree; the paths taken are shortened."""
    roots = parents[nodes]
    while (parents[roots] != roots).any():
        roots = parents[roots]
    parents[nodes] = roots
    return roots


def _join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join the trees of each pair, in place: the smallest root of those that became connected is the root of all."""
    from scipy.sparse import coo_array  # imported here: takes 0.4 s, which a catalog without duplicates need not pay
    from scipy.sparse.csgraph import connected_components

    nodes, ends = np.unique(_roots(parents, np.stack([left, right])), return_inverse=True)
    ends = ends.reshape(2, -1)
    graph = coo_array((np.ones(len(left), dtype=bool), (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
    component = connected_components(graph, directed=False)[1]
    parents[nodes] = nodes[np.unique(component, return_index=True)[1][component]]


def _representatives(ids: Sequence[str], hashed: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The index with the smallest id of each label's videos, for the `hashed` videos; others stand for themselves."""
    result = np.arange(len(ids))
    crowded = np.flatnonzero(np.bincount(labels)[labels] > 1) if len(labels) else np.empty(0, dtype=np.int64)
    best: dict[int, tuple[str, int]] = {}
    for label, index in zip(labels[crowded].tolist(), hashed[crowded].tolist(), strict=True):
        best[label] = min(best.get(label, (str(ids[index]), index)), (str(ids[index]), index))
    result[hashed[crowded]] = [best[label][1] for label in labels[crowded].tolist()]
    return result


def decide(config: CurationConfig, motion: float | None, black: float | None, static: float | None,
           duplicate_of: str | None) -> tuple[bool, str]:  # fmt: skip
    """Whether a video is kept, and the names of the filters that said no, comma separated.

    A score that was not measured (None) drops nothing. `duplicate_of` is None for the video that stands for its group.
    """
    scores = (np.array([np.nan if score is None else score]) for score in (motion, black, static))
    keep, dropped_by = decide_all(config, *scores, np.array([duplicate_of is not None]))
    return bool(keep[0]), str(dropped_by[0])


def decide_all(config: CurationConfig, motion: np.ndarray, black: np.ndarray, static: np.ndarray,
               duplicate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`decide` for columns: scores float64 [V], NaN for null, duplicate bool [V]; gives keep bool [V], dropped_by [V]."""
    says_no = (
        motion < config.min_motion,
        static > config.max_static,
        black > config.max_black,
        duplicate & config.duplicates,
    )
    code = sum(no.astype(np.int64) << bit for bit, no in enumerate(says_no))
    names = [",".join(name for bit, name in enumerate(_FILTERS) if code_ >> bit & 1) for code_ in range(1 << len(_FILTERS))]
    return code == 0, np.array(names, dtype=object)[code]
