"""Questions about videos: what is generated, what benchmarks publish, how answers are judged, and the whole way at toy size."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pipelines import (
    ask,
    bench_vidqa,
    digit_questions,
    evaluate_vidqa,
    evaluate_vidqa_table,
    moving_digits,
    vidqa_formats,
    vidqa_scoring,
)
from pipelines.bench_vidqa_config import KINDS, QuestionsConfig, VidQABenchConfig
from pipelines.cli import main
from pipelines.errors import ConditionMissed, InputRefused, UsageError
from pipelines.language_model import Scores
from pipelines.moving_digits import DIRECTIONS, INSTANCES
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.vidqa_config import AskConfig, VideoQuestionsConfig
from pipelines.vidqa_formats import Question

pytestmark = pytest.mark.vidqa


# The bundled task


def moved(frames: np.ndarray) -> np.ndarray:
    """(y, x) by which the picture moves between neighbouring frames, on the torus: [T - 1, 2]."""
    spectra = np.fft.fft2(frames[..., 0].astype(float))
    cross = [after * np.conj(before) for before, after in pairwise(spectra)]
    return np.array([[-np.angle(c[1, 0]), -np.angle(c[0, 1])] for c in cross]) * frames.shape[1] / (2 * np.pi)


def test_answers_are_what_the_pixels_show():
    for index in range(4 * DIRECTIONS):
        clip = digit_questions.make(QuestionsConfig(noise=2.0), "train", index)
        y, x = moved(clip.frames).mean(axis=0)
        if clip.kind == "direction":
            turned = np.degrees(np.arctan2(-y, x)) - 45 * clip.answer
            assert abs((turned + 180) % 360 - 180) < 22.5, index
            assert f"the {moving_digits.digits()[1][clip.instances[0]]} move" in clip.question
        elif clip.kind == "speed":
            paces = np.hypot(*moved(clip.frames).T)
            assert ("faster", "slower")[clip.answer] == ("faster" if paces[4:].mean() > paces[:3].mean() else "slower")
        else:
            digits = [str(moving_digits.digits()[1][one]) for one in clip.instances]
            assert set(digits) <= set(clip.options)
            assert clip.options[clip.answer] == digits[clip.answer if clip.kind == "which" else 0]


def test_of_two_digits_the_asked_one_moves_as_asked(monkeypatch):
    """Each digit's ink is drawn by its track: the one that is the answer goes the asked way, the other 90 degrees off or more."""
    drawn = []
    real = moving_digits.ink
    monkeypatch.setattr(moving_digits, "ink", lambda level, one, track: drawn.append((one, track)) or real(level, one, track))
    for index in range(2 * DIRECTIONS):
        drawn.clear()
        clip = digit_questions.make(QuestionsConfig(kinds=["which"], train_kinds=["which"]), "test", index)
        ways = {}
        for instance, track in drawn:
            y, x = track[-1] - track[0]
            ways[instance] = round(np.degrees(np.arctan2(-y, x)) / 45) % 8
        mine, other = ways[clip.instances[clip.answer]], ways[clip.instances[1 - clip.answer]]
        assert clip.question == f"Which digit moves {digit_questions.WAYS[mine]}?"
        assert min((mine - other) % 8, (other - mine) % 8) >= digit_questions.APART


def test_words_alone_are_right_by_chance_and_parts_share_no_digit():
    seen = {}
    for split in ("train", "validation", "test"):
        clips = [digit_questions.make(QuestionsConfig(seed=1), split, index) for index in range(320)]
        seen[split] = {one for clip in clips for one in clip.instances}
        first, end = INSTANCES[split]
        assert all(first <= one < end for one in seen[split])
        for kind in KINDS:
            mine = [clip for clip in clips if clip.kind == kind]
            counts = np.bincount([clip.answer for clip in mine], minlength=len(mine[0].options))
            assert counts.max() - counts.min() <= 1, (kind, counts)
        asked = [(clip.question, clip.answer) for clip in clips if clip.kind == "which"]
        for way in digit_questions.WAYS:  # neither does the asked way tell whether it is the smaller digit
            answers = [answer for question, answer in asked if question.endswith(f" {way}?")]
            assert answers.count(0) == answers.count(1)
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    again = digit_questions.make(QuestionsConfig(seed=1), "train", 5)
    assert np.array_equal(again.frames, digit_questions.make(QuestionsConfig(seed=1), "train", 5).frames)


def test_files_are_conversations_and_questions(tmp_path):
    config = QuestionsConfig(train=8, validation=2, test=4)
    digit_questions.write(config, str(tmp_path))
    lists = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("plain", "lettered")]
    assert [len(lines) for lines in lists] == [8, 8]
    plain, letter = (json.loads(lines[0])["conversations"] for lines in lists)
    assert plain[0]["value"].startswith("<video>\nWhich way does the ")
    chosen = [line for line in letter[0]["value"].splitlines() if line.startswith(f"{letter[1]['value']}. ")]
    assert chosen == [f"{letter[1]['value']}. {plain[1]['value']}"], "the letter is that of the plain answer"
    questions, bad = vidqa_formats.read(str(tmp_path / "test.jsonl"), "table")
    assert [one.category for one in questions] == list(KINDS)
    assert not bad
    assert (tmp_path / "test" / "test-000.tar").stat().st_size > 4 * 1000
    digit_questions.write(config, str(tmp_path))  # is there already
    with pytest.raises(UsageError, match="another configuration"):
        digit_questions.write(QuestionsConfig(train=9, validation=2, test=4), str(tmp_path))


# Formats


def written(folder: Path, name: str, tree: object) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return str(path)


def test_perception_test(tmp_path):
    row = {"id": 3, "question": "What?", "options": ["a", "b", "c"], "answer_id": 1, "area": "physics", "reasoning": "predictive"}
    rows = [row, {**row, "id": 4, "answer_id": 5}, {**row, "id": 5, "answer_id": None}, {**row, "id": 3}]
    nested = {"video_1": {"metadata": {}, "mc_question": rows}, "video_2": {"metadata": {}}}
    questions, bad = vidqa_formats.read(written(tmp_path, "mc_question_valid.json", nested), "perception_test")
    assert questions == [Question("video_1-3", "video_1", "What?", ("a", "b", "c"), "b", "physics / predictive")]
    assert questions[0].right == 1
    reasons = [one["reason"] for one in bad]
    assert reasons == ["answer_not_option", "no_answer", "twice", "no_question"]
    flat = [{"video_name": "v", "question_id": "7", "question": "Q", "options": ["x", "y"], "answer_id": "1", "area": "memory"}]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "validation-00000-of-00001.parquet")
    questions, _ = vidqa_formats.read(str(tmp_path / "validation-00000-of-00001.parquet"), "perception_test")
    assert questions == [Question("v-7", "v", "Q", ("x", "y"), "y", "memory")]


def test_mvbench_and_tvbench_are_folders_of_tasks(tmp_path):
    row = {"video": "a/b.mp4", "question": "Q?", "candidates": ["One.", "Two."], "answer": "Two."}
    written(tmp_path, "json/action_sequence.json", [{**row, "start": 1.5, "end": 3}, {**row, "start": 4, "end": 2}])
    written(tmp_path, "json/moving_count.json", [row, {**row, "answer": "three"}, {**row, "candidates": ["One."]}, 7])
    for form in ("mvbench", "tvbench"):
        questions, bad = vidqa_formats.read(str(tmp_path / "json"), form)
        assert [(one.id, one.category, one.start, one.end) for one in questions] == [
            ("action_sequence-0", "action_sequence", 1.5, 3.0),
            ("moving_count-0", "moving_count", None, None),
        ]
        assert [one["reason"] for one in bad] == ["bad_stretch", "answer_not_option", "no_options", "bad_row"]


def test_tempcompass_has_its_options_in_the_question(tmp_path):
    choice = {"question": "What happens?\nA. it falls\nB. it rises", "answer": "B. it rises"}
    written(tmp_path, "multi-choice.json", {"v1": {"direction": [choice, {**choice, "answer": "D. it stays"}]}})
    written(tmp_path, "yes_no.json", {"v1": {"speed": [{"question": "Is it slow?", "answer": "yes"}]}})
    match = {"question": "Which fits better?\nOption 1: a man runs\nOption 2: a man walks", "answer": "Option 2: a man walks"}
    written(tmp_path, "caption_matching.json", {"v2": {"action": [match, {**match, "answer": "Option 1"}]}})
    questions, bad = vidqa_formats.read(str(tmp_path), "tempcompass")
    told = {(one.video, one.category): (one.question, one.options, one.answer) for one in questions}
    assert told["v1", "direction"] == ("What happens?", ("it falls", "it rises"), "it rises")
    assert told["v1", "speed"] == ("Is it slow?", ("yes", "no"), "yes")
    assert [one.answer for one in questions if one.video == "v2"] == ["a man walks", "a man runs"]
    assert [one["reason"] for one in bad] == ["answer_not_option"]


def test_a_table_may_be_open_and_bad_lines_are_counted(tmp_path):
    lines = ['{"video": "v", "question": "Q", "answer": "red"}', "{cut", '{"video": "v", "question": " ", "answer": "a"}']
    lines += [
        '{"video": "v", "question": "Q", "options": ["a", "b"], "answer": "(B)", "id": 9}',
        '{"question": "Q", "answer": "a"}',
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    questions, bad = vidqa_formats.read(str(tmp_path / "q.jsonl"), "table")
    assert [(one.id, one.options, one.answer) for one in questions] == [("q-0", (), "red"), ("9", ("a", "b"), "b")]
    assert [one["reason"] for one in bad] == ["bad_row", "no_question", "no_video"]
    assert {one["reason"] for one in bad} <= set(vidqa_formats.REASONS)
    (tmp_path / "one.jsonl").write_text(lines[0].replace("Q", "Q\u2028\x85?"), "utf-8")
    assert [one.question for one in vidqa_formats.read(str(tmp_path / "one.jsonl"), "table")[0]] == ["Q\u2028\x85?"]


@pytest.mark.parametrize(
    ("name", "data", "form", "match"),
    [
        ("a.json", b"\xff\xfe{", "table", "not UTF-8"),
        ("a.json", b"[1, 2", "table", "neither JSON"),
        ("a.json", b'{"v": {}}', "mvbench", "wants a list"),
        ("a.json", b"[]", "table", "no question"),
        ("a.parquet", b"none", "table", "no Parquet"),
        ("a.json", b"[]", "videomme", "none of"),
    ],
)
def test_files_of_no_format_are_refused(tmp_path, name, data, form, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputRefused, match=match):
        vidqa_formats.read(str(tmp_path / name), form)


# Judging


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("B", 1),
        ("(b)", 1),
        ("B.", 1),
        ("B. a dog", 1),
        ("The answer is C", 2),
        ("the answer is (b).", 1),
        ("The answer is a dog", 1),
        ("Option A, since a dog barks", 0),
        ("a dog", 1),
        ("It is a bird, I think", 2),
        ("A dog", 1),
        ("E", None),
        ("", None),
        ("a cat or a dog", None),
    ],
)
def test_letters_are_found_in_what_is_said(text, number):
    assert vidqa_scoring.letter_of(text, ["a cat", "a dog", "a bird"]) == number


def test_exact_and_relaxed():
    assert vidqa_scoring.exact(" Red. ", "red")
    assert not vidqa_scoring.exact("a red car", "red")
    assert vidqa_scoring.relaxed("A red car.", "the red car")
    assert vidqa_scoring.relaxed("It is red.", "red")
    assert not vidqa_scoring.relaxed("reddish", "red")
    assert vidqa_scoring.relaxed("three", "3")
    assert vidqa_scoring.relaxed("41", "40")
    assert not vidqa_scoring.relaxed("43", "40")
    assert not vidqa_scoring.relaxed("", "red")


def test_shuffled_times_are_the_same_in_an_order_of_the_name():
    pts = np.arange(8) * 512
    found = evaluate_vidqa.shuffled(pts, 0, "video")
    assert sorted(found) == pts.tolist()
    assert not np.array_equal(found, pts)
    assert np.array_equal(found, evaluate_vidqa.shuffled(pts, 0, "video"))
    assert not np.array_equal(found, evaluate_vidqa.shuffled(pts, 1, "video"))
    assert evaluate_vidqa.shuffled(pts[:2], 0, "video").tolist() == [512, 0], "two frames are always exchanged"


class Reading:
    """An answerer that sees the answer's number in the first visual value, and takes the first option when blind."""

    def score(self, prompts, choices):
        seen = [0 if one.visual is None else int(one.visual[0, 0]) for one in prompts]
        return [
            Scores([float(n == place) for n in range(len(options))], [0.0]) for place, options in zip(seen, choices, strict=True)
        ]

    def generate(self, prompts, count):
        return [
            "unknown" if one.visual is None else "AB"[int(one.visual[0, 0])] if "A. " in one.turns[0][1] else "it is red"
            for one in prompts
        ]


def made_answers() -> tuple[list[Question], list[dict]]:
    questions = [Question(str(n), "v", "Which?", ("x", "y"), "xy"[n % 2], f"c{n % 4 // 2}") for n in range(8)]
    questions.append(Question("open", "v", "Colour?", (), "red", "c0"))
    right = torch.tensor([[[float(n % 2)]] for n in range(8)] + [[[0.0]]])
    config = load(VideoQuestionsConfig, "evaluate vidqa", ["model=a", "catalog=b", "questions=c", "run.dir=d"])
    rows = evaluate_vidqa.answered(Reading(), questions, {"video": right, "shuffled": 1 - right, "blind": None}, config)
    return questions, rows


def test_every_question_is_put_in_all_ways():
    questions, rows = made_answers()
    assert len(rows) == 3 * len(questions)
    video = [row for row in rows if row["way"] == "video"]
    assert all(row["likelihood"] and row["letter"] for row in video[:8])
    assert video[8]["relaxed"]
    assert not video[8]["exact"]
    assert "letter" not in video[8]
    assert not any(row["likelihood"] for row in rows if row["way"] == "shuffled" and row["id"] != "open")
    assert all(row["unread"] for row in rows if row["way"] == "blind" and row["id"] != "open")


def test_a_question_that_is_too_long_costs_no_other():
    class Short(Reading):
        def score(self, prompts, choices):
            if any("long" in prompt.turns[0][1] for prompt in prompts):
                raise InputRefused("a question of 900 tokens")
            return super().score(prompts, choices)

    questions = [Question(name, "v", f"A {name} one?", ("x", "y"), "x", "c") for name in ("short", "long", "other")]
    config = load(VideoQuestionsConfig, "evaluate vidqa", ["model=a", "catalog=b", "questions=c", "run.dir=d"])
    rows, refused = evaluate_vidqa._answered(Short(), questions, {"video": torch.zeros(3, 1, 1), "blind": None}, config)
    assert [row["id"] for row in rows] == ["short", "short", "other", "other"]
    assert [(row["video"], row["reason"]) for row in refused] == [("long", "too_long")]


def test_the_table_has_margins_and_intervals_by_category():
    questions, rows = made_answers()
    table = evaluate_vidqa_table.table_of(rows)
    chances = {one.id: 0.5 for one in questions if one.options}
    result = evaluate_vidqa_table.summary([table], chances)
    arms = {(line["arm"], line["probe"]): line for line in result["arms"]}
    assert arms["video", "likelihood"]["mean"] == 1
    assert arms["video", "likelihood"]["by"] == "test rows"
    assert arms["blind", "likelihood"]["mean"] == 0.5
    assert arms["shuffled", "likelihood"]["mean"] == 0
    assert arms["video", "relaxed"]["mean"] == 1
    assert arms["video", "exact"]["mean"] == 0
    line = next(one for one in result["categories"] if one["category"] == "c0" and one["probe"] == "likelihood")
    assert line["questions"] == 4
    assert line["chance"] == 0.5
    assert line["margins"]["blind"]["mean"] == 0.5
    assert line["margins"]["blind"]["low"] < 0.5 < line["margins"]["blind"]["high"]
    assert result["unread_letters"] == {"video": 0, "shuffled": 0, "blind": 1}
    several = evaluate_vidqa_table.summary([table] * 3, chances)
    assert several["categories"][0]["margins"]["shuffled"]["values"] == [1, 1, 1]
    assert evaluate_vidqa_table.picture(result).startswith(b"\x89PNG")
    columns, lines = evaluate_vidqa_table.category_table(result)
    assert all(len(one) == len(columns) for one in lines)


def benched(direction: float, which: float) -> dict:
    def line(category: str, mean: float) -> dict:
        margins = {other: {"values": [mean - 0.5 + 0.01 * seed for seed in range(3)]} for other in ("blind", "shuffled")}
        return {"category": category, "probe": "likelihood", "margins": margins, "video": {"values": [mean] * 3}}

    return {"categories": [line("direction", direction), line("which", which)]}


@pytest.mark.parametrize(("which", "missed"), [(0.75, set()), (0.6, {"which over blind", "which over shuffled"})])
def test_margins_that_are_too_small_are_named(which, missed):
    config = load(VidQABenchConfig, "bench vidqa", ["run.dir=a"])
    result = bench_vidqa.summary({"pretrained": benched(0.9, which), "random": benched(0.8, 0.5)}, config)
    assert {one["what"] for one in result["conditions"] if not one["holds"]} == missed
    first = result["conditions"][0]
    assert first["mean"] == pytest.approx(41)
    assert first["low"] == pytest.approx(41 - 4.303 / 3**0.5, rel=1e-3)
    assert [one["mean"] for one in result["reported"]] == pytest.approx([10, 100 * (which - 0.5)])
    columns, rows = bench_vidqa.margins(result)
    assert all(len(row) == len(columns) for row in rows)


@pytest.mark.parametrize(
    "words",
    [["methods=[guess]"], ["methods=[]"], ["max_bad=1"], ["chunk=0"], ["format=videomme"], ["shuffle_seed=-1"]],
)
def test_options_that_cannot_be_meant(words):
    with pytest.raises(UsageError):
        load(VideoQuestionsConfig, "evaluate vidqa", ["model=a", "catalog=b", "questions=c", "run.dir=d", *words])


@pytest.mark.parametrize("methods", ["[open]", "[letters]", "[]"])
def test_the_benchmark_refuses_methods_before_it_trains(methods):
    with pytest.raises(UsageError, match="methods"):
        load(VidQABenchConfig, "bench vidqa", ["preset=tiny", "run.dir=d", f"methods={methods}"])


# The whole way


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """A finished toy benchmark: nothing has been learnt, so its conditions are missed."""
    folder = tmp_path_factory.mktemp("vidqa") / "bench"
    config = load(VidQABenchConfig, "bench vidqa", ["preset=tiny", "smoke=true", f"run.dir={folder}", "control=false"])
    with open(os.devnull, "w") as silence, pytest.raises(ConditionMissed, match="direction over blind"):
        bench_vidqa.run(config, Reporter(silence))
    return folder


def test_the_benchmark_runs_and_continues(bench):
    result = json.loads((bench / "result.json").read_text())
    found = result["arms"]["pretrained"]
    assert found["questions"] == 16
    assert {line["category"] for line in found["categories"]} == set(KINDS)
    assert {line["probe"] for line in found["arms"]} == {"likelihood", "letter"}
    answers = bench / "answers" / "pretrained-1"
    assert (answers / "accuracy.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in bench.rglob("*.safetensors")}
    words = ["preset=tiny", "smoke=true", f"run.dir={bench}", "control=false", "require=false"]
    assert main(["bench", "vidqa", *words]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in bench.rglob("*.safetensors")}, "nothing is trained again"


def test_a_killed_evaluation_goes_on_with_what_is_missing(bench):
    folder = bench / "answers" / "pretrained-1"
    result, rows = folder / "result.json", sorted((folder / "results").iterdir())
    before = json.loads(result.read_text())
    written = [path.stat().st_mtime_ns for path in rows]
    assert len(rows) == 1
    result.unlink()
    questions, run = bench / "questions" / "test.jsonl", bench / "align" / "pretrained-s0"
    catalog = json.loads((bench / "stages" / "ingest-test.json").read_text())["catalog"]
    words = [f"model=[{run}]", f"catalog={catalog}", f"questions={questions}", "methods=[likelihood,letter]", f"run.dir={folder}"]
    assert main(["evaluate", "vidqa", *words]) == 0
    assert [path.stat().st_mtime_ns for path in rows] == written, "no question is asked again"
    assert json.loads(result.read_text()) == before
    assert main(["evaluate", "vidqa", *words, "chunk=3"]) == 2, "not with other options"
    assert main(["report", str(folder), f"out={folder}/report.html"]) == 0
    page = (folder / "report.html").read_text()
    assert "over shuffled" in page
    assert "by category" in page
    other = [*words[:-1], f"run.dir={bench}/other", "categories=[motion]"]
    assert main(["evaluate", "vidqa", *other]) == 2
    (bench / "corrected.jsonl").write_text(questions.read_text().replace('"speed"', '"motion"'))
    other[2] = f"questions={bench}/corrected.jsonl"
    assert main(["evaluate", "vidqa", *other]) == 0, "what was refused is corrected, and what was read is read again"
    asked = json.loads((bench / "other" / "result.json").read_text())
    assert {line["category"] for line in asked["categories"]} == {"motion"}


def test_ask_answers_with_the_frames_that_it_saw(bench, tmp_path, capsys):
    member = digit_questions.make(QuestionsConfig(), "test", 0)
    video = tmp_path / "clip.mp4"
    video.write_bytes(digit_questions.moving_digits.encode_video(member.frames, 8.0, crf=10))
    run = bench / "align" / "pretrained-s0"
    words = [str(run), str(video), member.question, f"frames={tmp_path / 'seen.png'}", "options=[left,right]", "blind=true"]
    assert main(["ask", *words]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {"answer", "blind", "likeliest", "frames"} <= set(told[-1])
    assert Image.open(tmp_path / "seen.png").size[0] > 600
    config = load(AskConfig, "ask", [f"model={run}", f"video={video}", "question=x"])
    model = ask.load_video_language_model(str(run))
    shown, seconds = ask.frames(config, model)
    assert shown.shape == (8, 16, 16, 3)
    assert np.abs(shown.astype(int) - member.frames).mean() < 4, "the frames of the file, in their order"
    assert seconds.tolist() == pytest.approx([n / 8 for n in range(8)])


def test_ask_refuses_what_it_cannot_show(bench, tmp_path):
    run = bench / "align" / "pretrained-s0"
    (tmp_path / "text.mp4").write_text("no video")
    assert main(["ask", str(run), str(tmp_path / "text.mp4"), "What?"]) == 3
    assert main(["ask", str(run), str(tmp_path / "none.mp4"), "What?"]) == 3
    assert main(["ask", str(tmp_path), str(tmp_path / "text.mp4"), "What?"]) == 3
    assert main(["ask", str(run), str(tmp_path / "text.mp4"), "start=3", "end=2", "question=x"]) == 2
