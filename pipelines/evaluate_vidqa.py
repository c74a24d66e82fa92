"""jepa evaluate vidqa: questions about videos, put to a model as it is, blind, and before shuffled frames.

Blind shows what words alone give; shuffled frames (the same ones, in an order that follows from the video's name) what needs no
order. A unit is a chunk of the questions of one model, put in all three ways.

    run.dir/rows.json       questions with their videos; from the first result on, a continued run reads the lists no more
    run.dir/features/       the cache of features.py
    run.dir/results/        one JSON for each model and chunk: every answer, and what it was taken for
    run.dir/result.json, accuracy.png

Legend: T frames, N tokens, D width, Q visual tokens, L width of the language model.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jepa_core.config import ClipConfig
from pipelines import (
    align_media,
    catalog,
    evaluate_arms,
    evaluate_rows,
    evaluate_vidqa_table,
    features,
    label_match,
    run_folder,
    storage,
    vidqa_formats,
    vidqa_scoring,
)
from pipelines.catalog_schema import CatalogRef
from pipelines.chat import TemplateRefused
from pipelines.clip_items import Item
from pipelines.errors import InputRefused, UsageError
from pipelines.evaluate_vidqa_table import BLIND, SHUFFLED, VIDEO, WAYS
from pipelines.features import Arm, Cache
from pipelines.label_lists import Label
from pipelines.progress import Reporter
from pipelines.vidqa_config import LETTER, LIKELIHOOD, OPEN, VideoQuestionsConfig
from pipelines.vidqa_formats import Question

ROWS = "rows.json"
OUTSIDE = "outside"
"""Why a question is left out whose stretch begins after the last frame."""
UNASKABLE = "too_long"
"""Why one is that the model's context does not hold."""


class Unit(NamedTuple):
    """A chunk of the questions, put to one model."""

    seed: int
    chunk: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"s{self.seed}-{self.chunk:05}"


class Asked(NamedTuple):
    """What is asked, of which videos, and what is not."""

    questions: list[Question]
    """`video` is a catalog id."""
    bad: list[dict[str, Any]]
    """Rows that are no question or whose video is missing."""


class Shared(NamedTuple):
    """What every task needs."""

    config: VideoQuestionsConfig
    run_dir: str
    questions: list[Question]
    cache: Cache
    encoders: list[str]
    """Name of the features that each model reads."""
    items: list[tuple[int, int]]
    """Numbers of the clips that a question shows, in order and shuffled; -1 where one did not come out."""


def run(config: VideoQuestionsConfig, reporter: Reporter) -> dict[str, Any]:
    """Read, encode, ask; what is finished is kept. Returns accuracy and margins over both controls.

    Raises UsageError and InputRefused as the modules that it calls do.
    """
    from pipelines import causal_model

    causal_model.check_installed()
    config = evaluate_arms.pinned(replace(config, seeds=1))  # an answer has no seed but the model's: of several, their number
    run_dir, ref = config.run.dir, catalog.parse_ref(config.catalog)
    result = run_folder.read_json(run_dir, run_folder.RESULT)
    if result is None:
        with evaluate_arms.session(config):
            asked = _asked(config, ref)
            units = units_of(config, len(asked.questions))
            missing = [unit for unit in units if evaluate_arms.read_unit(run_dir, unit.name) is None]
            shared, failures = _prepare(config, ref, asked.questions, reporter)
            evaluate_arms.run_tasks(_ask, [(unit,) for unit in missing], shared, config, reporter, len(missing))
        result = _finish(config, asked, units, failures)
    evaluate_vidqa_table.show(reporter, result)
    return {"run": run_dir, "questions": result["questions"], **evaluate_vidqa_table.told(result)}


def units_of(config: VideoQuestionsConfig, questions: int) -> list[Unit]:
    """Every unit, model by model."""
    chunks = -(-questions // config.chunk)
    return [Unit(seed, chunk) for seed in range(len(config.model)) for chunk in range(chunks)]


def _asked(config: VideoQuestionsConfig, ref: CatalogRef) -> Asked:
    """The questions: those that the first result was made with, once there is one."""
    known = run_folder.read_json(config.run.dir, ROWS) if evaluate_arms.begun(config.run.dir) else None
    if known is None:
        questions, bad = vidqa_formats.read(config.questions, config.format)
        if len(bad) > config.max_bad * (len(bad) + len(questions)):
            counts = ", ".join(f"{reason} {count}" for reason, count in Counter(row["reason"] for row in bad).items())
            raise InputRefused(
                f"{config.questions}: {len(bad)} of {len(bad) + len(questions)} rows cannot be asked, more than "
                f"max_bad={config.max_bad:g} ({counts}); the first is row {bad[0]['row']}: {bad[0]['detail']}"
            )
        questions = _chosen(config, questions)
        videos = catalog.read_videos(ref, label_match.COLUMNS).to_pylist()
        labels = [Label(name, "") for name in dict.fromkeys(one.video for one in questions)]
        found, _ = label_match.match(labels, videos, 1.0, config.questions)
        ids = {label.name: video["id"] for label, video in found}
        lost = [one for one in questions if one.video not in ids]
        if len(lost) > config.max_missing * len(questions):
            names = label_match.few([one.video for one in lost])
            raise InputRefused(
                f"{config.questions}: the videos of {len(lost)} of {len(questions)} questions are not in {ref}, more than "
                f"max_missing={config.max_missing:g}: {names}; ingest them, or give the catalog that holds them"
            )
        bad += [{"id": one.id, "reason": vidqa_formats.MISSING_VIDEO, "detail": one.video} for one in lost]
        known = {"questions": [one._replace(video=ids[one.video]) for one in questions if one.video in ids], "bad": bad}
        run_folder.write_json(config.run.dir, ROWS, known)
    rows = [(*row[:3], tuple(row[3]), *row[4:]) for row in known["questions"]]
    return Asked([Question(*row) for row in rows], known["bad"])


def _chosen(config: VideoQuestionsConfig, questions: list[Question]) -> list[Question]:
    """The questions of the categories and methods that are wanted."""
    known = {one.category for one in questions}
    if unknown := sorted(set(config.categories) - known):
        raise UsageError(f"categories: {config.questions} has no {unknown[0]}, it has {label_match.few(sorted(known))}")
    wanted = [one for one in questions if not config.categories or one.category in config.categories]
    with_options = {LIKELIHOOD, LETTER} & set(config.methods)
    asked = [one for one in wanted if (with_options if one.options else OPEN in config.methods)]
    if not asked:
        raise UsageError(f"methods={list(config.methods)} suit none of the {len(wanted)} questions of {config.questions}")
    return asked


def shuffled(pts: np.ndarray, seed: int, name: str) -> np.ndarray:
    """The same times int64 [T] in another order, which follows from the seed and the name alone."""
    told = int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
    order = np.random.default_rng(told).permutation(len(pts))
    if np.array_equal(order, np.arange(len(pts))):
        order = np.roll(order, 1)
    return pts[order]


def _prepare(
    config: VideoQuestionsConfig, ref: CatalogRef, questions: list[Question], reporter: Reporter
) -> tuple[Shared, list[dict[str, Any]]]:
    """Fill the cache of features. Returns what tasks need, and a row for each question that is left out."""
    clip, arms, encoders = _encoders(config)
    times = evaluate_rows.frame_times(ref, {one.video for one in questions})
    items: list[Item] = []
    places: dict[tuple[str, float | None, float | None], int] = {}
    failures = []
    for one in questions:
        key = (one.video, one.start, one.end)
        if key in places:
            continue
        pts, seconds = times[one.video]
        if one.start is not None and one.start > (pts[-1] - pts[0]) * seconds:
            failures.append({"video": one.video, "reason": OUTSIDE, "detail": f"{one.start:g} s is after its last frame"})
            places[key] = -1
            continue
        shown = align_media.spread(pts, seconds, clip.num_frames, one.start, one.end)
        places[key] = len(items)
        items += [Item(one.video, shown), Item(one.video, shuffled(shown, config.shuffle_seed, one.video))]
    evaluate_arms.check_size(arms, clip, len(items), config.max_gb)
    folder = storage.join(config.run.dir, evaluate_arms.FEATURES)
    cache = features.fill(ref, items, arms, clip, "tokens", folder, reporter, num_gpus=config.gpus)
    told = features.read(cache, ())
    came = set(told.kept.tolist())
    failures += [{key: row[key] for key in ("video", "reason", "detail")} for row in told.failures if row["item"] % 2 == 0]
    pairs = []
    for one in questions:
        place = places[one.video, one.start, one.end]
        pairs.append((place, place + 1) if place >= 0 and {place, place + 1} <= came else (-1, -1))
    lost = sum(pair[0] < 0 for pair in pairs)
    if lost > config.max_failed * len(questions):
        names = label_match.few([f"{row['video']} ({row['reason']})" for row in failures])
        raise InputRefused(
            f"{config.questions}: the videos of {lost} of {len(questions)} questions do not decode, more than "
            f"max_failed={config.max_failed:g}: {names}"
        )
    return Shared(config, config.run.dir, questions, cache, encoders, pairs), failures


def _encoders(config: VideoQuestionsConfig) -> tuple[ClipConfig, dict[str, Arm], list[str]]:
    """(the clip that all models are shown, encoders by digest, the digest of each model's)."""
    from pipelines.language_model import load_seeing_encoder

    arms, names, clips = {}, [], []
    for uri in config.model:
        seeing = load_seeing_encoder(uri)
        arm = Arm("trained", seeing.encoder.config, dict(seeing.encoder.state_dict()))
        arms[arm.digest] = arm
        names.append(arm.digest)
        clips.append((seeing.clip.num_frames, seeing.clip.crop_size))
        if clips[-1] != clips[0]:
            raise UsageError(f"model: {uri} is shown clips of {clips[-1]} (frames, pixels), {config.model[0]} of {clips[0]}")
    return seeing.clip, arms, names


_ANSWERERS: dict[tuple[str, str], Any] = {}
"""The model of this process: one language model at a time is held."""


def _ask(unit: Unit, shared: Shared) -> list[str]:
    """Put a chunk of the questions in every way, and leave the answers."""
    from pipelines.language_model import load_video_language_model

    torch.set_num_threads(1)
    config = shared.config
    key = (config.model[unit.seed], evaluate_arms.device(config.gpus))
    if key not in _ANSWERERS:
        _ANSWERERS.clear()
        _ANSWERERS[key] = load_video_language_model(*key)
    model = _ANSWERERS[key]
    first = unit.chunk * config.chunk
    numbers = [n for n in range(first, min(first + config.chunk, len(shared.questions))) if shared.items[n][0] >= 0]
    wanted = {item for number in numbers for item in shared.items[number]}
    answers, refused = [], []
    if numbers:
        found = features.read(shared.cache, [shared.encoders[unit.seed]], wanted)
        place = {item: row for row, item in enumerate(found.kept.tolist())}
        tokens = found.x[shared.encoders[unit.seed]]
        for start in range(0, len(numbers), config.batch):
            part = numbers[start : start + config.batch]
            rows = [[place[shared.items[n][way]] for n in part] for way in range(2)]
            visual = {VIDEO: model.project(tokens[rows[0]]), SHUFFLED: model.project(tokens[rows[1]]), BLIND: None}
            told, lost = _answered(model, [shared.questions[n] for n in part], visual, config)
            answers += told
            refused += lost
    evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | {"answers": answers, "refused": refused})
    return [unit.name]


def _answered(
    model: Any, questions: list[Question], visual: dict[str, Tensor | None], config: VideoQuestionsConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of `answered`, a row for each question that the model cannot be asked): one that is too long costs no other."""
    try:
        return answered(model, questions, visual, config), []
    except (InputRefused, TemplateRefused) as refusal:
        if len(questions) == 1:
            return [], [{"video": questions[0].id, "reason": UNASKABLE, "detail": str(refusal)}]
    rows, refused = [], []
    for number, question in enumerate(questions):
        alone = {way: None if seen is None else seen[number : number + 1] for way, seen in visual.items()}
        found, lost = _answered(model, [question], alone, config)
        rows += found
        refused += lost
    return rows, refused


def answered(
    model: Any, questions: list[Question], visual: dict[str, Tensor | None], config: VideoQuestionsConfig
) -> list[dict[str, Any]]:
    """One row a question and way: {id, way, category} and what each method that suits it found.

    `visual` [B, Q, L] of the questions by way, None for the model that sees nothing; `model` is an Answerer.
    """
    from pipelines.language_model import Prompt

    rows: list[dict[str, Any]] = []
    choice = [n for n, one in enumerate(questions) if one.options]
    free = [n for n, one in enumerate(questions) if not one.options]
    for way, shown in visual.items():
        mine = [{"id": one.id, "way": way, "category": one.category} for one in questions]

        def prompts(
            numbers: list[int], texts: list[str], shown: Tensor | None = shown
        ) -> list[Prompt]:  # bound now: the loop goes on
            return [Prompt([("user", text)], None if shown is None else shown[n]) for n, text in zip(numbers, texts, strict=True)]

        if choice and LIKELIHOOD in config.methods:
            asked = prompts(choice, [vidqa_scoring.plain(questions[n].question) for n in choice])
            for n, scores in zip(choice, model.score(asked, [questions[n].options for n in choice]), strict=True):
                values = scores.per_token if config.normalise else scores.total
                taken = int(np.argmax(values))
                mine[n] |= {"likelihood": taken == questions[n].right, "scores": [round(one, 4) for one in values]}
        if choice and LETTER in config.methods:
            asked = prompts(choice, [vidqa_scoring.lettered(questions[n].question, questions[n].options) for n in choice])
            for n, text in zip(choice, model.generate(asked, config.max_new_tokens), strict=True):
                taken = vidqa_scoring.letter_of(text, questions[n].options)
                mine[n] |= {"letter": taken == questions[n].right, "said": text, "unread": taken is None}
        if free:
            asked = prompts(free, [vidqa_scoring.plain(questions[n].question) for n in free])
            for n, text in zip(free, model.generate(asked, config.max_new_tokens), strict=True):
                right = questions[n].answer
                mine[n] |= {
                    "exact": vidqa_scoring.exact(text, right),
                    "relaxed": vidqa_scoring.relaxed(text, right),
                    "said": text,
                }
        rows += mine
    return rows


def _finish(config: VideoQuestionsConfig, asked: Asked, units: list[Unit], failures: list[dict[str, Any]]) -> dict[str, Any]:
    """Result and picture. Returns the result. Raises InputRefused where too many questions were too long."""
    parts = {unit: evaluate_arms.read_unit(config.run.dir, unit.name) for unit in units}
    answers = [
        evaluate_vidqa_table.table_of([row for unit in units if unit.seed == seed for row in parts[unit]["answers"]])
        for seed in range(config.seeds)
    ]
    refused = {row["video"]: row for part in parts.values() for row in part["refused"]}
    if len(refused) > config.max_failed * len(asked.questions):
        first = next(iter(refused.values()))
        raise InputRefused(
            f"{len(refused)} of {len(asked.questions)} questions cannot be asked, more than max_failed={config.max_failed:g}: "
            f"{first['video']}: {first['detail']}"
        )
    failures = [*failures, *refused.values()]
    if refused:  # of every model the same questions
        keep = [pc.invert(pc.is_in(table["id"], pa.array(sorted(refused), pa.string()))) for table in answers]
        answers = [table.filter(mask) for table, mask in zip(answers, keep, strict=True)]
    chances = {one.id: 1 / len(one.options) for one in asked.questions if one.options}
    scores = evaluate_vidqa_table.summary(answers, chances)
    result = {
        "task": "vidqa",
        "lead": f"{scores['questions']} questions, put to the model as it is, blind, and before shuffled frames.",
        "catalog": config.catalog,
        "models": config.model,
        "seeds": config.seeds,
        "list": {"uri": config.questions, "format": config.format, "bad": evaluate_arms.failures_told(asked.bad)},
        "failures": evaluate_arms.failures_told(failures),
        "ways": list(WAYS),
        **scores,
        "pictures": [{"file": evaluate_vidqa_table.ACCURACY, "caption": "Accuracy beside both controls. Dashed: guessing."}],
    }
    picture = evaluate_vidqa_table.picture(result)
    storage.write_bytes(storage.join(config.run.dir, evaluate_vidqa_table.ACCURACY), picture)
    run_folder.write_json(config.run.dir, run_folder.RESULT, result)
    return result
