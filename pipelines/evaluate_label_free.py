"""jepa evaluate label-free: what frozen features know of real footage that nobody labelled, beside the controls.

Arrow of time (forward or backward), playback speed, and instance retrieval (does the last third of a source find its first
third). Groups of footage, source videos or pieces of them (clip_groups.py), are tested once for each seed, and intervals are
Student's over groups: what another video would have given. Differences are paired by group.

    run.dir/features/         the cache of features.py
    run.dir/results/          one JSON for each task, probe, arm and seed
    run.dir/result.json, TASK.png, attention.png

Legend: R rows, N tokens, D width.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_core.config import ClipConfig
from jepa_core.encoder import clip_grid
from jepa_core.probe import retrieval_hits
from jepa_core.readout import attentive_probe, linear_probe
from jepa_core.statistics import mean_interval, paired_difference
from pipelines import (
    attention_maps,
    catalog,
    clip_groups,
    evaluate_arms,
    evaluate_table,
    features,
    label_free_rows,
    model_folder,
    run_folder,
    storage,
)
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import FRAME_DIFFERENCE, PIXELS, RANDOM, TRAINED, Compared
from pipelines.evaluate_config import models
from pipelines.features import Cache
from pipelines.label_free_rows import WHAT, Task
from pipelines.progress import Reporter
from pipelines.report_figures import clip_frames
from pipelines.seeing_config import RETRIEVAL, LabelFreeConfig

ATTENTIVE, LINEAR, COSINE = "attentive", "linear", "cosine"
ATTENTION = "attention.png"
ATTENTION_CLIPS = 4


class Unit(NamedTuple):
    """One probe of one task on one seed of one arm."""

    task: str
    probe: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.task}-{self.probe}-{self.arm}-s{self.seed}"


class Shared(NamedTuple):
    """What every task needs."""

    config: LabelFreeConfig
    run_dir: str
    compared: Compared
    tasks: dict[str, Task]
    tokens: Cache | None
    means: Cache | None


def run(config: LabelFreeConfig, reporter: Reporter) -> dict[str, Any]:
    """Choose clips, decode and encode, ask; what is finished is kept. Returns the trained encoder's shares.

    Raises UsageError and InputRefused as the modules that it calls do.
    """
    config, work = evaluate_arms.opened(config, units)
    run_dir, ref, result = work.run_dir, catalog.parse_ref(config.catalog), work.result
    if result is None:
        shown = config.footage
        size = ClipConfig(num_frames=shown.num_frames, fps=shown.fps, crop_size=shown.crop_size)
        compared = evaluate_arms.compared(config.model, config.controls, config.seeds, size)
        footage = clip_groups.read_footage(ref, shown.only, shown.max_videos)
        items, tasks = label_free_rows.plan(config, footage, compared.clip)
        if ATTENTIVE in config.probes and set(config.tasks) != {RETRIEVAL}:
            arm = compared.arms[f"{TRAINED}-0"]
            evaluate_arms.fitting(config.attentive, arm, arm.encoder.dim)  # refused before anything is encoded
        with evaluate_arms.session(config):
            shared, failures = _prepare(config, run_dir, ref, items, tasks, compared, reporter)
            calls = list(evaluate_arms.grouped(work.missing, lambda unit: (unit.arm, unit.seed)))
            evaluate_arms.run_tasks(_answer, [(group,) for _, group in calls], shared, config, reporter, len(work.missing))
        result = _finish(shared, work.results(), failures)
    for task in result["tasks"]:
        part = part_of(result, task["name"])
        title = f"{WHAT[task['name']]}, {task['split']}: {task['groups']} groups, {task['clips']} clips"
        evaluate_table.show(reporter, f"{title}, guessing {100 * task['chance']:.0f} %: right, %", part)
    return {"run": run_dir, **{line["probe"]: line["mean"] for line in result["arms"] if line["arm"] == TRAINED}}


def part_of(result: dict[str, Any], task: str) -> dict[str, Any]:
    """A result's arms and differences of one task, under the names of the probes alone."""
    parts = {key: [line for line in result[key] if line["task"] == task] for key in ("arms", "differences")}
    return {key: [line | {"probe": line["probe"].removeprefix(f"{task} ")} for line in lines] for key, lines in parts.items()}


def units(config: LabelFreeConfig) -> list[Unit]:
    """Every unit. Retrieval depends on nothing that a seed decides but the weights."""
    arms = (TRAINED, *(name for name in (RANDOM, PIXELS, FRAME_DIFFERENCE) if name in config.controls))
    found = []
    for arm in arms:
        several = arm == RANDOM or (arm == TRAINED and len(models(config.model)) > 1)
        for seed in range(config.seeds):
            for task in config.tasks:
                if task != RETRIEVAL:
                    found += [Unit(task, probe, arm, seed) for probe in config.probes]
                elif several or seed == 0:
                    found.append(Unit(task, COSINE, arm, seed))
    return found


def _prepare(
    config: LabelFreeConfig, run_dir: str, ref: Any, items: Any, tasks: list[Task], compared: Compared, reporter: Reporter
) -> tuple[Shared, list[dict[str, Any]]]:
    attentive = ATTENTIVE in config.probes and set(config.tasks) != {RETRIEVAL}
    tokens = dict(compared.arms) if attentive else {}
    means = {name: arm for name, arm in compared.arms.items() if not attentive or name in (PIXELS, FRAME_DIFFERENCE)}
    evaluate_arms.check_size(tokens, compared.clip, len(items), config.max_gb)
    folder = storage.join(run_dir, evaluate_arms.FEATURES)
    caches = [
        features.fill(ref, items, arms, compared.clip, keep, folder, reporter, num_gpus=config.gpus) if arms else None
        for arms, keep in ((tokens, "tokens"), (means, "mean"))
    ]
    came = features.read(next(cache for cache in caches if cache is not None), ())
    tasks = label_free_rows.without(tasks, len(items), came, config)
    return Shared(config, run_dir, compared, {task.name: task for task in tasks}, *caches), came.failures


def _answer(group: list[Unit], shared: Shared) -> list[str]:
    """Units of one arm and seed: their features are read once for each probe."""
    torch.set_num_threads(1)
    name = shared.compared.features_of(group[0].arm, group[0].seed)
    for tokens, same in evaluate_arms.grouped(group, lambda unit: unit.probe == ATTENTIVE):
        cache = shared.tokens if tokens or shared.means is None or name not in shared.means.folders else shared.means
        found = features.read(cache, [name])
        x = found.x[name] if tokens or found.x[name].ndim == 2 else found.x[name].float().mean(1)
        for unit in same:
            task = shared.tasks[unit.task]
            rows = label_free_rows.rows_of(task, found, x)
            result = _retrieved(task, rows) if unit.task == RETRIEVAL else _read_out(unit, task, rows, shared)
            evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | result)
    return [unit.name for unit in group]


def _retrieved(task: Task, rows: torch.Tensor) -> dict[str, Any]:
    hits = retrieval_hits(rows[:, 1].float(), rows[:, 0].float())
    return {"groups": label_free_rows.by_group(task, hits.numpy())}


def _read_out(unit: Unit, task: Task, rows: torch.Tensor, shared: Shared) -> dict[str, Any]:
    """Every fold is tested once by the head that its neighbour chose."""
    config, hits, folds = shared.config, np.zeros(len(task.items), bool), []
    for fold in range(config.folds):
        splits, tested = label_free_rows.fold_splits(task, rows, unit.seed, fold)
        try:
            if unit.probe == LINEAR:
                found = linear_probe(splits, config.linear, unit.seed)
            else:
                arm = shared.compared.arms[shared.compared.features_of(unit.arm, unit.seed)]
                fitted = evaluate_arms.fitting(config.attentive, arm, rows.shape[-1])
                device = evaluate_arms.device(config.gpus)
                found, state = attentive_probe(splits, fitted, config.grid, unit.seed, device)
                if unit == (config.tasks[0], ATTENTIVE, TRAINED, 0) and fold == 0:
                    model_folder.save_tensors(_state_uri(shared.run_dir, unit), state)
        except ValueError as error:
            raise InputRefused(f"{WHAT[unit.task]}, fold {fold}: {error}") from error
        hits[tested] = np.array(found.predicted) == task.labels[tested]
        folds.append({"test": found.test, "validation": found.chosen.validation, "chosen": found.chosen.settings})
    return {"groups": label_free_rows.by_group(task, hits), "folds": folds}


def _state_uri(run_dir: str, unit: Unit) -> str:
    return storage.join(run_dir, evaluate_arms.RESULTS, f"{unit.name}.safetensors")


def _finish(shared: Shared, results: dict[Unit, dict[str, Any]], failures: list[dict[str, Any]]) -> dict[str, Any]:
    config, told = shared.config, [label_free_rows.told(shared.tasks[name]) for name in shared.config.tasks]
    splits = " and ".join(dict.fromkeys(task["split"] for task in told))
    result = {
        "task": "label-free",
        "lead": f"What frozen features know of footage without labels, tested {splits}.",
        "catalog": config.catalog,
        "models": models(config.model),
        "seeds": config.seeds,
        "clip": {key: asdict(shared.compared.clip)[key] for key in ("num_frames", "fps", "crop_size")},
        "tasks": told,
        "failures": evaluate_arms.failures_told(failures),
        **scores(results),
        "pictures": [],
    }
    for task in told:
        file, what = f"{task['name']}.png", WHAT[task["name"]]
        picture = evaluate_table.bars(part_of(result, task["name"]), f"{what}: right, %", task["chance"])
        storage.write_bytes(storage.join(shared.run_dir, file), picture)
        caption = f"{what.capitalize()}, {task['split']}: mean over {task['groups']} {task['unit']}s and its interval at 95 %."
        result["pictures"].append({"file": file, "caption": caption})
    if _attention(shared):
        caption = f"Where the attentive probe of the {WHAT[config.tasks[0]]} looks, on clips that it was not trained on."
        result["pictures"].append({"file": ATTENTION, "caption": caption})
    run_folder.write_json(shared.run_dir, run_folder.RESULT, result)
    return result


def scores(results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """{arms, differences}: means over groups with Student's interval over them, differences paired by group."""
    found, arms, differences = {}, [], []
    for key, same in evaluate_arms.grouped(list(results), lambda unit: unit[:3]):
        task, probe, arm = key
        found[key] = label_free_rows.shares([results[unit] for unit in same])
        values = list(found[key].values())
        told = mean_interval(values) if len(values) > 1 else None
        line = {"task": task, "probe": f"{task} {probe}", "mean": float(np.mean(values)), "by": "groups", "n": len(values)}
        line |= {"low": told.low if told else None, "high": told.high if told else None}
        arms.append({"arm": arm, **line, "values": [float(np.mean(list(results[unit]["groups"].values()))) for unit in same]})
    for (task, probe, arm), groups in found.items():
        if arm != TRAINED and len(groups) > 1:
            trained = found[task, probe, TRAINED]
            apart = asdict(paired_difference([trained[name] for name in groups], list(groups.values())))
            line = {"task": task, "probe": f"{task} {probe}", "first": TRAINED, "second": arm, "by": "groups"}
            differences.append({**line, **apart})
    return {"arms": arms, "differences": differences}


def _attention(shared: Shared) -> bool:
    """Attention maps of the first task's probe on clips that it was tested on, if the cache has their pixels: whether drawn."""
    config = shared.config
    unit = Unit(config.tasks[0], ATTENTIVE, TRAINED, 0)
    if unit not in units(config) or shared.tokens is None or PIXELS not in shared.tokens.folders:
        return False
    task, trained = shared.tasks[unit.task], shared.compared.features_of(TRAINED, 0)
    tested = np.flatnonzero(task.group_folds[0][task.groups] == 0)
    spread = tested[np.linspace(0, len(tested) - 1, min(ATTENTION_CLIPS, len(tested))).round().astype(int)]
    arm = shared.compared.arms[trained]
    grid = clip_grid(shared.compared.clip, arm.encoder)
    rows = {}
    for name in (trained, PIXELS):
        found = features.read(shared.tokens, [name])
        rows[name] = label_free_rows.rows_of(task, found, found.x[name])[torch.from_numpy(spread)]
    cut = (rows[PIXELS].float() * 255).round().to(torch.uint8).numpy()
    frames = np.stack([clip_frames(one, grid, arm.encoder.patch_size) for one in cut])
    titles = [f"{task.group_names[task.groups[row]]}, shown {task.classes[task.labels[row]]}" for row in spread]
    fitted = evaluate_arms.fitting(config.attentive, arm, rows[trained].shape[-1])
    state = model_folder.load_tensors(_state_uri(shared.run_dir, unit))
    picture = attention_maps.draw(state, fitted, rows[trained], frames, grid, titles)
    storage.write_bytes(storage.join(shared.run_dir, ATTENTION), picture)
    return True
