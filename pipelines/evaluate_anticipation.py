"""jepa evaluate anticipation: verb, noun and action that come next, from the clip before them; EPIC-KITCHENS-100 annotations.

Results of the two protocols carry their names and are not comparable: under `reference` most clips show the action itself.

Legend: R rows (annotated actions), N tokens, D width.
"""

import csv
import hashlib
import io
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_core.anticipation import TASKS, Answers, HeadSet, class_mean_recall, clip_before
from jepa_core.config import ClipConfig
from jepa_core.readout import Choice, best_choice
from jepa_core.sampling import Stream, frames_on_screen, generator
from pipelines import (
    catalog,
    evaluate_arms,
    evaluate_rows,
    evaluate_table,
    features,
    label_match,
    run_folder,
    storage,
)
from pipelines.catalog_schema import CatalogRef
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import FRAME_DIFFERENCE, PIXELS, RANDOM, TRAINED, Compared
from pipelines.evaluate_config import AnticipationConfig
from pipelines.features import Cache, Item
from pipelines.label_lists import TEST, TRAIN, VALIDATION
from pipelines.label_match import few
from pipelines.progress import Reporter

ROWS, RECALL = "rows.json", "recall.png"
TOO_EARLY = "too_early"
"""Reason of an action that starts before any frame could precede it by the gap."""


class Action(NamedTuple):
    """One annotated action; `group` is what must not be divided between splits."""

    video: str
    name: str
    split: str
    start: float
    stop: float
    verb: int
    noun: int
    action: int


class Vocabulary(NamedTuple):
    """Verb and noun classes as annotated, and pairs of them, that occur in training."""

    verbs: list[int]
    nouns: list[int]
    actions: list[tuple[int, int]]


class Unit(NamedTuple):
    """One seed of one arm."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.arm}-s{self.seed}"


class Shared(NamedTuple):
    """What every task needs: the actions in the order of their items, and which of them came out."""

    config: AnticipationConfig
    run_dir: str
    compared: Compared
    actions: list[Action]
    sizes: tuple[int, int, int]
    tokens: Cache


def run(config: AnticipationConfig, reporter: Reporter) -> dict[str, Any]:
    """Match, decode and encode, train heads, tell recalls. Returns the action recalls. Raises as evaluate_probe.run does."""
    config, work = evaluate_arms.opened(config, units)
    run_dir, ref, result = work.run_dir, catalog.parse_ref(config.catalog), work.result
    if result is None:
        size = ClipConfig(num_frames=config.num_frames, fps=config.fps, crop_size=config.crop_size)
        compared = evaluate_arms.compared(config.model, config.controls, config.seeds, size)
        actions, words, notes = _actions(config, ref, run_dir, fixed=len(work.missing) < len(work.units))
        with evaluate_arms.session(config):
            sizes = (len(words.verbs), len(words.nouns), len(words.actions))
            shared, failures = _prepare(config, run_dir, ref, compared, actions, sizes, reporter)
            evaluate_arms.run_tasks(_recall, [(unit,) for unit in work.missing], shared, config, reporter, len(work.missing))
        result = _finish(shared, words, notes, failures, work.results())
    evaluate_table.show(reporter, f"jepa evaluate anticipation protocol={config.protocol}: class-mean recall@5, %", result)
    action = {line["arm"]: line["mean"] for line in result["arms"] if line["probe"] == "action"}
    return {"run": run_dir, "protocol": config.protocol, **action}


def units(config: AnticipationConfig) -> list[Unit]:
    """Every unit; those of one seed beside each other."""
    arms = (TRAINED, *(name for name in (RANDOM, PIXELS, FRAME_DIFFERENCE) if name in config.controls))
    return [Unit(arm, seed) for seed in range(config.seeds) for arm in arms]


def read_annotations(data: bytes, where: str, split: str) -> list[Action]:
    """Rows of an EPIC-KITCHENS CSV: video_id, start and stop as timestamps or seconds, verb_class, noun_class; action is -1.

    Raises InputRefused naming the line.
    """
    found = []
    for number, row in enumerate(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")), 2):
        try:
            start, stop = (seconds(row.get(f"{name}_timestamp") or row[name]) for name in ("start", "stop"))
            found.append(Action("", row["video_id"], split, start, stop, int(row["verb_class"]), int(row["noun_class"]), -1))
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"{where}: line {number} is no annotation of an action ({error!r})") from error
        if stop < start:
            raise InputRefused(f"{where}: line {number} stops at {stop:g} s, before it starts at {start:g} s")
    if not found:
        raise InputRefused(f"{where} holds no action")
    return found


def seconds(text: str) -> float:
    """`00:01:02.5` or `62.5`. Raises ValueError."""
    value = 0.0
    for part in text.strip().split(":"):
        value = 60 * value + float(part)
    return value


def vocabulary(train: list[Action]) -> Vocabulary:
    """The classes of a training list, in order of their numbers."""
    pairs = sorted({(row.verb, row.noun) for row in train})
    return Vocabulary(sorted({verb for verb, _ in pairs}), sorted({noun for _, noun in pairs}), pairs)


def clip_pts(
    action: Action, number: int, pts: np.ndarray, unit: float, clip: ClipConfig, config: AnticipationConfig
) -> np.ndarray | None:
    """Frame times int64 [T] of the clip before an action; None where no frame precedes it. `number` seeds its gap in training."""
    gap, point = config.gap, 0.0
    if action.split == TRAIN:
        draw = generator(config.split_seed, Stream.PROBE, number)
        gap, point = (float(draw.uniform(*pair)) for pair in (config.train_gap, config.train_point))
    shown = pts * unit
    times = clip_before(action.start, action.stop, clip.num_frames, clip.fps, gap, config.protocol, point) + shown[0]
    if times[-1] < shown[0] and config.protocol == "strict":
        return None
    return pts[frames_on_screen(shown, times)]


def _actions(
    config: AnticipationConfig, ref: CatalogRef, run_dir: str, *, fixed: bool
) -> tuple[list[Action], Vocabulary, dict[str, Any]]:
    """Annotated actions with their videos, classes and splits: those that the first result was made with, once there is one."""
    tree = run_folder.read_json(run_dir, ROWS) if fixed else None
    if tree is None:
        train = read_annotations(storage.read_bytes(config.train), config.train, TRAIN)
        test = read_annotations(storage.read_bytes(config.validation), config.validation, TEST)
        videos = catalog.read_videos(ref, label_match.COLUMNS).to_pylist()
        actions, words, notes = matched(train, test, videos, config)
        tree = {"actions": actions, "vocabulary": words._asdict(), "notes": notes}
        run_folder.write_json(run_dir, ROWS, tree)
    told = tree["vocabulary"]
    words = Vocabulary(told["verbs"], told["nouns"], [tuple(pair) for pair in told["actions"]])
    return [Action(*row) for row in tree["actions"]], words, tree["notes"]


def matched(
    train: list[Action], test: list[Action], videos: list[dict[str, Any]], config: AnticipationConfig
) -> tuple[list[Action], Vocabulary, dict[str, Any]]:
    """Actions that have a video and classes. Test actions whose (verb, noun) is not in training are left out, as published.

    Raises InputRefused, with names, for videos that are missing or stand in both lists, and for a list that nothing is left of.
    """
    where = f"{config.train} and {config.validation}"
    found, missing = label_match.match([*train, *test], videos, config.max_missing, where)
    content = {video["id"]: video["content_digest"] or video["digest"] for video in videos}
    splits: dict[str, dict[str, str]] = {}
    for row, video in found:
        splits.setdefault(content[video["id"]], {}).setdefault(row.split, row.name)
    if shared := [
        " and ".join(f"{name} ({split})" for split, name in names.items()) for names in splits.values() if len(names) > 1
    ]:
        raise InputRefused(f"{where}: {len(shared)} videos stand in both lists, by content: {few(sorted(shared))}")
    trained = sorted(digest for digest, names in splits.items() if TRAIN in names)
    order = sorted(trained, key=lambda digest: hashlib.blake2b(f"{config.split_seed} {digest}".encode()).digest())
    if len(order) < 2:
        raise InputRefused(f"{config.train}: {len(order)} videos, and one at least is needed to choose heads by: give more")
    held = set(order[: min(max(1, round(config.validation_share * len(order))), len(order) - 1)])
    rows = [
        row._replace(video=video["id"], split=VALIDATION if row.split == TRAIN and content[video["id"]] in held else row.split)
        for row, video in found
    ]
    words = vocabulary([row for row in rows if row.split == TRAIN])
    numbers = {pair: number for number, pair in enumerate(words.actions)}
    kept = [
        row._replace(verb=words.verbs.index(row.verb), noun=words.nouns.index(row.noun), action=numbers[row.verb, row.noun])
        for row in rows
        if (row.verb, row.noun) in numbers
    ]
    counts = {split: sum(row.split == split for row in kept) for split in (TRAIN, VALIDATION, TEST)}
    if empty := [split for split, count in counts.items() if not count]:
        raise InputRefused(f"{where}: no action is left for {' and '.join(empty)} whose verb and noun occur in training")
    notes = {
        "rows": len(train) + len(test),
        "missing": len(missing),
        "missing_names": sorted(set(missing))[: label_match.LISTED],
        "unseen": len(rows) - len(kept),
    }
    return kept, words, notes


def _prepare(
    config: AnticipationConfig, run_dir: str, ref: CatalogRef, compared: Compared, actions: list[Action],
    sizes: tuple[int, int, int], reporter: Reporter,
) -> tuple[Shared, list[dict[str, Any]]]:  # fmt: skip
    """Fill the cache of features. Returns what the tasks need, and what did not come out."""
    arm = compared.arms[f"{TRAINED}-0"]
    evaluate_arms.fitting(config.attentive, arm, arm.encoder.dim)
    times = evaluate_rows.frame_times(ref, {action.video for action in actions})
    items, shown, failures = [], [], []
    for number, action in enumerate(actions):
        pts = clip_pts(action, number, *times[action.video], compared.clip, config)
        if pts is None:
            detail = f"starts at {action.start:g} s: no frame precedes it by the gap"
            failures.append({"video": action.video, "name": action.name, "reason": TOO_EARLY, "detail": detail})
        else:
            items.append(Item(action.video, pts))
            shown.append(action)
    evaluate_arms.check_size(compared.arms, compared.clip, len(items), config.max_gb)
    folder = storage.join(run_dir, evaluate_arms.FEATURES)
    cache = features.fill(ref, items, compared.arms, compared.clip, "tokens", folder, reporter, num_gpus=config.gpus)
    lost = features.read(cache, ()).failures
    if len(lost) > config.max_failed * len(items):
        names = few([f"{shown[row['item']].name} ({row['reason']})" for row in lost])
        raise InputRefused(
            f"{ref}: {len(lost)} of {len(items)} clips do not decode, more than max_failed={config.max_failed:g}: {names}"
        )
    failures += [{**row, "name": shown[row["item"]].name} for row in lost]
    return Shared(config, run_dir, compared, shown, sizes, cache), failures


def _recall(unit: Unit, shared: Shared) -> list[str]:
    """One unit: heads trained, one chosen by the validation videos, its recalls on the test videos."""
    torch.set_num_threads(1)
    config, name = shared.config, shared.compared.features_of(unit.arm, unit.seed)
    found = features.read(shared.tokens, [name])
    actions = [shared.actions[item] for item in found.kept.tolist()]
    x, labels = {}, {}
    for split in (TRAIN, VALIDATION, TEST):
        rows = torch.tensor([number for number, action in enumerate(actions) if action.split == split])
        x[split] = found.x[name][rows]
        mine = [actions[number] for number in rows.tolist()]
        labels[split] = Answers(*(torch.tensor([getattr(action, task) for action in mine]) for task in TASKS))
    fitted = evaluate_arms.fitting(config.attentive, shared.compared.arms[name], found.x[name].shape[-1])
    heads = HeadSet(fitted, found.x[name].shape[-1], shared.sizes, config.grid, unit.seed).to(evaluate_arms.device(config.gpus))
    heads.fit(x[TRAIN], labels[TRAIN], unit.seed)
    table = []
    for number, (lr, decay) in enumerate(config.grid.heads):
        recall = class_mean_recall(heads.scores(x[VALIDATION], number)[2], labels[VALIDATION].action)
        table.append(Choice({"lr": lr, "weight_decay": decay}, recall))
    best = best_choice(table)
    scores = heads.scores(x[TEST], best)
    told = {
        "recall": {task: class_mean_recall(*pair) for task, *pair in zip(TASKS, scores, labels[TEST], strict=True)},
        "chosen": table[best].settings,
        "validation": table[best].validation,
        "heads": [choice.settings | {"validation": choice.validation} for choice in table],
        "rows": {split: len(rows) for split, rows in x.items()},
    }
    evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | {"protocol": config.protocol} | told)
    return [unit.name]


def _finish(
    shared: Shared, words: Vocabulary, notes: dict[str, Any], failures: list[dict[str, Any]], results: dict[Unit, dict[str, Any]]
) -> dict[str, Any]:
    """Result and picture. Returns the result."""
    config = shared.config
    values: dict[tuple[str, str], list[float]] = {}
    for unit, result in results.items():
        for task in TASKS:
            values.setdefault((unit.arm, task), []).append(result["recall"][task])
    clip = asdict(shared.compared.clip)
    result = {
        "task": "anticipation",
        "lead": f"What comes next, {config.gap:g} s ahead, protocol {config.protocol}: "
        + ("the clip ends before the action starts." if config.protocol == "strict" else "the clip may show the action itself."),
        "protocol": config.protocol,
        "metric": "class-mean recall@5 over the classes of the validation list",
        "gap": config.gap,
        "catalog": config.catalog,
        "models": config.model,
        "seeds": config.seeds,
        "clip": {key: clip[key] for key in ("num_frames", "fps", "crop_size")},
        "classes": {"verb": len(words.verbs), "noun": len(words.nouns), "action": len(words.actions)},
        "splits": next(iter(results.values()))["rows"],
        "list": notes,
        "failures": evaluate_arms.failures_told(failures),
        **evaluate_table.scores(values, None, TRAINED),
        "pictures": [{"file": RECALL, "caption": f"Class-mean recall@5 under the {config.protocol} protocol."}],
    }
    picture = evaluate_table.bars(result, f"class-mean recall@5, %, {config.protocol}", None)
    storage.write_bytes(storage.join(shared.run_dir, RECALL), picture)
    run_folder.write_json(shared.run_dir, run_folder.RESULT, result)
    return result
