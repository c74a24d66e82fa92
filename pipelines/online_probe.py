"""A small probe beside a pretraining: what the target encoder knows of a fixed set of clips, every so many steps.

Without labels: does the last third of a video find its first third, and is a clip shown forward or backward; with a labelled
list, linear and k-NN accuracy. This is the driver's part. The clips follow from the catalog's version and the options alone, so
runs of several seeds are asked the same; they are decoded once, by Ray tasks, and left in Ray's object store. What the workers do
is in train_probe.py. The linear probe is a ridge regression, so numbers are near those of `jepa evaluate`, not the same.

    run.dir/probe.json   clips, questions, what does not decode and why, the same numbers of raw pixels

Legend: K clips that came out, T frames, S crop size, N tokens, P values of a tubelet, F width of features.
"""

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import clip_grid
from jepa_core.positions import Grid
from jepa_core.probe import retrieval_hits, ridge_classes, standardise
from jepa_core.readout import Rows, check_splits, knn_votes, stratified_subset
from pipelines import catalog, clip_groups, evaluate_arms, evaluate_rows, features, label_free_rows, run_folder
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_items import Item, entries_of, failure, read_items
from pipelines.config import PretrainConfig, RunConfig
from pipelines.errors import InputRefused, UsageError, unwrapping
from pipelines.evaluate_config import ProbeEvaluationConfig, ViewsConfig
from pipelines.evaluate_rows import Plan
from pipelines.features import Arm, Features
from pipelines.label_free_rows import Task
from pipelines.label_lists import SPLITS
from pipelines.online_config import CLIPS_OF_GROUP, FOLDS
from pipelines.progress import Reporter
from pipelines.seeing_config import ARROW, RETRIEVAL, FootageConfig, LabelFreeConfig
from pipelines.video import tubelets

KNN = 10
"""Neighbours; the smallest of DINO's, for small sets."""
CHUNK = 8
"""Clips of one decode task."""


class Asked(NamedTuple):
    """What is asked of which items: `tasks` without labels, `plan` and `classes` with them."""

    items: list[Item]
    tasks: list[Task]
    plan: Plan | None = None
    classes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    """Questions that these videos do not allow, with the reason."""


class ProbeSet(NamedTuple):
    """The clips that came out, and what is asked of them."""

    tubelets: np.ndarray
    """uint8 [K, N, P]"""
    grid: Grid
    asked: Asked
    found: Features
    """Numbers of the items that came out, and the failures; no features."""
    pixels: dict[str, float]
    """Scores of raw pixels."""

    def scores(self, x: Tensor) -> dict[str, float]:
        """Shares of right answers by name, from features float32 [K, F]; nothing for features that are not finite."""
        if not x.isfinite().all():
            return {}
        if self.asked.plan is None:
            return {task.name: _share(task, label_free_rows.rows_of(task, self.found, x)) for task in self.asked.tasks}
        train, test = self._rows(x)
        scaled = standardise(train.x, test.x)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(train.labels)))  # lists stand in order of classes
        count = len(self.asked.classes)
        linear = ridge_classes(train.x[order], train.labels[order], test.x, count)
        votes = knn_votes(train._replace(x=scaled[0]), scaled[1], KNN, 0.07, count)
        return {
            "linear": (linear == test.labels).double().mean().item(),
            "knn": (votes.argmax(1) == test.labels).double().mean().item(),
        }

    def _rows(self, x: Tensor) -> tuple[Rows, Rows]:
        """Training rows, with those of the validation split: nothing is chosen here; and test rows."""
        splits = evaluate_rows.splits_of(self.asked.plan, self.found, x, self.asked.classes, "flat")
        both = (splits.train, splits.validation)
        return Rows(torch.cat([part.x for part in both]), torch.cat([part.labels for part in both])), splits.test

    def told(self) -> dict[str, Any]:
        """What the run folder says about the set."""
        facts: dict[str, Any] = {
            "clips": len(self.tubelets),
            "megabytes": self.tubelets.nbytes / 1e6,
            "left_out": list(self.asked.left_out),
            "failures": evaluate_arms.failures_told(self.found.failures),
        }
        if self.asked.plan is None:
            tasks = [label_free_rows.told(task) for task in self.asked.tasks]
            return facts | {"tasks": tasks, "chance": {task["name"]: task["chance"] for task in tasks}}
        labels = self.asked.plan.labels
        most = float(np.bincount(labels["test"]).max() / len(labels["test"]))
        splits = {split: len(rows) for split, rows in labels.items()}
        return facts | {"classes": list(self.asked.classes), "splits": splits, "chance": {"linear": most, "knn": most}}


def _share(task: Task, rows: Tensor) -> float:
    """Share of right answers: each fold is tested once, read by all others."""
    if task.name == RETRIEVAL:
        return retrieval_hits(rows[:, 1], rows[:, 0]).double().mean().item()
    folds, labels = task.group_folds[0][task.groups], torch.from_numpy(task.labels)
    right = 0
    for fold in np.unique(folds):
        test = torch.from_numpy(folds == fold)
        predicted = ridge_classes(rows[~test], labels[~test], rows[test], len(task.classes))
        right += int((predicted == labels[test]).sum())
    return right / len(labels)


def prepare(config: PretrainConfig, reporter: Reporter, *, whole: bool = True) -> ProbeSet | None:
    """Choose and decode the clips of a pinned configuration, and tell what came of it; None where nothing can be asked.

    `whole`: whether the run's own catalog may be read whole. Needs an open Ray session. Raises UsageError where it may not and no
    other is given, InputRefused for a labelled list that cannot be asked, Retryable where the store does not answer.
    """
    probe, source = config.probe, next(iter(config.sources.values()))
    if probe.catalog is None and not whole:
        raise UsageError(
            f"probe.catalog is missing: {source.catalog} has more videos than data.rows_in_memory={config.data.rows_in_memory}, "
            "give a smaller one, or probe.every=0"
        )
    ref, clip = catalog.parse_ref(probe.catalog or source.catalog), config.clip_of(source)
    asked = _classes(config, ref, clip) if probe.labelled else _questions(config, ref, clip)
    made = _made(asked, _decoded(ref, asked.items, clip, config.model.encoder, reporter), clip, config.model.encoder)
    told = made.told()
    facts = {"catalog": str(ref), "options": asdict(probe), **told, "pixels": made.pixels}
    run_folder.write_json(config.run.dir, run_folder.PROBE, facts)
    notes = list(made.asked.left_out)
    if count := told["failures"]["count"]:
        notes.append(f"{count} clips do not decode: {', '.join(f'{r} {n}' for r, n in told['failures']['reasons'].items())}")
    if not (made.asked.tasks or made.asked.plan):
        notes.append(f"{ref} leaves nothing to ask, nothing is measured")
    for note in notes:
        reporter.event("warning", message=f"probe: {note}")
    return made if made.asked.tasks or made.asked.plan else None


def _questions(config: PretrainConfig, ref: CatalogRef, clip: ClipConfig) -> Asked:
    """Questions without labels, about at most `probe.max_clips` clips of videos spread over the catalog."""
    if clip.num_frames == 1:
        return Asked([], [], left_out=("single frames have neither order nor thirds, give probe.labels",))
    groups = config.probe.max_clips // CLIPS_OF_GROUP
    footage = clip_groups.read_footage(ref, None, groups)
    shown = FootageConfig(moments=2, pieces=max(1, groups // len(footage)), gap=0.5)
    options = LabelFreeConfig(footage=shown, folds=FOLDS, seeds=1)
    items, planned, left_out = [], [], []
    for name in (RETRIEVAL, ARROW):
        try:
            more, (task,) = label_free_rows.plan(replace(options, tasks=[name]), footage, clip)
        except InputRefused as error:
            left_out.append(str(error).partition(": give ")[0])
            continue
        planned.append(task._replace(items=task.items + len(items)))
        items += more
    return Asked(items, planned, left_out=tuple(left_out))


def _classes(config: PretrainConfig, ref: CatalogRef, clip: ClipConfig) -> Asked:
    """Samples of a labelled list, at most `probe.max_clips`, classes in proportion. Raises InputRefused as evaluate_rows does."""
    probe = config.probe
    options = ProbeEvaluationConfig(labels=probe.labels, format=probe.format, run=RunConfig(config.run.dir), max_missing=0.99)
    found = evaluate_rows.labelled(options, ref)
    samples, count = [], len(found.samples)
    for split in SPLITS:
        mine = [sample for sample in found.samples if sample.split == split]
        wanted = max(len(found.classes), int(probe.max_clips * len(mine) / count)) if count > probe.max_clips else len(mine)
        if len(mine) > wanted:
            rows = stratified_subset(np.array([sample.label for sample in mine]), wanted, 0)
            mine = [mine[row] for row in rows]
        samples += mine
    if len(samples) > probe.max_clips:
        raise UsageError(
            f"probe.max_clips={probe.max_clips} has no room for {len(found.classes)} classes in three splits, "
            f"give {max(len(samples), 3 * len(found.classes))} or more, or a list of fewer classes"
        )
    plan = evaluate_rows.plan(ref, samples, ViewsConfig(), clip)
    missing = found.notes["missing"]
    left_out = (f"{missing} of {found.notes['rows']} rows name no video of the catalog",) if missing else ()
    return Asked(plan.items, [], plan, found.classes, left_out)


class _Part(NamedTuple):
    """What came of some items: their numbers, tubelets uint8 [R, N, P], pixels float32 [R, F]; and the failures."""

    kept: np.ndarray
    tubelets: np.ndarray | None
    pixels: Tensor | None
    failures: list[dict[str, Any]]


def _decoded(ref: CatalogRef, items: list[Item], clip: ClipConfig, encoder: EncoderConfig, reporter: Reporter) -> list[_Part]:
    """All items in order, read by Ray tasks. Raises Retryable where the store does not answer."""
    import ray

    if not items:
        return []
    rows = entries_of(ref, items, clip)
    places = {video: row for row, video in enumerate(rows["id"].to_pylist())}
    entries = rows.take([places[item.video] for item in items]).to_pylist()
    task = ray.remote(num_cpus=1, max_retries=0)(_read)
    reporter.start("probe", len(items), "clips")
    waiting, parts, done = [range(first, min(first + CHUNK, len(items))) for first in range(0, len(items), CHUNK)], {}, 0
    while waiting:
        calls = [task.remote(ref, items[p.start : p.stop], entries[p.start : p.stop], p.start, clip, encoder) for p in waiting]
        again = []
        for part, call in zip(waiting, calls, strict=True):
            with unwrapping("probe: a task failed ({}): try again"):
                try:
                    parts[part.start] = ray.get(call)
                except ray.exceptions.WorkerCrashedError:  # one of them has killed its process: each alone
                    if len(part) > 1:
                        again += [range(n, n + 1) for n in part]
                        continue
                    row = failure(part.start, entries[part.start], "crashed", "the process that read it died")
                    parts[part.start] = _Part(np.empty(0, np.int64), None, None, [row])
            done += len(part)
            reporter.advance(done)
        waiting = again
    reporter.stop()
    return [parts[first] for first in sorted(parts)]


def _made(asked: Asked, parts: list[_Part], clip: ClipConfig, encoder: EncoderConfig) -> ProbeSet:
    """The set, without the questions of which too little came out. Raises InputRefused where a class of a list did not."""
    there = [part for part in parts if len(part.kept)]
    kept = np.concatenate([part.kept for part in there]) if there else np.empty(0, np.int64)
    found = Features(kept, {}, [row for part in parts for row in part.failures])
    tubelets = np.concatenate([part.tubelets for part in there]) if there else np.empty((0, 1, 1), np.uint8)
    pixels = torch.cat([part.pixels for part in there]) if there else torch.empty(0, 1)
    made = ProbeSet(tubelets, clip_grid(clip, encoder), asked, found, {})
    if asked.plan is not None:
        made = made._replace(asked=asked._replace(plan=evaluate_rows.without(asked.plan, found, 1.0, "probe.labels")))
        _check_classes(made, pixels)
    elif asked.tasks:
        made = made._replace(asked=_answerable(asked, found))
    return made._replace(pixels=made.scores(pixels))


def _read(
    ref: CatalogRef, items: list[Item], entries: list[dict[str, Any]], first: int, clip: ClipConfig, encoder: EncoderConfig
) -> _Part:
    """One task."""
    torch.set_num_threads(1)
    kept, frames, failures = read_items(ref, items, entries, clip.crop_size, first)
    if not len(kept):
        return _Part(kept, None, None, failures)
    depth = 1 if clip.num_frames == 1 else encoder.tubelet_size
    cut = np.stack([tubelets(one, depth, encoder.patch_size) for one in frames])
    return _Part(kept, cut, features.encode(Arm("pixels", encoder), frames, "mean"), failures)


def _answerable(asked: Asked, found: Features) -> Asked:
    """The questions of which enough came out."""
    tasks, left_out = [], list(asked.left_out)
    for task in label_free_rows.without(asked.tasks, len(asked.items), found, LabelFreeConfig(max_failed=1.0)):
        apart = task.groups if task.name == RETRIEVAL else task.group_folds[0][task.groups]
        if len(np.unique(apart)) < 2:
            left_out.append(f"{label_free_rows.WHAT[task.name]}: too few of its clips decode")
        else:
            tasks.append(task)
    return asked._replace(tasks=tasks, left_out=tuple(left_out))


def _check_classes(made: ProbeSet, pixels: Tensor) -> None:
    if not len(pixels):
        raise InputRefused("probe.labels: none of its clips decodes")
    splits = evaluate_rows.splits_of(made.asked.plan, made.found, pixels, made.asked.classes, "flat")
    try:
        check_splits(splits, row_axes=1)
    except ValueError as error:
        raise InputRefused(f"probe.labels: {error}") from error
