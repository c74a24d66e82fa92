"""jepa bench probe: its probes and its table against known answers, and the whole way at toy size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_core.config import EncoderConfig
from jepa_core.positions import Grid
from jepa_core.readout import linear_probe
from pipelines import bench_probe, bench_readout, bench_table, run_folder
from pipelines.bench_config import BenchConfig
from pipelines.bench_table import CONTROL, PIXELS, PREDICTION, RANDOM, SUPERVISED
from pipelines.errors import ConditionMissed, UsageError
from pipelines.presets import load
from pipelines.video import tubelets

SMALL = ["what=probe", "preset=tiny", "smoke=true", "seeds=1"]


def made_clips(train: int = 160, other: int = 80) -> bench_readout.ProbeClips:
    """Labels only, with every class in every part."""
    sizes = dict(zip(bench_readout.SPLITS, (train, other, other), strict=True))
    labels = {split: np.stack([np.arange(size) % 8, np.arange(size) % 10], axis=1) for split, size in sizes.items()}
    return bench_readout.ProbeClips(
        {split: np.zeros((size, 64, 96), np.uint8) for split, size in sizes.items()}, labels, Grid(4, 4, 4)
    )


def test_every_probe_reads_what_is_there_and_not_what_is_not():
    """Tokens whose mean says the direction, in noise of which the mean is small; nothing says the digit."""
    generator, clips = torch.Generator().manual_seed(0), made_clips()
    centres = torch.randn(8, 24, generator=generator)
    noise = {split: torch.randn(len(y), 6, 24, generator=generator) for split, y in clips.labels.items()}
    tokens = {split: centres[clips.labels[split][:, 0], None] + x for split, x in noise.items()}
    scores = bench_readout.probe(tokens, clips, seed=0)
    assert set(scores) == set(bench_table.SCORES)
    assert min(scores[name] for name in ("direction", "direction_few", "direction_knn", "direction_attentive")) > 90
    assert bench_readout.probe(noise, clips, seed=0)["direction"] < 35
    assert scores == bench_readout.probe(tokens, clips, seed=0), "a function of tokens, labels and seed"


def test_an_invertible_mixing_of_the_channels_changes_no_linear_accuracy():
    """So a regulariser that only decorrelates what is there anyway gains nothing. Without whitening, the mixed are read worse."""
    generator, clips = torch.Generator().manual_seed(0), made_clips(400, 200)
    turned = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    mixing = torch.diag(10.0 ** torch.linspace(1, -1.5, 24)) @ turned
    centres = torch.cat([torch.zeros(8, 16), torch.randn(8, 8, generator=generator)], dim=1)  # in the weak directions
    noise = {split: torch.randn(len(y), 24, generator=generator) for split, y in clips.labels.items()}
    clear = {split: centres[y[:, 0]] + 0.6 * noise[split] for split, y in clips.labels.items()}
    mixed = {split: rows @ mixing for split, rows in clear.items()}
    found = [linear_probe(bench_readout._splits(bench_readout.whitened(x), clips, "direction")).test for x in (clear, mixed)]
    assert found[0] > 0.8
    assert found[1] == pytest.approx(found[0], abs=0.03)
    assert linear_probe(bench_readout._splits(mixed, clips, "direction")).test < found[1] - 0.05


def test_what_needs_no_encoder_is_the_pixels_and_their_change():
    clip = np.zeros((8, 16, 16, 3), np.uint8)
    clip[1::2] = 255  # every second frame of a tubelet is bright
    rows = np.stack([tubelets(clip, 2, 4)])
    clips = bench_readout.ProbeClips(dict.fromkeys(bench_readout.SPLITS, rows), {}, Grid(4, 4, 4))
    assert bench_readout.pixels(clips)["test"].mean() == pytest.approx(0.5)
    difference = bench_readout.frame_difference(clips)["test"]
    assert difference.shape == (1, 64, 48)
    assert (difference == 1).all()


def test_training_on_labels_learns_them():
    rng, clips = np.random.default_rng(0), made_clips(160, 80)
    for split, labels in clips.labels.items():  # the direction is the colour, so that a moment's training shows
        clips.tubelets[split][:] = 25 * labels[:, 0, None, None] + rng.integers(0, 20, clips.tubelets[split].shape)
    encoder = bench_readout.supervised(EncoderConfig(dim=24, depth=1, heads=2, patch_size=4, native_grid=(4, 4, 4)), clips, 0)
    assert not encoder.training
    assert bench_readout.probe(bench_readout.encoded(encoder, clips), clips, 0)["direction"] > 60


def test_a_part_without_a_class_is_refused_by_name():
    labels = {"train": [[d % 8, d % 10] for d in range(80)], "test": [[d % 8, d % 9] for d in range(80)]}
    with pytest.raises(UsageError, match=r"digits\.test=80.*digit \[9\]"):
        bench_probe._refuse_missing_classes(labels)


def results(prediction: float, rank: float = 20.0) -> dict:
    scores = {PREDICTION: (prediction, 30.0, rank), CONTROL: (45.0, 28.0, 22.0), RANDOM: (35.0, 20.0, 20.0)}
    return {
        (arm, seed): {
            **{"arm": arm, "seed": seed, **dict.fromkeys(bench_table.SCORES, 50.0)},
            **{"direction": d + seed, "digit": c, "rank_me": r},
        }
        for arm, (d, c, r) in scores.items()
        for seed in range(3)
    }


@pytest.mark.parametrize(
    ("prediction", "rank", "missed"),
    [
        (51.0, 20.0, set()),
        (49.0, 20.0, {"direction over control"}),
        (40.0, 20.0, {"direction over control", "direction over random"}),
        (51.0, 15.0, {"RankMe relative to random"}),
    ],
)
def test_margins_are_of_pairs_and_each_missed_one_is_named(prediction, rank, missed):
    inputs = {PIXELS: {**dict.fromkeys(bench_table.SCORES, 11.0), "direction": 14.0, "rank_me": 3.0}}
    result = bench_table.summary(results(prediction, rank), inputs, 2000)
    lines = {line["what"]: line for line in result["conditions"]}
    assert {what for what, line in lines.items() if not line["holds"]} == missed
    control, over_pixels = lines["direction over control"], lines["direction over pixels"]
    assert control["mean"] == pytest.approx(prediction - 45)
    assert control["high"] - control["low"] == pytest.approx(0, abs=1e-9), "seeds move both alike"
    assert over_pixels["high"] - over_pixels["mean"] == pytest.approx(4.303 / 3**0.5, rel=1e-3), "pixels have no seeds"
    arms = {arm["arm"]: arm for arm in result["arms"]}
    assert arms[PIXELS]["direction"]["low"] < 13 < 14 < arms[PIXELS]["direction"]["high"] < 16, "sampling of 2,000 clips"
    columns, rows = bench_table.accuracies(result)
    assert [row[0] for row in rows] == [PREDICTION, CONTROL, RANDOM, PIXELS]
    assert all(len(row) == len(columns) for row in rows)
    assert [row[3] for row in bench_table.margins(result)[1]].count("NO") == len(missed)


def test_one_seed_has_no_intervals_and_says_so():
    one = {key: value for key, value in results(51.0).items() if key[1] == 0}
    inputs = {PIXELS: dict.fromkeys(bench_table.SCORES, 14.0)}
    result = bench_table.summary(one, inputs, 2000)
    assert result["conditions"][0]["low"] is None
    assert result["conditions"][0]["p_t"] is None
    assert "[" not in bench_table.margins(result)[1][0][1]


def test_a_trial_of_the_control_differs_by_the_weight_of_prediction_alone():
    config = load(BenchConfig, "bench", [*SMALL, "level=plain", "run.dir=/tmp/x"])
    catalogs = {"pretrain": "/tmp/c@1", "probe": "/tmp/d@1"}
    one, other = (bench_probe.trial_config(config, catalogs, "/tmp/x", arm, 2) for arm in (PREDICTION, CONTROL))
    assert (one.model.loss.prediction_weight, other.model.loss.prediction_weight) == (1, 0)
    assert one.clip == other.clip
    assert one.clip.crop_size // one.model.encoder.patch_size == 4
    assert (one.seed, one.optim, one.train, one.model.masks) == (2, other.optim, other.train, other.model.masks)


def test_trials_that_pretrain_nothing_leave_their_result(tmp_path):
    config = load(BenchConfig, "bench", [*SMALL, "run.dir=/tmp/x", "supervised=true"])
    assert [arm for arm, _ in bench_probe.keys(config)] == [PREDICTION, CONTROL, RANDOM, SUPERVISED]
    for arm in (RANDOM, SUPERVISED):
        trial = bench_probe.trial_config(config, {"pretrain": "/tmp/c@1"}, str(tmp_path), arm, 1)
        name, scores = bench_probe._train_and_probe(arm, 1, trial, made_clips(80, 80))
        assert name == f"{arm}-s1"
        result = run_folder.read_json(trial.run.dir, run_folder.RESULT)
        assert result == {"arm": arm, "seed": 1, "steps": 0, **scores}
        assert set(scores) == set(bench_table.SCORES)
        assert scores["direction"] <= 25, "clips that are all the same, as after a collapse, are read at chance"


@pytest.mark.parametrize("wrong", ["seeds=0", "level=hard", "digits.test=0", "what=nothing"])
def test_mistakes_are_refused(wrong):
    with pytest.raises(UsageError):
        load(BenchConfig, "bench", [*SMALL, "run.dir=/tmp/x", wrong])


@pytest.mark.ray
def test_the_whole_way_in_small_and_again_without_work(ray_session, reporter, tmp_path):
    given = [*SMALL, f"run.dir={tmp_path}/bench", "require=false", "supervised=true"]
    told = bench_probe.run(load(BenchConfig, "bench", given), reporter)
    result = run_folder.read_json(f"{tmp_path}/bench", run_folder.RESULT)
    assert [arm["arm"] for arm in result["arms"]] == [PREDICTION, CONTROL, RANDOM, SUPERVISED, PIXELS, "frame difference"]
    assert told["direction over control"] == result["conditions"][2]["mean"]
    assert {row["arm"]: row["steps"] for row in result["results"]} == {PREDICTION: 4, CONTROL: 4, RANDOM: 0, SUPERVISED: 0}
    trials = sorted(Path(tmp_path, "bench").rglob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in trials if path.parent.parent.name == "trials"}
    assert len(before) >= 6
    torch.manual_seed(0)  # another state of the global generator must not matter
    again = bench_probe.run(load(BenchConfig, "bench", given), reporter)
    assert again == told
    assert {path: path.stat().st_mtime_ns for path in before} == before, "no trial ran again"
    one = Path(tmp_path, "bench", "trials", "random-s0", "result.json")
    scores = json.loads(one.read_text())
    one.unlink()
    bench_probe.run(load(BenchConfig, "bench", given), reporter)
    assert json.loads(one.read_text()) == scores, "what is missing, and only that, is made again, with the same result"
    if not told["passed"]:
        with pytest.raises(ConditionMissed, match=r"result\.json"):
            bench_probe.run(load(BenchConfig, "bench", [*given, "require=true"]), reporter)
    with pytest.raises(UsageError, match=r"digits\.test"):
        bench_probe.run(load(BenchConfig, "bench", [*given, "digits.test=17"]), reporter)
