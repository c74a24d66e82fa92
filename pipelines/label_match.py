"""From rows of a labelled list to videos of a catalog, classes and splits; what would make an accuracy meaningless is refused.

Legend: C classes.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.errors import InputRefused
from pipelines.label_lists import SPLITS, TEST, TRAIN, VALIDATION, Label

COLUMNS = ("id", "uri", "member", "digest", "content_digest")
"""Columns of the catalog's `videos` that matching reads."""
NAMED = 5
"""Names that a refusal spells out."""
LISTED = 100
"""Names of missing files that a result keeps."""


class Sample(NamedTuple):
    """One labelled video, or one labelled stretch of it."""

    video: str
    """Catalog id."""
    label: int
    split: str
    start: float | None
    stop: float | None
    source: str
    """Samples of one source never stand in two splits."""
    name: str


@dataclass(frozen=True)
class Labelled:
    """Samples in the order of the list, the names of their C classes, and what was left out."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    notes: dict[str, Any]
    """rows, samples, missing (count), missing_names, splits (how they came about)."""


def path_of(row: dict[str, Any]) -> str:
    """The path that a list may name a video by."""
    return f"{row['uri']}/{row['member']}" if row["member"] else row["uri"]


def match(rows: Sequence[Label], videos: Iterable[dict[str, Any]], max_missing: float, where: str) -> tuple[list[Any], list[str]]:
    """([(row, video) of the rows whose file is in the catalog], names of the others).

    A name means the video whose path ends in the most of its path, counted in folders from the file name upwards; the file name
    may lack its suffix. Raises InputRefused where two videos fit a name equally well, and where more than the share
    `max_missing` of the rows has no video.
    """
    by_file, by_stem = defaultdict(list), defaultdict(list)
    for video in videos:
        file = os.path.basename(path_of(video))
        by_file[file].append(video)
        by_stem[os.path.splitext(file)[0]].append(video)
    found, missing, ambiguous = [], [], []
    for row in rows:
        file = os.path.basename(row.name)
        candidates = by_file.get(file) or by_stem.get(file) or by_stem.get(os.path.splitext(file)[0]) or []
        if len(candidates) > 1:
            depth = {id(video): _common_folders(row.name, path_of(video)) for video in candidates}
            deepest = max(depth.values())
            candidates = [video for video in candidates if depth[id(video)] == deepest]
        if len(candidates) > 1:
            ambiguous.append(f"{row.name} ({path_of(candidates[0])} or {path_of(candidates[1])})")
        elif candidates:
            found.append((row, candidates[0]))
        else:
            missing.append(row.name)
    if ambiguous:
        raise InputRefused(f"{where}: {len(ambiguous)} names fit several videos: {few(ambiguous)}; give more of their paths")
    if len(missing) > max_missing * len(rows):
        raise InputRefused(
            f"{where}: {len(missing)} of {len(rows)} rows name no video of the catalog, more than max_missing={max_missing:g}: "
            f"{few(missing)}; ingest them, or give the catalog that holds them"
        )
    return found, missing


def build(
    rows: Sequence[Label],
    videos: Iterable[dict[str, Any]],
    where: str,
    *,
    classes: Sequence[str] = (),
    max_missing: float = 0.0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    seed: int = 0,
    whole: bool = False,
) -> Labelled:
    """Match, name the classes, complete the splits. `whole` ignores start and stop: the files are cut already.

    Raises InputRefused, with the names: for rows that contradict each other, labels that are no class, classes without samples
    or missing from a split, and sources that stand in two splits.
    """
    found, missing = match(rows, videos, max_missing, where)
    chosen, numbers = _class_numbers([row.label for row, _ in found], classes, where)
    samples, seen = [], {}
    for row, video in found:
        start, stop = (None, None) if whole else (row.start, row.stop)
        key = (video["id"], start, stop)
        if before := seen.get(key):
            if (before.label, before.split) != (row.label, row.split):
                told = f"{before.label!r} in {before.split} and {row.label!r} in {row.split}"
                raise InputRefused(f"{where}: {row.name} is named twice, as {told}: remove one of the rows")
            continue
        seen[key] = row
        source = f"group:{row.group}" if row.group else video["id"]
        samples.append(Sample(video["id"], numbers[row.label], row.split or "", start, stop, source, row.name))
    samples = _joined(samples, {video["id"]: video for _, video in found})
    _check_sources(samples, where)
    samples, told = _completed(samples, chosen, where, validation_share, test_share, seed)
    _check_classes(samples, chosen, where)
    notes = {
        "rows": len(rows),
        "samples": len(samples),
        "missing": len(missing),
        "missing_names": missing[:LISTED],
        "splits": told,
    }
    return Labelled(tuple(samples), tuple(chosen), notes)


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _common_folders(name: str, path: str) -> int:
    """Folders that two paths have in common, counted from their ends."""
    count = 0
    for a, b in zip(reversed(name.split("/")[:-1]), reversed(path.split("/")[:-1]), strict=False):
        if a != b:
            break
        count += 1
    return count


def _class_numbers(labels: Sequence[str], classes: Sequence[str], where: str) -> tuple[list[str], dict[str, int]]:
    """The classes in order, and the number of every label: its place, or the label itself where it is a number of a class."""
    found = set(labels)
    if not classes:
        numeric = all(label.lstrip("-").isdigit() for label in found)
        chosen = sorted(found, key=int) if numeric else sorted(found)
        return chosen, {name: number for number, name in enumerate(chosen)}
    numbers = {name: number for number, name in enumerate(classes)}
    if len(numbers) < len(classes):
        twice = sorted({name for name in classes if list(classes).count(name) > 1})
        raise InputRefused(f"{where}: the list of classes names some twice: {few(twice)}")
    if not found <= numbers.keys():
        numbers |= {str(number): number for number in range(len(classes))}
    if unknown := sorted(found - numbers.keys()):
        raise InputRefused(f"{where}: {len(unknown)} labels are none of the {len(classes)} classes: {few(unknown)}")
    return list(classes), numbers


def _joined(samples: list[Sample], videos: dict[str, dict[str, Any]]) -> list[Sample]:
    """Samples whose videos have equal content, or that share a group, get the same source."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for sample in samples:
        video = videos[sample.video]
        for key in (sample.video, f"content:{video['content_digest'] or video['digest']}"):
            parent[root(key)] = root(sample.source)
    return [sample._replace(source=root(sample.source)) for sample in samples]


def _completed(
    samples: list[Sample], classes: Sequence[str], where: str, validation_share: float, test_share: float, seed: int
) -> tuple[list[Sample], str]:
    """Samples that all have a split. Raises InputRefused where only some rows say one."""
    undecided = [sample for sample in samples if not sample.split]
    if undecided and len(undecided) < len(samples):
        raise InputRefused(f"{where}: {len(undecided)} rows have no split, others do: {few([s.name for s in undecided])}")
    given = {sample.split for sample in samples if sample.split}
    told = []
    if given == {VALIDATION}:
        raise InputRefused(f"{where} has a validation split alone: give rows to train on")
    if given == {TRAIN, VALIDATION}:
        samples = [sample._replace(split=TEST) if sample.split == VALIDATION else sample for sample in samples]
        told.append("the given validation split is looked at once, as the test split")
    if not given:
        samples = [sample._replace(split=TRAIN) for sample in samples]
    if TEST not in {sample.split for sample in samples}:
        samples = _cut(samples, classes, TEST, test_share, seed, where)
        told.append(f"test: {test_share:g} of the sources of train, by seed {seed}")
    if VALIDATION not in {sample.split for sample in samples}:
        samples = _cut(samples, classes, VALIDATION, validation_share, seed, where)
        told.append(f"validation: {validation_share:g} of the sources of train, by seed {seed}")
    return samples, "; ".join(told) or "as given"


def _cut(samples: list[Sample], classes: Sequence[str], split: str, share: float, seed: int, where: str) -> list[Sample]:
    """Move about a share of each class's training sources, and one at least, into another split."""
    sources = defaultdict(set)
    for sample in samples:
        if sample.split == TRAIN:
            sources[sample.label].add(sample.source)
    alone = [classes[label] for label, found in sorted(sources.items()) if len(found) < 2]
    if alone:
        raise InputRefused(
            f"{where}: {split} cannot be cut from train, {len(alone)} classes have one source there: {few(alone)}; "
            "give them more videos, or a split of your own"
        )
    moved: set[str] = set()
    for label in sorted(sources):
        found = sorted(sources[label], key=lambda source: hashlib.blake2b(f"{seed} {split} {source}".encode()).digest())
        wanted = min(max(1, round(share * len(found))), len(found) - 1) - len(moved & sources[label])
        moved |= set([source for source in found if source not in moved][: max(0, wanted)])
    return [sample._replace(split=split) if sample.split == TRAIN and sample.source in moved else sample for sample in samples]


def _check_sources(samples: Sequence[Sample], where: str) -> None:
    places = defaultdict(dict)
    for sample in samples:
        places[sample.source].setdefault(sample.split, sample.name)
    shared = [
        f"{' and '.join(f'{name} ({split})' for split, name in found.items())}" for found in places.values() if len(found) > 1
    ]
    if shared:
        raise InputRefused(
            f"{where}: {len(shared)} sources stand in two splits, by id, content or group: {few(shared)}; "
            "a probe that has seen them is not tested: remove them from one"
        )


def _check_classes(samples: Sequence[Sample], classes: Sequence[str], where: str) -> None:
    present = {split: {sample.label for sample in samples if sample.split == split} for split in SPLITS}
    empty = [name for number, name in enumerate(classes) if not any(number in found for found in present.values())]
    if empty:
        raise InputRefused(f"{where}: {len(empty)} of {len(classes)} classes have no video: {few(empty)}")
    if len(classes) < 2:
        raise InputRefused(f"{where} has one class, {classes[0]}: there is nothing to tell apart")
    for split, found in present.items():
        absent = [name for number, name in enumerate(classes) if number not in found]
        if absent:
            raise InputRefused(f"{where}: {len(absent)} of {len(classes)} classes are missing from {split}: {few(absent)}")
