"""Action anticipation: what each protocol shows, its loss and recall, and that only what precedes an action can be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode
from torch.nn import functional as F

from jepa_core.anticipation import Answers, AnticipationHead, HeadSet, class_mean_recall, clip_before, focal_loss
from jepa_core.config import AttentiveConfig, ClipConfig, EncoderConfig, HeadGrid
from jepa_core.encoder import VisionTransformer
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import evaluate_anticipation, ingest, model_folder, run_folder
from pipelines.errors import InputRefused, UsageError
from pipelines.evaluate_anticipation import Action
from pipelines.evaluate_config import AnticipationConfig
from pipelines.ingest_config import IngestConfig
from pipelines.presets import load

SMALL = EncoderConfig(dim=32, depth=1, heads=2, patch_size=8, native_grid=(2, 4, 4))
THREE = AttentiveConfig(depth=1, heads=2, num_queries=3)
FPS, REST, ACTION = 10, 1.5, 1.5
"""Of the videos: seconds of grey before each action, and of the action."""
ACTIONS = 24
COLOURS = [(r, g, b) for r in (40, 200) for g in (40, 120, 220) for b in (40, 200)]


def options(*given: str) -> AnticipationConfig:
    required = ["model=m", "catalog=c", "train=t", "validation=v", "run.dir=r"]
    return load(AnticipationConfig, "evaluate anticipation", [*required, *given])


def test_the_protocols_end_before_the_start_or_before_the_stop():
    np.testing.assert_allclose(clip_before(10.0, 13.0, 4, 8.0, 1.0, "strict"), [8.5, 8.625, 8.75, 8.875])
    np.testing.assert_allclose(clip_before(10.0, 13.0, 4, 8.0, 1.0, "reference"), [11.5, 11.625, 11.75, 11.875])
    np.testing.assert_allclose(clip_before(10.0, 13.0, 4, 8.0, 1.0, "reference", 1.0), clip_before(10, 13, 4, 8, 1, "strict"))


def test_no_strict_frame_lies_within_the_gap_whatever_the_frame_rate():
    pts = np.cumsum(np.random.default_rng(0).integers(1, 90, 600)) + 40  # ms, a variable rate
    clip, config = ClipConfig(num_frames=8, fps=8.0), options("gap=1.0", "train_gap=[0.25,1.75]")
    for number in range(200):
        start = float(np.random.default_rng(number).uniform(0, 20))
        for split, least in (("test", 1.0), ("train", 0.25)):
            action = Action("v", "v", split, start, start + 2, 0, 0, 0)
            shown = evaluate_anticipation.clip_pts(action, number, pts, 0.001, clip, config)
            if shown is None:
                assert start < 1.75 + 0.125
                continue
            assert shown.max() <= (start - least) * 1000 + pts[0]
    late = evaluate_anticipation.clip_pts(Action("v", "v", "test", 0.9, 3.0, 0, 0, 0), 0, pts, 0.001, clip, config)
    assert late is None
    relaxed = options("protocol=reference")
    shown = evaluate_anticipation.clip_pts(Action("v", "v", "test", 0.9, 1.5, 0, 0, 0), 0, pts, 0.001, clip, relaxed)
    assert shown.min() == pts[0], "the reference repeats the first frame"


def test_focal_loss_is_the_references():
    logits, labels = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 2, 2, 5])
    targets, p = F.one_hot(labels, 7).float(), logits.sigmoid()
    plain = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    wanted = ((0.25 * targets + 0.75 * (1 - targets)) * (1 - p_t) ** 2 * plain).sum()
    torch.testing.assert_close(focal_loss(logits, labels), wanted)


def test_recall_is_a_mean_over_classes_among_those_that_occur():
    scores = torch.tensor([[9.0, 8, 7, 0], [9, 8, 7, 0], [0, 9, 8, 7], [9, 8, 0, 7]])
    labels = torch.tensor([0, 0, 0, 3])
    assert class_mean_recall(scores, labels, k=1) == pytest.approx((2 / 3 + 0) / 2 + 1 / 6 * 0)
    assert class_mean_recall(scores, labels, k=2) == 1.0, "classes 1 and 2 do not occur, so none of the two answers is theirs"
    assert class_mean_recall(scores, labels, k=2, among=range(4)) == pytest.approx((2 / 3 + 0) / 2)
    assert class_mean_recall(scores, labels, k=9) == 1.0


def test_heads_learn_three_tasks_at_once_and_are_the_references_modules():
    x, numbers = torch.randn(60, 4, 16, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6
    x += 3 * F.one_hot(numbers, 16)[:, None]
    answers = Answers(numbers % 2, numbers % 3, numbers)
    heads = HeadSet(THREE, 16, (2, 3, 6), HeadGrid((1e-2, 0.0), (0.01,), epochs=30, batch_size=30), seed=0)
    heads.fit(x.half(), answers, seed=0)
    recalls = [[class_mean_recall(s, y, k=1) for s, y in zip(heads.scores(x, head), answers, strict=True)] for head in (0, 1)]
    assert min(recalls[0]) > 0.9, recalls
    assert max(recalls[1]) < 0.8, "a head with a learning rate of 0 stays as it was"
    names = {name.rpartition(".")[0] for name in AnticipationHead(THREE, 16, (2, 3, 6)).state_dict()}
    assert {"verb_classifier", "noun_classifier", "action_classifier", "pooler.cross_attention_block.xattn.kv"} <= names


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gap=-1", ["gap=-1"]),
        ("train_point=[0.0,0.25]", ["train_point", "reference protocol"]),
        ("train_gap=[2.0,1.0]", ["train_gap"]),
        ("attentive.num_queries=1", ["num_queries=1", "verb, noun and action"]),
        ("protocol=shipped", ["protocol", "shipped"]),
    ],
)
def test_options_that_cannot_be_meant_are_usage_errors(given, words):
    with pytest.raises(UsageError) as error:
        options(given)
    assert all(word in str(error.value) for word in words), error.value


def annotated(name: str, verb: int = 0, noun: int = 0) -> Action:
    return Action("", name, "train", 1.0, 2.0, verb, noun, -1)


def test_lists_are_read_and_matched_or_refused_by_name():
    text = "video_id,start_timestamp,stop_timestamp,verb_class,noun_class\nP01_01,00:01:02.50,00:01:04,3,7\n"
    (row,) = evaluate_anticipation.read_annotations(text.encode(), "a.csv", "train")
    assert row == Action("", "P01_01", "train", 62.5, 64.0, 3, 7, -1)
    with pytest.raises(InputRefused, match=r"a\.csv: line 3"):
        evaluate_anticipation.read_annotations((text + "P01_01,00:01:02,soon,3,7\n").encode(), "a.csv", "train")
    videos = [{"id": n, "uri": f"/v/{n}.mp4", "member": "", "digest": n, "content_digest": None} for n in ("a", "b", "c")]
    train = [annotated("a", 5, 1), annotated("b", 5, 1), annotated("a", 9, 4)]
    test = [annotated("c", 5, 1)._replace(split="test"), annotated("c", 9, 1)._replace(split="test")]
    actions, words, notes = evaluate_anticipation.matched(train, test, videos, options("split_seed=1"))
    assert {action.split for action in actions if action.video in "ab"} == {"train", "validation"}
    assert notes["unseen"] >= 1, "verb 9 with noun 1 does not occur in training"
    assert all(words.actions[action.action] == (words.verbs[action.verb], words.nouns[action.noun]) for action in actions)
    with pytest.raises(InputRefused, match=r"1 videos stand in both lists.*a \(train\) and a \(test\)"):
        evaluate_anticipation.matched(train, [annotated("a", 5, 1)._replace(split="test")], videos, options())
    with pytest.raises(InputRefused, match="no action is left for test"):
        evaluate_anticipation.matched(train, [annotated("c", 7, 7)._replace(split="test")], videos, options())
    with pytest.raises(InputRefused, match="nobody"):
        evaluate_anticipation.matched([*train, annotated("nobody")], test, videos, options())


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory, ray_session, reporter) -> Path:
    """Videos in which every action is a colour, after a rest in grey; colours follow each other at random."""
    root, rng = tmp_path_factory.mktemp("anticipation"), np.random.default_rng(0)
    (root / "videos").mkdir()
    rows = {"train": [], "validation": []}
    for split, name in [("train", f"P{n}") for n in range(5)] + [("validation", f"Q{n}") for n in range(2)]:
        frames, order = [], rng.permutation(np.repeat(np.arange(12), ACTIONS // 12))
        for place, action in enumerate(order):
            begin = place * (REST + ACTION) + REST
            rows[split].append(f"{name},{begin},{begin + ACTION},{action % 3},{action // 3}")
            frames += [np.full((32, 32, 3), 128)] * round(REST * FPS) + [np.full((32, 32, 3), COLOURS[action])] * round(
                ACTION * FPS
            )
        noise = rng.integers(-20, 20, (len(frames), 32, 32, 3))
        data = encode(np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8), rate=FPS, options={"preset": "ultrafast"})
        (root / "videos" / f"{name}.mp4").write_bytes(data)
    for split, lines in rows.items():
        (root / f"{split}.csv").write_text("video_id,start,stop,verb_class,noun_class\n" + "\n".join(lines) + "\n")
    ingest.run(IngestConfig(source=str(root / "videos"), catalog=str(root / "catalog"), validate="none"), reporter)
    torch.manual_seed(5)
    state = VisionTransformer(SMALL).state_dict()
    clip = model_folder.ClipFormat(4, 32, 10.0)
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=SMALL), {ENCODER: state}, clip=clip), str(root / "model"))
    return root


def recall(kitchen: Path, reporter, protocol: str, *given: str) -> dict:
    where = [f"{name}={kitchen}/{file}" for name, file in (("model", "model"), ("catalog", "catalog"), ("train", "train.csv"))]
    where += [f"validation={kitchen}/validation.csv", f"run.dir={kitchen}/{protocol}", f"protocol={protocol}", "gap=0.3"]
    small = ["train_gap=[0.3,0.3]", "attentive.depth=1", "attentive.heads=2", "grid.lrs=[0.005]", "grid.weight_decays=[0.01]"]
    config = load(AnticipationConfig, "evaluate anticipation", [*where, *small, "grid.epochs=12", "grid.batch_size=16", *given])
    evaluate_anticipation.run(config, reporter)
    return run_folder.read_json(f"{kitchen}/{protocol}", run_folder.RESULT)


@pytest.mark.ray
def test_the_strict_protocol_cannot_see_what_the_references_shows(kitchen, reporter):
    """The colour is on screen during the action only, and what comes next is random: strict must be at chance, 5 of 12."""
    found = {}
    for protocol in ("strict", "reference"):
        result = recall(kitchen, reporter, protocol, "seeds=1", "controls=[random]")
        found[protocol] = {(line["arm"], line["probe"]): line["mean"] for line in result["arms"]}
        assert result["protocol"] == protocol
        assert protocol in result["lead"]
        assert result["splits"] == {"train": 96, "validation": 24, "test": 48}
    for arm in ("trained", "random"):
        assert found["strict"][arm, "action"] < 0.65, found
        assert found["reference"][arm, "action"] > 0.9, found
    made = {path: path.stat().st_mtime_ns for path in (kitchen / "strict" / "results").glob("*.json")}
    assert len(made) == 2
    recall(kitchen, reporter, "strict", "seeds=1", "controls=[random]")
    assert {path: path.stat().st_mtime_ns for path in made} == made
