"""jepa bench probe: its linear probe and its statistics against known answers, and the whole way at toy size."""

import json
from pathlib import Path

import pytest
import torch

from pipelines import bench_probe, bench_table, run_folder
from pipelines.bench_config import BenchConfig
from pipelines.bench_table import CONTROL, PIXELS, PREDICTION, RANDOM
from pipelines.errors import ConditionMissed, UsageError
from pipelines.presets import load

SMALL = ["what=probe", "overrides=[smoke=true]", "seeds=1", "digits.pretrain=16", "digits.train=40", "digits.validation=16"]


def test_the_linear_probe_reads_what_is_there_and_not_what_is_not():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 8, generator=generator) * 3
    y = {
        split: torch.randint(0, 4, (size,), generator=generator)
        for split, size in zip(("train", "validation", "test"), (400, 200, 400), strict=False)
    }
    x = {split: centres[labels] + 0.5 * torch.randn(len(labels), 8, generator=generator) for split, labels in y.items()}
    assert bench_probe.linear_accuracy(x, y, 4) > 0.98
    noise = {split: torch.randn(len(labels), 8, generator=generator) for split, labels in y.items()}
    assert bench_probe.linear_accuracy(noise, y, 4) < 0.35


def test_the_validation_part_chooses_and_the_test_part_does_not():
    """Many channels of noise and few rows: a weak decay fits the training part and is wrong elsewhere."""
    generator = torch.Generator().manual_seed(0)
    y = {split: torch.arange(size) % 2 for split, size in (("train", 60), ("validation", 400), ("test", 400))}
    x = {split: torch.randn(len(labels), 60, generator=generator) + 0.2 * labels[:, None] for split, labels in y.items()}
    chosen = bench_probe.linear_accuracy(x, y, 2)
    swapped = bench_probe.linear_accuracy({**x, "test": x["test"].flip(0)}, {**y, "test": y["test"].flip(0)}, 2)
    assert chosen == swapped, "the order of test rows changes nothing"
    weak = bench_probe.DECAYS[:1]
    original, bench_probe.DECAYS = bench_probe.DECAYS, weak
    try:
        assert bench_probe.linear_accuracy(x, y, 2) < chosen
    finally:
        bench_probe.DECAYS = original


def test_intervals_are_students_and_binomial():
    assert bench_table.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert bench_table.interval([7.0]) is None
    assert bench_table.sampling(50.0, 2500) == pytest.approx(1.96, abs=1e-3)


def results(prediction: float, rank: float = 20.0) -> dict:
    scores = {PREDICTION: (prediction, 30.0, rank), CONTROL: (45.0, 28.0, 22.0), RANDOM: (35.0, 20.0, 20.0)}
    names = bench_table.SCORES
    return {
        (arm, seed): {"arm": arm, "seed": seed, **dict(zip(names, (d + seed, c, r), strict=True))}
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
    inputs = {PIXELS: {"direction": 14.0, "digit": 11.0, "rank_me": 3.0}}
    result = bench_table.summary(results(prediction, rank), inputs, 2000)
    lines = {line["what"]: line for line in result["conditions"]}
    assert {what for what, line in lines.items() if not line["holds"]} == missed
    assert lines["direction over control"]["value"] == pytest.approx(prediction - 45)
    assert lines["direction over control"]["interval"] == pytest.approx(0, abs=1e-9), "seeds move both alike"
    assert lines["direction over pixels"]["interval"] > 2, "pixels have no seeds"
    columns, rows = bench_table.accuracies(result)
    assert [row[0] for row in rows] == [PREDICTION, CONTROL, RANDOM, PIXELS]
    assert all(len(row) == len(columns) for row in rows)
    assert [row[3] for row in bench_table.margins(result)[1]].count("NO") == len(missed)


def test_a_trial_of_the_control_differs_by_the_weight_of_prediction_alone():
    config = load(BenchConfig, "bench", [*SMALL, "level=plain", "run.dir=/tmp/x"])
    catalogs = {"pretrain": "/tmp/c@1", "probe": "/tmp/d@1"}
    one, other = (bench_probe.trial_config(config, catalogs, "/tmp/x", arm, 2) for arm in (PREDICTION, CONTROL))
    assert (one.model.loss.prediction_weight, other.model.loss.prediction_weight) == (1, 0)
    assert one.clip == other.clip
    assert one.clip.crop_size // one.model.encoder.patch_size == 4
    assert (one.seed, one.optim, one.train, one.model.masks) == (2, other.optim, other.train, other.model.masks)


@pytest.mark.parametrize("wrong", ["seeds=0", "level=hard", "digits.test=0", "what=nothing"])
def test_mistakes_are_refused(wrong):
    with pytest.raises(UsageError):
        load(BenchConfig, "bench", [*SMALL, "run.dir=/tmp/x", wrong])


@pytest.mark.ray
def test_the_whole_way_in_small_and_again_without_work(ray_session, reporter, tmp_path):
    given = [*SMALL, "digits.test=16", f"run.dir={tmp_path}/bench", "require=false"]
    told = bench_probe.run(load(BenchConfig, "bench", given), reporter)
    result = run_folder.read_json(f"{tmp_path}/bench", run_folder.RESULT)
    assert [arm["arm"] for arm in result["arms"]] == [PREDICTION, CONTROL, RANDOM, PIXELS, "frame difference"]
    assert told["direction over control"] == result["conditions"][2]["value"]
    assert {row["arm"]: row["steps"] for row in result["results"]} == {PREDICTION: 4, CONTROL: 4, RANDOM: 0}
    trials = sorted(Path(tmp_path, "bench").rglob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in trials if path.parent.parent.name == "trials"}
    assert len(before) >= 5
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
