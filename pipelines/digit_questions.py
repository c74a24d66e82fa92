"""Questions about moving digits: the bundled task of video question answering. No single frame answers them, and no words do.

    direction   one digit drifts: "Which way does the 7 move?", one of 8
    which       two digits drift apart by 90 degrees or more: "Which digit moves left?", one of the two
    speed       one digit drifts at one speed for half of the clip and at another one then: "Does the 7 get faster or slower?"
    digit       one digit drifts: "Which digit is it?"; a single frame shows it, so shuffled frames do too

Answers come in turn and all else is drawn, so a model that sees nothing is right by chance. Train, validation and test show other
handwritten digits, as moving_digits.py has it.

    OUT/PART/*.tar               train, validation and test: clips as H.264
    OUT/{plain,lettered}.jsonl   conversations (LLaVA's form) for `jepa align`, of the training part
    OUT/{validation,test}.jsonl  questions for `jepa evaluate vidqa format=table`
    OUT/digit_questions.json     what was asked for; written last

Legend: T frames, S side of a frame in pixels.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from pipelines import moving_digits, storage, vidqa_scoring
from pipelines.bench_config import LevelName, Split
from pipelines.bench_vidqa_config import QuestionsConfig
from pipelines.errors import UsageError
from pipelines.moving_digits import CLIPS_PER_TAR, DIRECTIONS, INSTANCES, LEVELS, NUM_FRAMES

WAYS = ("right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
"""Words of moving_digits.DIRECTIONS."""
PACES = ("faster", "slower")
APART = 2
"""Least difference between the directions of two digits, in eighths of a turn."""
PARTS: tuple[Split, ...] = ("train", "validation", "test")
MARKER = "digit_questions.json"
TRAINED = ("plain", "lettered")
"""Lists of conversations of the training part."""


class Asked(NamedTuple):
    """A clip and what is asked about it."""

    frames: np.ndarray
    """uint8 [T, S, S, 3]"""
    kind: str
    question: str
    options: tuple[str, ...]
    answer: int
    """Number of the right option."""
    instances: tuple[int, ...]
    """Handwritten digits that are shown."""


def make(config: QuestionsConfig, split: Split, index: int) -> Asked:
    """Clip `index` of a part and its question: the same arguments give the same pixels and words."""
    kinds = tuple(config.train_kinds if split == "train" else config.kinds)
    # Other draws than make_clip's, which takes three numbers.
    rng = np.random.default_rng([config.seed, list(INSTANCES).index(split), index, len(INSTANCES)])
    turn, kind = index // len(kinds), kinds[index % len(kinds)]
    maker = {"direction": _direction, "digit": _digit, "which": _which, "speed": _speed}[kind]
    drawn, question, options, answer, instances = maker(rng, config, split, turn)
    return Asked(moving_digits.shown(rng, config.level, split, drawn, config.noise), kind, question, options, answer, instances)


def _direction(rng: np.random.Generator, config: QuestionsConfig, split: Split, turn: int) -> tuple[Any, ...]:
    instance, way = _one_of(rng, config, split), turn % DIRECTIONS
    drawn = moving_digits.ink(config.level, instance, _track(rng, config.level, way))
    return drawn, f"Which way does the {_name(instance)} move?", WAYS, way, (instance,)


def _digit(rng: np.random.Generator, config: QuestionsConfig, split: Split, turn: int) -> tuple[Any, ...]:
    answer = turn % len(config.digits)
    instance = _instance(rng, split, config.digits[answer])
    drawn = moving_digits.ink(config.level, instance, _track(rng, config.level, int(rng.integers(DIRECTIONS))))
    return drawn, "Which digit is it?", tuple(map(str, config.digits)), answer, (instance,)


def _which(rng: np.random.Generator, config: QuestionsConfig, split: Split, turn: int) -> tuple[Any, ...]:
    """The asked way comes in turn, and so does whether the asked digit is the smaller one; options ascend."""
    asked = (turn // 2) % DIRECTIONS
    other = (asked + int(rng.integers(APART, DIRECTIONS - APART + 1))) % DIRECTIONS
    digits = sorted(rng.choice(config.digits, 2, replace=False).tolist())
    mine = turn % 2
    pair = tuple(_instance(rng, split, digit) for digit in digits)
    tracks = [_track(rng, config.level, asked if place == mine else other) for place in range(2)]
    drawn = np.maximum(*(moving_digits.ink(config.level, one, track) for one, track in zip(pair, tracks, strict=True)))
    return drawn, f"Which digit moves {WAYS[asked]}?", tuple(map(str, digits)), mine, pair


def _speed(rng: np.random.Generator, config: QuestionsConfig, split: Split, turn: int) -> tuple[Any, ...]:
    """Slow is the slower third of the level's speeds, fast the faster third."""
    instance, (least, most) = _one_of(rng, config, split), LEVELS[config.level].speed
    third = (most - least) / 3
    slow, fast = rng.uniform(least, least + third), rng.uniform(most - third, most)
    first, then = (slow, fast) if turn % 2 == 0 else (fast, slow)
    steps = np.r_[0.0, np.full(NUM_FRAMES // 2 - 1, first), (first + then) / 2, np.full(NUM_FRAMES // 2 - 1, then)]
    drawn = moving_digits.ink(config.level, instance, _track(rng, config.level, int(rng.integers(DIRECTIONS)), steps))
    return drawn, f"Does the {_name(instance)} get faster or slower?", PACES, turn % 2, (instance,)


def _track(rng: np.random.Generator, level: LevelName, way: int, steps: np.ndarray | None = None) -> np.ndarray:
    """Places (y, x) float64 [T, 2] of a digit that moves by `steps` [T] pixels, at one drawn speed where there are none."""
    steps = np.r_[0.0, np.full(NUM_FRAMES - 1, rng.uniform(*LEVELS[level].speed))] if steps is None else steps
    return rng.uniform(0, LEVELS[level].size, 2) + np.cumsum(steps)[:, None] * moving_digits.heading(way)


def _one_of(rng: np.random.Generator, config: QuestionsConfig, split: Split) -> int:
    return _instance(rng, split, int(rng.choice(config.digits)))


def _instance(rng: np.random.Generator, split: Split, digit: int) -> int:
    """A handwritten digit of a part."""
    first, end = INSTANCES[split]
    return int(first + rng.choice(np.flatnonzero(moving_digits.digits()[1][first:end] == digit)))


def _name(instance: int) -> str:
    return str(moving_digits.digits()[1][instance])


def write(config: QuestionsConfig, out: str, on_tar: Callable[[int], None] = lambda clips: None) -> None:
    """Generate and encode all parts below `out`, unless they are there. `on_tar` is told how many clips are done.

    Raises InputRefused where scikit-learn is not installed, UsageError when `out` holds questions of another configuration.
    """
    out, wanted = storage.normalize(out), asdict(config)
    marker = storage.join(out, MARKER)
    if storage.list_files(out, (MARKER,), missing_ok=True):
        if json.loads(storage.read_bytes(marker)) != json.loads(json.dumps(wanted)):
            raise UsageError(f"{out} holds questions about digits of another configuration: choose another folder")
        return
    done = 0
    for split in PARTS:
        lines: dict[str, list[dict[str, Any]]] = {name: [] for name in (TRAINED if split == "train" else (split,))}
        for start in range(0, getattr(config, split), CLIPS_PER_TAR):
            indices = range(start, min(start + CLIPS_PER_TAR, getattr(config, split)))
            clips = {f"{split}-{index:06}.mp4": make(config, split, index) for index in indices}
            tar = moving_digits.tar_of({name: clip.frames for name, clip in clips.items()})
            storage.write_bytes(storage.join(out, split, f"{split}-{start // CLIPS_PER_TAR:03}.tar"), tar)
            for index, (name, clip) in zip(indices, clips.items(), strict=True):
                rows = conversations(name, clip, config.seed, index) if split == "train" else (question(name, clip),)
                for told, row in zip(lines.values(), rows, strict=True):
                    told.append(row)
            done += len(clips)
            on_tar(done)
        for name, rows in lines.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_bytes(storage.join(out, f"{name}.jsonl"), text.encode())
    storage.write_bytes(marker, json.dumps(wanted).encode())


def question(video: str, clip: Asked) -> dict[str, Any]:
    """A row of vidqa_formats' table."""
    return {
        "id": video.partition(".")[0],
        "video": video,
        "question": clip.question,
        "options": list(clip.options),
        "answer": clip.options[clip.answer],
        "category": clip.kind,
    }


def conversations(video: str, clip: Asked, seed: int, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two ways of asking, in the order of TRAINED: plainly, and with lettered options in drawn order."""
    order = np.random.default_rng([seed, index, 7]).permutation(len(clip.options)).tolist()
    options = [clip.options[place] for place in order]
    letter = vidqa_scoring.LETTERS[order.index(clip.answer)]
    plain = (vidqa_scoring.plain(clip.question), clip.options[clip.answer])
    rows = []
    for way, (asked, answer) in zip(TRAINED, (plain, (vidqa_scoring.lettered(clip.question, options), letter)), strict=True):
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"{video.partition('.')[0]}-{way}", "video": video, "conversations": turns})
    return tuple(rows)
