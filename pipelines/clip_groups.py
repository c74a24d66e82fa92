"""Footage that is kept apart: whole source videos, or, where there are too few, pieces of their shots with a gap between.

What a probe is tested on must not be what it was trained on. A group is the unit of that: its clips never stand in two splits,
and intervals are taken over groups. No torch, no Ray.

Legend: F frames of a video, T frames of a clip, K folds.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from jepa_core.sampling import frames_on_screen
from pipelines import catalog
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_reader import COLUMNS, shots
from pipelines.errors import InputRefused

BETWEEN, WITHIN = "between videos", "within videos"
EXTRA = ("index_size", "member", "digest", "duplicate_of")


class Footage(NamedTuple):
    """One video: times of its frames int64 [F], their unit in seconds, its shots float64 [S, 2] in seconds."""

    video: str
    name: str
    """Of this video alone."""
    source: str
    """Equal for copies."""
    pts: np.ndarray
    seconds: float
    shots: np.ndarray

    def clip(self, times: np.ndarray) -> np.ndarray:
        """Frame times int64 [T] of what is on screen at `times` in seconds."""
        return self.pts[frames_on_screen(self.pts * self.seconds, times)]


class Group(NamedTuple):
    """A video, or a stretch of one: from `first` to `last` seconds nothing is shown that another group shows."""

    footage: Footage
    shots: np.ndarray
    """float64 [S, 2] in seconds: a clip lies within one."""
    name: str


class Groups(NamedTuple):
    """What there is to draw from."""

    groups: list[Group]
    split: str
    """BETWEEN or WITHIN."""
    left_out: list[dict[str, Any]]
    """video, name, reason of those that are too short."""


def read_footage(ref: CatalogRef, only: str | None, most: int) -> list[Footage]:
    """The videos of a catalog, at most so many (0: all), evenly spread over it. Raises InputRefused where there are none.

    `only` takes those whose URI, or name within a tar, holds this text.
    """
    table = catalog.read_videos(ref, (*COLUMNS, *EXTRA))
    if only:
        named = pc.match_substring(table["uri"], only)
        within = pc.fill_null(pc.match_substring(table["member"], only), False)
        table = table.filter(pc.or_(named, within))
    if not table.num_rows:
        raise InputRefused(f"{ref} has no videos{f' whose URI holds {only!r}' if only else ''}: check catalog and only")
    if most and table.num_rows > most:
        table = table.take(np.linspace(0, table.num_rows - 1, most).round().astype(np.int64))
    first: dict[str, str] = {}
    entries = table.to_pylist()
    names = short_names([entry["member"] or entry["uri"] for entry in entries])
    return [
        _footage(ref, entry, name, first.setdefault(entry["digest"], entry["id"]))
        for entry, name in zip(entries, names, strict=True)
    ]


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with as many folders before it as tell it from the others; a number where none do."""
    found, depth, deepest = [""] * len(paths), 0, max(path.count("/") for path in paths) + 1
    while (same := _repeated(found)) and depth < deepest:
        depth += 1
        found = ["/".join(path.split("/")[-depth:]) if place in same else found[place] for place, path in enumerate(paths)]
    return [f"{name} ({place})" if place in same else name for place, name in enumerate(found)]


def _repeated(names: Sequence[str]) -> set[int]:
    counts = Counter(names)
    return {place for place, name in enumerate(names) if counts[name] > 1 or not name}


def _footage(ref: CatalogRef, entry: dict[str, Any], name: str, same_stream: str) -> Footage:
    seconds = entry["time_base_num"] / entry["time_base_den"]
    pts = catalog.frame_times(ref, entry)
    return Footage(entry["id"], name, entry["duplicate_of"] or same_stream, pts, seconds, shots(entry) * seconds)


def group_footage(footage: Sequence[Footage], needed: float, gap: float, most: int, least_videos: int) -> Groups:
    """Groups of which each has a shot, or a piece of one, of `needed` seconds.

    Where fewer than `least_videos` sources have one, their shots are cut into pieces with at least `gap` seconds between, at most
    `most` of a video, as long as they can be; the split says so.
    """
    left_out, groups, seen = [], [], set()
    for found in footage:
        fitting = found.shots[found.shots[:, 1] - found.shots[:, 0] >= needed]
        if not len(fitting):
            longest = float((found.shots[:, 1] - found.shots[:, 0]).max())
            detail = f"{needed:.2f} s are needed, the longest shot has {longest:.2f} s"
            left_out.append({"video": found.video, "name": found.name, "reason": "too_short", "detail": detail})
        elif found.source in seen:
            detail = "its copy is there already"
            left_out.append({"video": found.video, "name": found.name, "reason": "duplicate", "detail": detail})
        else:
            seen.add(found.source)
            groups.append(Group(found, fitting, found.name))
    if len(groups) >= least_videos:
        return Groups(groups, BETWEEN, left_out)
    pieces = [piece for group in groups for piece in _pieces(group, needed, gap, most)]
    return Groups(pieces, WITHIN, left_out)


def _pieces(group: Group, needed: float, gap: float, most: int) -> list[Group]:
    """Pieces of one video's shots; shots themselves lie apart already by their cut, pieces of one by the gap."""
    lengths = group.shots[:, 1] - group.shots[:, 0]
    room = np.floor((lengths + gap) / (needed + gap) + 1e-9).astype(int)
    found = []
    for (first, last), count in zip(group.shots, room.tolist(), strict=True):
        count = min(count, max(1, round(most * count / room.sum())))
        length = (last - first - (count - 1) * gap) / count
        starts = first + np.arange(count) * (length + gap)
        found += [(start, start + length) for start in starts]
    return [
        Group(group.footage, np.array([[start, end]]), f"{group.name} {start:.2f}-{end:.2f} s") for start, end in found[:most]
    ]


def folds(groups: Groups, count: int, seed: int, what: str) -> np.ndarray:
    """The fold int64 of each group: a shuffle by seed, dealt out video by video, so that pieces of one video spread over folds.

    Raises InputRefused for fewer groups than folds.
    """
    if len(groups.groups) < max(3, count):
        raise InputRefused(
            f"{what}: {len(groups.groups)} {groups.split} groups are too few for {count} folds: add videos, shorten the clips "
            "(clips.num_frames, a higher clips.fps, lower speeds), or lower folds (at least 3)"
        )

    def key(place: int) -> list[bytes]:
        group = groups.groups[place]
        told = (f"{seed} {text}".encode() for text in (group.footage.source, group.name))
        return [hashlib.blake2b(text, digest_size=8).digest() for text in told]

    found = np.empty(len(groups.groups), np.int64)
    for place, index in enumerate(sorted(range(len(groups.groups)), key=key)):
        found[index] = place % count
    return found
