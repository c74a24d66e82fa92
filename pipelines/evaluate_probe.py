"""jepa evaluate probe: classes of labelled videos, read out of frozen features by several probes, beside the controls.

    run.dir/rows.json         samples, classes and splits; from the first result on, a continued run asks the lists no more
    run.dir/features/         the cache of features.py
    run.dir/results/          one JSON for each arm, seed and probe
    run.dir/model/            the encoder with its best attentive probe, as a model folder
    run.dir/result.json, accuracy.png, confusion.png, attention.png

Legend: R rows, V views, G clips of a row, N tokens, D width.
"""

import os
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_core.config import ClipConfig
from jepa_core.encoder import clip_grid
from jepa_core.probe import standardise
from jepa_core.readout import Readout, Rows, Splits, attentive_probe, few_labels, knn_probe, linear_probe
from jepa_core.weights import ENCODER, PREDICTOR, PROBE, ModelConfig
from pipelines import (
    attention_maps,
    catalog,
    evaluate_arms,
    evaluate_rows,
    evaluate_table,
    features,
    frame_sheet,
    model_folder,
    run_folder,
    storage,
)
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_items import Item
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import FRAME_DIFFERENCE, PIXELS, RANDOM, SCRATCH, TRAINED, Compared
from pipelines.evaluate_config import ProbeEvaluationConfig
from pipelines.evaluate_rows import Plan
from pipelines.evaluate_scratch import SUPERVISED, check_small, train_from_scratch
from pipelines.features import Cache
from pipelines.label_match import Labelled, Sample
from pipelines.progress import Reporter
from pipelines.report_figures import clip_frames

ROWS, MODEL = "rows.json", "model"
ACCURACY, CONFUSION, ATTENTION = "accuracy.png", "confusion.png", "attention.png"
ATTENTION_ROWS = 6
"""Test rows on the sheet of attention maps."""
ATTENTIVE, LINEAR, KNN = "attentive", "linear", "knn"


class Unit(NamedTuple):
    """One probe of one seed of one arm; `share` of the training rows, 1 for all."""

    arm: str
    seed: int
    probe: str
    share: float = 1.0

    @property
    def column(self) -> str:
        """What the probe is called in tables."""
        return self.probe if self.share == 1 else f"{self.probe} {100 * self.share:g}%"

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.arm}-s{self.seed}-{self.column.replace(' ', '-').rstrip('%')}"


class Shared(NamedTuple):
    """What every task needs."""

    config: ProbeEvaluationConfig
    run_dir: str
    compared: Compared
    plan: Plan
    classes: tuple[str, ...]
    tokens: Cache | None
    means: Cache | None


def run(config: ProbeEvaluationConfig, reporter: Reporter) -> dict[str, Any]:
    """Match, decode and encode, probe; what is finished is kept. Returns the margins of the first probe.

    Raises UsageError and InputRefused as the modules that it calls do.
    """
    config, work = evaluate_arms.opened(config, units)
    run_dir, ref, result = work.run_dir, catalog.parse_ref(config.catalog), work.result
    if result is None:
        size = ClipConfig(num_frames=config.clips.num_frames, fps=config.clips.fps, crop_size=config.clips.crop_size)
        compared = evaluate_arms.compared(config.model, config.controls, config.seeds, size, config.blocks)
        if config.scratch:
            check_small(compared.arms[f"{TRAINED}-0"].encoder, config.from_scratch)
        found = _labelled(config, ref, run_dir, fixed=len(work.missing) < len(work.units))
        with evaluate_arms.session(config):
            shared, items = _prepare(config, run_dir, ref, found, compared, reporter)
            calls = list(evaluate_arms.grouped(work.missing, lambda unit: (unit.arm, unit.seed)))
            evaluate_arms.run_tasks(_probe, [(group,) for _, group in calls], shared, config, reporter, len(work.missing))
            attention = _attention(shared, items, work.results(), ref, reporter)
        result = _finish(shared, found, work.results(), attention)
    evaluate_table.show(reporter, "jepa evaluate probe: test accuracy, %", result)
    first = {line["arm"]: line["mean"] for line in result["arms"] if line["probe"] == config.probes[0]}
    return {"run": run_dir, "probe": config.probes[0], **first}


def units(config: ProbeEvaluationConfig) -> list[Unit]:
    """Every unit; those of one seed beside each other."""
    arms = (TRAINED, *(name for name in (RANDOM, PIXELS, FRAME_DIFFERENCE) if name in config.controls))
    trained = [probe for probe in config.probes if probe != KNN]
    probes = [(probe, 1.0) for probe in config.probes] + [(probe, share) for probe in trained for share in config.few_labels]
    found = [Unit(arm, seed, *probe) for seed in range(config.seeds) for arm in arms for probe in probes]
    return found + [Unit(SCRATCH, seed, SUPERVISED) for seed in range(config.seeds) if config.scratch]


def _labelled(config: ProbeEvaluationConfig, ref: CatalogRef, run_dir: str, *, fixed: bool) -> Labelled:
    """Samples, classes and splits: those that the first result was made with, once there is one."""
    tree = run_folder.read_json(run_dir, ROWS) if fixed else None
    if tree is None:
        found = evaluate_rows.labelled(config, ref)
        run_folder.write_json(run_dir, ROWS, {"samples": found.samples, "classes": found.classes, "notes": found.notes})
        return found
    return Labelled(tuple(Sample(*sample) for sample in tree["samples"]), tuple(tree["classes"]), tree["notes"])


def _prepare(
    config: ProbeEvaluationConfig, run_dir: str, ref: CatalogRef, found: Labelled, compared: Compared, reporter: Reporter
) -> tuple[Shared, list[Item]]:
    """Fill the cache of features, and leave out the rows that did not come out. Returns what tasks need, and all items."""
    plan = evaluate_rows.plan(ref, found.samples, config.clips, compared.clip)
    attentive = ATTENTIVE in config.probes
    if attentive:
        arm = compared.arms[f"{TRAINED}-0"]
        evaluate_arms.fitting(config.attentive, arm, arm.encoder.dim)
    tokens = dict(compared.arms) if attentive else {}
    if config.scratch:
        tokens[PIXELS] = features.Arm(PIXELS, compared.arms[f"{TRAINED}-0"].encoder)
    pooled = set(config.probes) - {ATTENTIVE}
    controls = (PIXELS, FRAME_DIFFERENCE)
    means = {name: arm for name, arm in compared.arms.items() if pooled and (name in controls or not attentive)}
    evaluate_arms.check_size(tokens, compared.clip, len(plan.items), config.max_gb)
    folder = storage.join(run_dir, evaluate_arms.FEATURES)
    caches = [
        features.fill(ref, plan.items, arms, compared.clip, keep, folder, reporter, num_gpus=config.gpus) if arms else None
        for arms, keep in ((tokens, "tokens"), (means, "mean"))
    ]
    one = next(cache for cache in caches if cache is not None)
    plan = evaluate_rows.without(plan, features.read(one, ()), config.max_failed, str(config.labels or config.format))
    # Times of frames need not travel to the tasks.
    return Shared(config, run_dir, compared, plan._replace(items=[]), found.classes, *caches), plan.items


def _probe(group: list[Unit], shared: Shared) -> list[str]:
    """Units of one arm and seed: their features are read once."""
    torch.set_num_threads(1)
    done = []
    for probe, same in evaluate_arms.grouped(group, lambda unit: unit.probe):
        splits = None if probe == SUPERVISED else _splits(same[0], shared)
        for unit in same:
            if probe == SUPERVISED:
                result = train_from_scratch(shared, unit.seed)
            else:
                result = _read_out(
                    unit, few_labels(splits, _rows_of(unit, splits), unit.seed) if unit.share < 1 else splits, shared
                )
            evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | result)
            done.append(unit.name)
    return done


def _rows_of(unit: Unit, splits: Splits) -> int:
    """Training rows of a share, one for each class at least."""
    return max(len(splits.names), round(unit.share * len(splits.train.labels)))


def _splits(unit: Unit, shared: Shared) -> Splits:
    name = shared.compared.features_of(unit.arm, unit.seed)
    pool = {ATTENTIVE: "tokens", LINEAR: "mean", KNN: "flat"}[unit.probe]
    cache = shared.tokens if unit.probe == ATTENTIVE or not shared.means or name not in shared.means.folders else shared.means
    found = features.read(cache, [name])
    return evaluate_rows.splits_of(shared.plan, found, found.x[name], shared.classes, pool)


def _read_out(unit: Unit, splits: Splits, shared: Shared) -> dict[str, Any]:
    config = shared.config
    try:
        if unit.probe == LINEAR:
            found = linear_probe(splits, config.linear, unit.seed)
        elif unit.probe == KNN:
            parts = (splits.train, splits.validation, splits.test)
            scaled = standardise(*(rows.x for rows in parts))
            found = knn_probe(Splits(*(Rows(x, rows.labels) for x, rows in zip(scaled, parts, strict=True)), splits.names))
        else:
            arm = shared.compared.arms[shared.compared.features_of(unit.arm, unit.seed)]
            fitted = evaluate_arms.fitting(config.attentive, arm, splits.train.x.shape[-1])
            found, state = attentive_probe(splits, fitted, config.grid, unit.seed, evaluate_arms.device(config.gpus))
            if unit.arm == TRAINED and unit.share == 1:
                model_folder.save_tensors(_state_uri(shared, unit), state)
    except ValueError as error:
        raise InputRefused(f"{config.labels or config.format}: {error}") from error
    return told(found)


def told(found: Readout) -> dict[str, Any]:
    """A readout as JSON."""
    heads = [choice.settings | {"validation": choice.validation} for choice in found.table]
    return {
        "test": found.test,
        "test_top5": found.test_top5,
        "validation": found.chosen.validation,
        "chosen": found.chosen.settings,
        "heads": heads,
        "num_test": found.num_test,
        "predicted": list(found.predicted),
    }


def _attention(
    shared: Shared, items: list[Item], results: dict[Unit, dict[str, Any]], ref: CatalogRef, reporter: Reporter
) -> list[dict[str, str]]:
    """Attention maps of the exported probe on a few test rows, centre view: [] or the picture, as a result lists it."""
    if ATTENTIVE not in shared.config.probes:
        return []
    unit, plan, clip = _best(results), shared.plan, shared.compared.clip
    trained = shared.compared.features_of(TRAINED, unit.seed)
    arm = shared.compared.arms[trained]
    chosen = frame_sheet.picked(len(plan.labels["test"]), ATTENTION_ROWS)
    rows = plan.rows["test"][chosen]
    rows = rows[:, rows.shape[1] // 2]
    places = torch.from_numpy(np.unique(rows, return_inverse=True)[1].reshape(rows.shape))
    tokens = features.read(shared.tokens, [trained], set(rows.flatten().tolist())).x[trained][places].flatten(1, 2)
    few = [items[item] for item in np.unique(rows)]  # a handful, decoded again: the cache need not hold pixels
    folder = storage.join(shared.run_dir, evaluate_arms.FEATURES)
    pixels = features.extract(ref, few, {PIXELS: features.Arm(PIXELS, arm.encoder)}, clip, "tokens", folder, reporter)
    if len(pixels.kept) < len(few):
        return []
    grid = clip_grid(clip, arm.encoder)
    cut = (pixels.x[PIXELS].float() * 255).round().to(torch.uint8).numpy()
    frames = np.stack([clip_frames(one, grid, arm.encoder.patch_size) for one in cut])[places.numpy()]
    frames = frames.reshape(len(rows), -1, *frames.shape[3:])
    titles = []
    for row in chosen:
        true, taken = (shared.classes[label] for label in (plan.labels["test"][row], results[unit]["predicted"][row]))
        name = os.path.basename(plan.samples["test"][row].name)
        titles.append(f"{name}: {true}" + ("" if taken == true else f", taken for {taken}"))
    fitted = evaluate_arms.fitting(shared.config.attentive, arm, tokens.shape[-1])
    state = model_folder.load_tensors(_state_uri(shared, unit))
    picture = attention_maps.draw(state, fitted, tokens, frames, grid, titles, max(1, len(arm.blocks)))
    storage.write_bytes(storage.join(shared.run_dir, ATTENTION), picture)
    return [{"file": ATTENTION, "caption": "Where the attentive probe looks, on test clips: violet is an even share."}]


def _best(results: dict[Unit, dict[str, Any]]) -> Unit:
    """The attentive probe of the seed that is best on validation."""
    candidates = [unit for unit in results if unit.arm == TRAINED and unit.probe == ATTENTIVE and unit.share == 1]
    return max(candidates, key=lambda unit: results[unit]["validation"])


def _state_uri(shared: Shared, unit: Unit) -> str:
    return storage.join(shared.run_dir, evaluate_arms.RESULTS, f"{unit.name}.safetensors")


def _finish(
    shared: Shared, labelled: Labelled, results: dict[Unit, dict[str, Any]], attention: list[dict[str, str]]
) -> dict[str, Any]:
    """Result, pictures and the model with its probe. Returns the result."""
    config, plan = shared.config, shared.plan
    values: dict[tuple[str, str], list[float]] = {}
    top5: dict[tuple[str, str], list[float]] = {}
    for unit, result in results.items():
        values.setdefault((unit.arm, unit.column), []).append(result["test"])
        top5.setdefault((unit.arm, unit.column), []).append(result["test_top5"])
    labels = plan.labels["test"]
    scores = evaluate_table.scores(values, len(labels), TRAINED)
    for line in scores["arms"]:
        line["top5"] = float(np.mean(top5[line["arm"], line["probe"]]))
    # By validation, as the head itself: the picture is of no seed that was chosen for its test accuracy.
    shown = max(
        (u for u in results if u[0] == TRAINED and u[2:] == (config.probes[0], 1.0)), key=lambda u: results[u]["validation"]
    )
    counts = evaluate_table.confusion(labels, results[shown]["predicted"], len(shared.classes))
    guessing = float(np.bincount(labels, minlength=len(shared.classes)).max() / len(labels))
    clips = asdict(config.clips) | {key: getattr(shared.compared.clip, key) for key in ("num_frames", "fps", "crop_size")}
    result = {
        "task": "probe",
        "lead": f"{len(shared.classes)} classes, read out of frozen features; always guessing the most frequent one is right in "
        f"{guessing:.1%}.",
        "catalog": config.catalog,
        "models": config.model,
        "seeds": config.seeds,
        "clip": clips,
        "classes": list(shared.classes),
        "splits": {split: len(rows) for split, rows in plan.labels.items()},
        "guessing": guessing,
        "list": labelled.notes,
        "failures": evaluate_arms.failures_told(plan.failures),
        **scores,
        "confusion": {"arm": shown.arm, "seed": shown.seed, "probe": shown.column, "counts": counts.tolist()},
        "pictures": [
            {"file": ACCURACY, "caption": "Test accuracy by probe and features. The dashed line is guessing."},
            {"file": CONFUSION, "caption": f"What the {shown.column} probe of the trained features takes for what."},
            *attention,
        ],
    }
    storage.write_bytes(storage.join(shared.run_dir, ACCURACY), evaluate_table.bars(result, "test accuracy, %", guessing))
    title = f"{shown.column} probe of the trained encoder, seed {shown.seed}"
    picture = evaluate_table.confusion_picture(counts, shared.classes, title)
    storage.write_bytes(storage.join(shared.run_dir, CONFUSION), picture)
    if ATTENTIVE in config.probes:
        _export(shared, results)
    run_folder.write_json(shared.run_dir, run_folder.RESULT, result)
    return result


def _export(shared: Shared, results: dict[Unit, dict[str, Any]]) -> None:
    """The model with the attentive probe of the seed that is best on validation, under the official keys."""
    best, folder_uri = _best(results), storage.join(shared.run_dir, MODEL)
    if model_folder.is_model(folder_uri):  # of fewer seeds, maybe
        record = storage.join(folder_uri, model_folder.MODEL)
        if model_folder.load_json(record)["source"].get("seed") == best.seed:
            return
        storage.delete([record])  # no model until it is whole again
    state = model_folder.load_tensors(_state_uri(shared, best))
    arm = shared.compared.arms[shared.compared.features_of(TRAINED, best.seed)]
    probe = replace(shared.config.attentive, num_classes=len(shared.classes))
    clip = model_folder.ClipFormat(shared.compared.clip.num_frames, shared.compared.clip.crop_size, shared.compared.clip.fps)
    source = {"format": "jepa-evaluation", "uri": shared.run_dir, "seed": best.seed, "classes": list(shared.classes)}
    if arm.blocks:
        source["blocks"] = list(arm.blocks)
    whole = model_folder.read(shared.config.model[best.seed if shared.compared.several else 0])
    parts = {ENCODER: dict(arm.state or {}), PROBE: state}
    config = ModelConfig(encoder=arm.encoder, probe=probe)
    if PREDICTOR in whole.parts:  # transformers' classifier is not to be had without
        parts[PREDICTOR], config = whole.parts[PREDICTOR], replace(config, predictor=whole.config.predictor)
    folder = model_folder.ModelFolder(config, parts, clip=clip, source=source)
    model_folder.write(folder, folder_uri)
