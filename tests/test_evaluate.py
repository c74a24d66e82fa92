"""jepa evaluate: which clips stand for a video, probes that read what is there and nothing else, resuming, and refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode, make_frames

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.sampling import segment_frames, segment_times
from jepa_core.weights import ENCODER, PROBE, ModelConfig
from pipelines import (
    convert,
    evaluate_probe,
    evaluate_rows,
    evaluate_table,
    features,
    ingest,
    model_folder,
    pretrain,
    report,
    run_folder,
)
from pipelines.config import ConvertConfig, PretrainConfig, ReportConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.evaluate_config import ProbeEvaluationConfig, ViewsConfig
from pipelines.ingest_config import IngestConfig
from pipelines.label_match import Sample
from pipelines.presets import load

SMALL = EncoderConfig(dim=32, depth=2, heads=2, patch_size=8, native_grid=(2, 4, 4))
HUES = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.2, 0.2, 1.0)}
OPTIONS = [
    "clips.segments=2", "clips.views=3", "attentive.depth=1", "attentive.heads=2", "seeds=2", "few_labels=[0.5]",
    "grid.lrs=[0.003]", "grid.weight_decays=[0.01,0.1]", "grid.epochs=12", "grid.batch_size=8", "from_scratch.epochs=6",
    "from_scratch.batch_size=6",
]  # fmt: skip


def test_segments_spread_over_a_video():
    found = segment_times(10.0, 22.0, 4, 2.0, 3)
    np.testing.assert_allclose(found[:, 0], [10 + 1.25, 14 + 1.25, 18 + 1.25])
    np.testing.assert_allclose(np.diff(found), 0.5)
    tight = segment_times(0.0, 3.0, 4, 2.0, 3)
    np.testing.assert_allclose(tight[:, 0], [0, 0.75, 1.5], err_msg="clips of 1.5 s in parts of 1 s overlap")
    short = segment_times(0.0, 1.0, 4, 2.0, 2)
    np.testing.assert_allclose(short, [[0, 0.5, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("count", "step", "segments"), [(300, 4, 8), (100, 4, 8), (100, 4, 1), (30, 4, 2), (1, 4, 2), (64, 4, 1)]
)
def test_frame_numbers_are_the_references_but_for_its_dice(count, step, segments):
    """Against the reference's loop (video_dataset.py), with the middle of the segment where it draws."""
    fpc, clip = 16, 16 * step
    part, wanted = count // segments, []
    for i in range(segments):
        if part > clip:
            end = clip + (part - clip) // 2
            indices = np.clip(np.linspace(end - clip, end, num=fpc), end - clip, end - 1).astype(np.int64) + i * part
        else:
            length = min(clip, count) - 1
            indices = np.concatenate((np.linspace(0, length, num=length // step), np.ones(fpc - length // step) * length))
            indices = np.clip(indices, 0, max(0, length - 1)).astype(np.int64)
            indices = indices + i * ((count - clip) // (segments - 1) if count > clip else 0)
        wanted.append(indices)
    np.testing.assert_array_equal(segment_frames(count, fpc, step, segments), wanted)
    assert 0 <= np.min(wanted) <= np.max(wanted) < count


def test_a_stretch_of_a_video_shows_only_its_frames():
    pts, clip = np.arange(100) * 40 + 7, ClipConfig(num_frames=4, fps=5.0)
    sample = Sample("v", 0, "train", 1.0, 2.0, "v", "v")
    found = evaluate_rows.segment_pts(pts, 0.001, ViewsConfig(segments=2), clip, sample)
    assert found.shape == (2, 4)
    assert pts[25] <= found.min() <= found.max() <= pts[50]
    by_number = evaluate_rows.segment_pts(pts, 0.001, ViewsConfig(frame_step=2), clip, sample)
    assert (np.diff(by_number[0]) >= 80).all()
    assert pts[25] <= by_number.min() <= by_number.max() <= pts[50]
    assert evaluate_rows.segment_pts(pts, 0.001, ViewsConfig(), clip, sample._replace(start=9.0, stop=10.0)) is None


def test_rows_join_the_clips_of_a_video():
    """Two training rows of one view, one held-out row each of three; a feature names its item, view and clip."""
    samples = [
        Sample(f"v{n}", n % 2, split, None, None, "", "") for n, split in enumerate(["train", "train", "validation", "test"])
    ]
    shape = {"train": 1, "validation": 3, "test": 3}
    rows, count = {}, 0
    for sample in samples:
        size = shape[sample.split] * 2
        rows.setdefault(sample.split, []).append(count + np.arange(size).reshape(-1, 2))
        count += size
    rows = {split: np.stack(found) for split, found in rows.items()}
    labels = {split: np.array([s.label for s in samples if s.split == split]) for split in rows}
    plan = evaluate_rows.Plan([], rows, labels, {split: [s for s in samples if s.split == split] for split in rows}, [], count)
    lost = features.Features(np.delete(np.arange(count), 2), {}, [{"item": 2, "video": "v1", "reason": "crashed", "detail": "x"}])
    with pytest.raises(InputRefused, match=r"1 of 4 samples .*crashed"):
        evaluate_rows.without(plan, lost, 0.1, "list")
    plan = evaluate_rows.without(plan, lost, 0.3, "list")
    assert len(plan.rows["train"]) == 1
    assert [failure["video"] for failure in plan.failures] == ["v1"]
    x = torch.tensor(lost.kept)[:, None, None].repeat(1, 5, 4).half() + torch.arange(4) / 10
    tokens = evaluate_rows.splits_of(plan, lost, x, ["a", "b"], "tokens")
    assert tokens.train.x.shape == (1, 10, 4)
    assert tokens.test.x.shape == (1, 3, 10, 4)
    assert tokens.test.x[0, :, ::5, 0].tolist() == [[10, 11], [12, 13], [14, 15]]
    means = evaluate_rows.splits_of(plan, lost, x, ["a", "b"], "mean")
    assert means.test.x[0, :, 0].tolist() == [10.5, 12.5, 14.5]
    assert evaluate_rows.splits_of(plan, lost, x, ["a", "b"], "flat").test.x[0, 0].item() == 12.5


def test_intervals_come_from_seeds_or_from_test_rows():
    several = evaluate_table.measured([0.5, 0.7], 20)
    assert several["by"] == evaluate_table.SEEDS
    assert several["high"] - 0.6 == pytest.approx(12.706 * 0.1, rel=1e-3), "Student's, of two values 0.2 apart"
    same = evaluate_table.measured([0.5, 0.5], 20)
    assert (same["by"], round(same["low"], 3), round(same["high"], 3)) == (evaluate_table.ROWS, 0.299, 0.701)
    assert evaluate_table.measured([0.5], None)["low"] is None
    assert evaluate_table.difference([0.5], [0.4])["p_t"] is None
    assert evaluate_table.difference([0.5, 0.7], [0.4, 0.3])["mean"] == pytest.approx(0.25)
    assert evaluate_table.confusion([0, 0, 1], [0, 1, 1], 2).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["labels=l", "probes=[linear,svm]"], ["probes", "svm"]),
        (["labels=l", "probes=[]"], ["probes is empty"]),
        (["labels=l", "controls=[pixels,pixels]"], ["controls", "pixels"]),
        (["labels.holdout=l"], ["labels.holdout"]),
        ([], ["labels is missing"]),
        (["labels=l", "model=[]"], ["model=[]"]),
        (["labels=l", "few_labels=[5]"], ["few_labels=[5.0]"]),
        (["labels=l", "clips.views=0"], ["clips.views"]),
        (["labels=l", "clips.fps=4", "clips.frame_step=2"], ["say the same thing twice"]),
        (["labels=l", "max_missing=1"], ["max_missing=1"]),
        (["labels=l", "format=kinetics9"], ["format", "kinetics9"]),
    ],
)
def test_options_that_cannot_be_meant_are_usage_errors(given, words):
    with pytest.raises(UsageError) as error:
        load(ProbeEvaluationConfig, "evaluate probe", ["model=m", "catalog=c", "run.dir=r", *given])
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture(scope="module")
def world(tmp_path_factory, ray_session, reporter) -> Path:
    """Videos of three hues with moving texture, their catalog, a model folder of random weights, and lists."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "videos").mkdir()
    lines, rng = ["path,label,split"], np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3), ("test", 5)):
        for hue, tint in HUES.items():
            for number in range(count):
                name = f"{split}-{hue}-{number}.mp4"
                frames = make_frames(24, 64, 48, seed=int(rng.integers(1 << 30)))
                (root / "videos" / name).write_bytes(encode((frames * tint).astype(np.uint8), options={"preset": "ultrafast"}))
                lines.append(f"elsewhere/{name},{hue},{split}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    shuffled = [line.split(",") for line in lines[1:]]
    for row, label in zip(shuffled, rng.permutation(len(shuffled)), strict=True):
        row[1] = list(HUES)[label % 3]
    (root / "shuffled.csv").write_text("\n".join([lines[0], *map(",".join, shuffled)]) + "\n")
    ingest.run(IngestConfig(source=str(root / "videos"), catalog=str(root / "catalog"), validate="none"), reporter)
    torch.manual_seed(5)
    state = VisionTransformer(SMALL).state_dict()
    clip = model_folder.ClipFormat(4, 32, 10.0)
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=SMALL), {ENCODER: state}, clip=clip), str(root / "model"))
    return root


def probe(world: Path, reporter, *given: str, name: str = "run", labels: str = "labels.csv") -> dict:
    where = [f"model={world}/model", f"catalog={world}/catalog", f"labels={world}/{labels}", f"run.dir={world}/{name}"]
    evaluate_probe.run(load(ProbeEvaluationConfig, "evaluate probe", [*where, *given]), reporter)
    return run_folder.read_json(f"{world}/{name}", run_folder.RESULT)


def accuracy(result: dict) -> dict[tuple[str, str], float]:
    return {(line["arm"], line["probe"]): line["mean"] for line in result["arms"]}


@pytest.mark.ray
def test_every_probe_reads_what_every_arm_shows_and_nothing_is_done_twice(world, reporter):
    result = probe(world, reporter, *OPTIONS, "scratch=true")
    found = accuracy(result)
    columns = {"attentive", "linear", "knn", "attentive 50%", "linear 50%"}
    assert set(found) == {(arm, c) for arm in ("trained", "random", "pixels", "frame_difference") for c in columns} | {
        ("scratch", "supervised")
    }
    for arm in ("trained", "random", "pixels"):
        assert min(found[arm, column] for column in ("attentive", "linear", "knn")) > 0.8, found
    assert found["scratch", "supervised"] > 0.6, found
    assert result["splits"] == {"train": 18, "validation": 9, "test": 15}
    assert result["guessing"] == pytest.approx(1 / 3)
    assert result["classes"] == ["blue", "green", "red"]
    assert np.trace(result["confusion"]["counts"]) / 15 > 0.8
    assert {(line["probe"], line["second"]) for line in result["differences"]} == {
        (column, arm) for column in columns for arm in ("random", "pixels", "frame_difference")
    }
    assert (world / "run" / "attention.png").stat().st_size > 10_000
    made = model_folder.read(f"{world}/run/model")
    assert made.parts[PROBE]["linear.weight"].shape == (3, 32)
    assert made.source["classes"] == result["classes"]
    there = {"from_format": "jepa", "to_format": "vjepa2", "source": f"{world}/run/model"}
    convert.run(ConvertConfig(**there, destination=f"{world}/probe.pt"), reporter)
    assert set(torch.load(f"{world}/probe.pt")) >= {"encoder", "classifiers"}

    page = report.run(ReportConfig(f"{world}/run"), reporter)
    text = Path(page["report"]).read_text()
    assert page["sections"] == ["evaluate"]
    assert text.count("data:image/png") == 3
    assert "attentive 50%" in text

    units = sorted((world / "run" / "results").glob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in units}
    told = json.loads(units[3].read_text())
    units[3].unlink()
    (world / "run" / "result.json").unlink()
    record = world / "run" / "model" / "model.json"
    left = record.read_text()
    record.write_text(json.dumps(json.loads(left) | {"source": made.source | {"seed": 1}}))  # best of other seeds
    (world / "labels.csv").rename(world / "gone.csv")  # a run that continues knows its rows
    try:
        assert accuracy(probe(world, reporter, *OPTIONS, "scratch=true")) == found
    finally:
        (world / "gone.csv").rename(world / "labels.csv")
    assert json.loads(units[3].read_text()) == told
    assert json.loads(record.read_text()) == json.loads(left)
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == {units[3]}
    with pytest.raises(UsageError, match=r"clips\.segments"):
        probe(world, reporter, *OPTIONS, "scratch=true", "clips.segments=1")


@pytest.mark.ray
def test_shuffled_labels_are_not_read(world, reporter):
    result = probe(world, reporter, "probes=[linear,knn]", "seeds=3", name="shuffled", labels="shuffled.csv")
    assert max(accuracy(result).values()) < 0.7, accuracy(result)
    assert "controls" in run_folder.read_config(f"{world}/shuffled")


@pytest.mark.ray
@pytest.mark.parametrize("preset", ["kinetics", "ssv2", "diving48"])
def test_the_smoke_twin_of_every_preset_runs_on_a_list_of_its_form(world, reporter, preset):
    rows = [line.split(",") for line in (world / "labels.csv").read_text().splitlines()[1:]]
    numbers = {hue: number for number, hue in enumerate(HUES)}
    given = [f"preset={preset}", "smoke=true"]
    for split in ("train", "test"):
        mine = [(Path(path).stem, label) for path, label, found in rows if found == split]
        forms = {
            "kinetics": "".join(f"/data/{stem}.mp4 {numbers[label]}\n" for stem, label in mine),
            "ssv2": json.dumps([{"id": stem, "template": f"Showing [something] {label}"} for stem, label in mine]),
            "diving48": json.dumps([{"vid_name": stem, "label": numbers[label]} for stem, label in mine]),
        }
        file = world / f"{preset}-{split}.{'csv' if preset == 'kinetics' else 'json'}"
        file.write_text(forms[preset])
        given.append(f"labels.{split}={file}")
    where = [f"model={world}/model", f"catalog={world}/catalog", f"run.dir={world}/{preset}"]
    evaluate_probe.run(load(ProbeEvaluationConfig, "evaluate probe", [*where, *given]), reporter)
    result = run_folder.read_json(f"{world}/{preset}", run_folder.RESULT)
    assert result["splits"] == {"train": 15, "validation": 3, "test": 15}, "validation was cut from train"
    assert all(0 <= value <= 1 for value in accuracy(result).values())
    assert result["classes"][0] == ("Showing something blue" if preset == "ssv2" else "0")


@pytest.mark.ray
def test_a_run_is_pinned_to_its_checkpoint_and_several_are_seeds(world, reporter):
    given = ["preset=moving_digits_tiny", "smoke=true", f"catalog={world}/catalog", "train.num_workers=0", "train.steps=2"]
    runs = [f"{world}/pretrain-{seed}" for seed in range(2)]
    for seed, uri in enumerate(runs):
        pretrain.run(load(PretrainConfig, "pretrain", [*given, f"seed={seed}", f"run.dir={uri}"]), reporter)
    small = ["probes=[linear]", "controls=[random]", f"model=[{','.join(runs)}]", "seeds=5"]
    result = probe(world, reporter, *small, name="several")
    pinned = [run_folder.latest_checkpoint(uri).uri for uri in runs]
    assert (result["models"], result["seeds"]) == (pinned, 2), "one seed for each model"
    assert [len(line["values"]) for line in result["arms"]] == [2, 2]
    first, config = pretrain.load_encoder(pinned[0])
    whole, _ = pretrain.load_encoder(runs[0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), whole.parameters(), strict=True))
    assert result["clip"]["crop_size"] == config.clip.crop_size
    # The run goes on: the evaluation stays with what it has read.
    pretrain.run(load(PretrainConfig, "pretrain", [*given[:-1], "train.steps=4", "seed=0", f"run.dir={runs[0]}"]), reporter)
    assert run_folder.latest_checkpoint(runs[0]).uri != pinned[0]
    assert probe(world, reporter, *small, name="several") == result
    assert model_folder.read(pinned[0]).source["step"] == 2
    with pytest.raises(InputRefused, match="no committed checkpoint"):
        pretrain.load_encoder(f"{runs[0]}/checkpoints/step_00000099-torn")


@pytest.mark.ray
def test_videos_that_fail_are_counted_and_too_many_are_refused(world, reporter):
    lines = (world / "labels.csv").read_text().splitlines()
    bad = world / "videos" / "train-red-0.mp4"
    whole, before = bad.read_bytes(), bad.stat()
    bad.write_bytes(whole[: len(whole) // 3])  # since it was ingested
    try:
        small = ["probes=[linear]", "controls=[]", "seeds=1"]
        with pytest.raises(InputRefused, match=r"1 of 42 samples .*train-red-0"):
            probe(world, reporter, *small, "max_failed=0.01", name="failed")
        (world / "labels.csv").write_text("\n".join(line for line in lines if "train-blue-1" not in line) + "\n")
        result = probe(world, reporter, *small, "max_failed=0.1", name="failed")
    finally:
        (world / "labels.csv").write_text("\n".join(lines) + "\n")
        bad.write_bytes(whole)
        os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert result["failures"]["count"] == 1
    assert "train-red-0" in result["failures"]["first"][0]["name"]
    assert result["splits"]["train"] == 16, "a list that was mended before there was a result is read again"
    (world / "more.csv").write_text("\n".join([*lines, "gone.mp4,red,train"]) + "\n")
    with pytest.raises(InputRefused, match=r"1 of 43 rows .*gone\.mp4"):
        probe(world, reporter, *small, name="missing", labels="more.csv")
    with pytest.raises(UsageError, match=r"max_gb is 0\.0001"):
        probe(world, reporter, "attentive.heads=2", "max_gb=0.0001", name="large")
    with pytest.raises(UsageError, match=r"attentive\.heads=16 .*give attentive\.heads=4"):
        probe(world, reporter, "probes=[attentive]", "controls=[]", name="heads")
    with pytest.raises(UsageError, match="gpus=99"):
        probe(world, reporter, *small, "gpus=99", name="gpus")
