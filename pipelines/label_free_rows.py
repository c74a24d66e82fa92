"""Questions about real footage that need no labels: which clips are decoded for them, and in which split they stand.

Legend: R rows (clips) of a task, G groups, T frames.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_core.config import ClipConfig
from jepa_core.readout import Rows, Splits
from jepa_core.temporal_tasks import DIRECTIONS, Questions, arrow_of_time, playback_speed
from pipelines.clip_groups import WITHIN, Footage, Group, Groups, folds, group_footage
from pipelines.errors import InputRefused
from pipelines.features import Features, Item
from pipelines.seeing_config import ARROW, RETRIEVAL, SPEED, LabelFreeConfig

WHAT = {ARROW: "arrow of time", SPEED: "playback speed", RETRIEVAL: "instance retrieval"}
THIRDS = 3


class Task(NamedTuple):
    """One question about many clips. For retrieval a row is a pair of clips, and has no label."""

    name: str
    items: np.ndarray
    """Numbers of the items int64 [R], or [R, 2] of first and last third."""
    labels: np.ndarray
    """int64 [R]."""
    groups: np.ndarray
    """Group of each row, int64 [R]."""
    classes: tuple[str, ...]
    group_names: tuple[str, ...]
    group_folds: np.ndarray
    """int64 [seeds, G]; empty for retrieval."""
    split: str
    left_out: list[dict[str, Any]]

    @property
    def chance(self) -> float:
        """What guessing gets."""
        return 1 / (len(self.items) if self.name == RETRIEVAL else len(self.classes))


def plan(config: LabelFreeConfig, footage: Sequence[Footage], clip: ClipConfig) -> tuple[list[Item], list[Task]]:
    """The clips of all tasks. Raises InputRefused, with numbers, where the footage is too short or too little for one."""
    items: list[Item] = []
    span = (clip.num_frames - 1) / clip.fps
    tasks = []
    for name in config.tasks:
        if name == RETRIEVAL:
            # A third may cross a cut, as a source does.
            whole = [found._replace(shots=np.array([[found.shots[0, 0], found.shots[-1, 1]]])) for found in footage]
            groups = _groups(config, whole, THIRDS * span)
            tasks.append(_retrieval(groups, clip, items))
        elif name == ARROW:
            tasks.append(_asked(config, name, _groups(config, footage, span), DIRECTIONS, _arrow(clip), items))
        else:
            groups = _groups(config, footage, span * max(config.speeds))
            classes = tuple(f"{speed:g}x" for speed in config.speeds)
            tasks.append(_asked(config, name, groups, classes, _speed(clip, config.speeds), items))
    return items, tasks


def _groups(config: LabelFreeConfig, footage: Sequence[Footage], needed: float) -> Groups:
    shown = config.footage
    return group_footage(footage, needed, shown.gap, shown.pieces, shown.least_videos)


def _arrow(clip: ClipConfig) -> Callable[[np.ndarray, int, np.ndarray], Questions]:
    return lambda seconds, number, shots: arrow_of_time(seconds, clip.num_frames, clip.fps, 0, number, shots)


def _speed(clip: ClipConfig, speeds: Sequence[float]) -> Callable[[np.ndarray, int, np.ndarray], Questions]:
    return lambda seconds, number, shots: playback_speed(seconds, clip.num_frames, clip.fps, 0, number, shots, speeds)


def _asked(
    config: LabelFreeConfig,
    name: str,
    groups: Groups,
    classes: Sequence[str],
    ask: Callable[[np.ndarray, int, np.ndarray], Questions],
    items: list[Item],
) -> Task:
    """Rows of a task that asks the same of several moments of every group; a group that cannot be asked is left out."""
    kept, left_out = [], list(groups.left_out)
    numbers, labels, places = [], [], []
    for index, group in enumerate(groups.groups):
        seconds = group.footage.pts * group.footage.seconds
        try:
            found = [ask(seconds, index * config.footage.moments + n, group.shots) for n in range(config.footage.moments)]
        except ValueError as error:
            left_out.append({"video": group.footage.video, "name": group.name, "reason": "repeats", "detail": str(error)})
            continue
        for question in found:
            for frames, label in zip(*question, strict=True):
                numbers.append(len(items))
                items.append(Item(group.footage.video, group.footage.pts[frames]))
                labels.append(int(label))
                places.append(len(kept))
        kept.append(group)
    _refuse_none(name, kept, left_out, least=1)
    dealt = [folds(groups._replace(groups=kept), config.folds, seed, WHAT[name]) for seed in range(config.seeds)]
    numbers, labels, places = (np.array(found, np.int64) for found in (numbers, labels, places))
    names = tuple(group.name for group in kept)
    return Task(name, numbers, labels, places, tuple(classes), names, np.stack(dealt), groups.split, left_out)


def _retrieval(groups: Groups, clip: ClipConfig, items: list[Item]) -> Task:
    """A clip from the middle of the first third, and of the last third, of every group."""
    _refuse_none(RETRIEVAL, groups.groups, groups.left_out, least=2)
    pairs = []
    span = (clip.num_frames - 1) / clip.fps
    for group in groups.groups:
        first, last = group.shots[0, 0], group.shots[-1, 1]
        third = (last - first) / THIRDS
        for start in (first + (third - span) / 2, last - third + (third - span) / 2):
            items.append(Item(group.footage.video, group.footage.clip(start + np.arange(clip.num_frames) / clip.fps)))
        pairs.append((len(items) - 2, len(items) - 1))
    everyone = np.arange(len(pairs))
    names, none = tuple(group.name for group in groups.groups), np.empty((0, 0), np.int64)
    return Task(RETRIEVAL, np.array(pairs), everyone, everyone, (), names, none, groups.split, groups.left_out)


def _refuse_none(name: str, groups: Sequence[Group], left_out: Sequence[dict[str, Any]], least: int) -> None:
    if len(groups) < least:
        told = "; ".join(f"{row['name']}: {row['detail']}" for row in left_out[:3])
        raise InputRefused(
            f"{WHAT[name]}: {len(groups)} groups of footage can be asked, {least} are needed ({told or 'no videos'}): give "
            "longer videos, fewer footage.num_frames, a higher footage.fps, or leave it out of tasks"
        )


def without(tasks: Sequence[Task], count: int, found: Features, config: LabelFreeConfig) -> list[Task]:
    """Tasks without the moments of which a clip did not decode. Raises InputRefused where more than `max_failed` did not."""
    if len(found.failures) > config.max_failed * count:
        first = found.failures[0]
        raise InputRefused(
            f"{len(found.failures)} of {count} clips do not decode, more than max_failed={config.max_failed:g}: first "
            f"{first['video']} ({first['reason']}: {first['detail']})"
        )
    came = np.zeros(count, bool)
    came[found.kept] = True
    return [_came_out(task, came) for task in tasks]


def _came_out(task: Task, came: np.ndarray) -> Task:
    if task.name == RETRIEVAL:
        rows = came[task.items].all(axis=1)
    else:  # all classes of a moment stand beside each other, and go together: labels stay balanced
        rows = came[task.items].reshape(-1, len(task.classes)).all(axis=1).repeat(len(task.classes))
    return task._replace(items=task.items[rows], labels=task.labels[rows], groups=task.groups[rows])


def rows_of(task: Task, found: Features, x: Tensor) -> Tensor:
    """Features of a task's rows, in their order: x[kept] -> [R, ...], or [R, 2, ...] for retrieval."""
    place = np.full(int(max(found.kept.max(), task.items.max())) + 1, -1)
    place[found.kept] = np.arange(len(found.kept))
    return x[torch.from_numpy(place[task.items])]


def fold_splits(task: Task, x: Tensor, seed: int, fold: int) -> tuple[Splits, np.ndarray]:
    """One fold to test on, the next to choose by, the others to train on: (splits, numbers of the test rows)."""
    dealt = task.group_folds[seed]
    of_row = dealt[task.groups]
    count = int(dealt.max()) + 1
    wanted = (
        (of_row != fold) & (of_row != (fold + 1) % count),
        of_row == (fold + 1) % count,
        of_row == fold,
    )
    labels = torch.from_numpy(task.labels)
    parts = [Rows(x[torch.from_numpy(rows)], labels[torch.from_numpy(rows)]) for rows in wanted]
    return Splits(*parts, task.classes), np.flatnonzero(wanted[2])


def by_group(task: Task, hits: np.ndarray) -> dict[str, float]:
    """Share of right answers bool [R] of each group that still has rows."""
    return {task.group_names[group]: float(hits[task.groups == group].mean()) for group in np.unique(task.groups)}


def told(task: Task) -> dict[str, Any]:
    """What a result says about a task's footage."""
    return {
        "name": task.name,
        "split": task.split,
        "unit": "piece" if task.split == WITHIN else "video",
        "groups": len(np.unique(task.groups)),
        "videos_named": sorted({task.group_names[group] for group in np.unique(task.groups).tolist()})[:50],
        "clips": int(task.items.size),
        "classes": list(task.classes),
        "chance": task.chance,
        "left_out": {"count": len(task.left_out), "first": task.left_out[:20]},
    }


def shares(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By group, the mean over seeds of their shares of right answers."""
    names = list(results[0]["groups"])
    return {name: float(np.mean([result["groups"][name] for result in results])) for name in names}
