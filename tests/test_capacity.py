"""jepa plan-capacity: the arithmetic holds by hand, every rate has a source, and docs/scale.md shows what the command prints."""

import json
import re
from pathlib import Path

import pytest
import yaml

from jepa_core.config import ActionPredictorConfig, encoder_config
from jepa_core.flops import action_flops
from pipelines import capacity, presets, run_folder
from pipelines.capacity_config import CapacityConfig, StageConfig
from pipelines.capacity_measured import measured
from pipelines.capacity_rates import Rates
from pipelines.errors import InputRefused, UsageError
from pipelines.progress import Reporter

ROOT = Path(__file__).parent.parent


def config(*words):
    return presets.load(CapacityConfig, "plan-capacity", words)


def rows(stage):
    return {row.what: float(row.value.replace(",", "")) for row in stage.rows}


def planned(*words):
    stages, result = capacity.plan(config(*words), Rates())
    return {stage.name: rows(stage) for stage in stages}, result


def test_the_arithmetic_of_a_small_plan():
    tables, result = planned("corpus.hours=1000", "corpus.video_minutes=6", "ingest_cores=10", "gpus=128", "corpus.gb_per_hour=2")
    ingest, first, cooldown, whole = tables.values()
    assert ingest["videos"] == 10_000
    assert ingest["source"] == 2
    assert ingest["requests"] == pytest.approx(10_000 * 3.041, rel=0.005)
    assert ingest["CPU"] == pytest.approx(10_000 * 0.1 / 3600, rel=0.005)
    assert first["samples"] == 240_000 * 3072
    assert first["epochs"] == pytest.approx(240_000 * 3072 * 4 / 3600 / 1000, rel=0.005)
    speed = 128 * 989e12 * 0.25 / (first["FLOPs of a clip"] * 1e12)
    assert first["speed of the devices"] == pytest.approx(speed, rel=0.01)
    assert first["speed of the feed"] == 24 / 0.01
    assert first["wall time"] == pytest.approx(first["samples"] / min(speed, 2400) / 0.9 / 86400, rel=0.01)
    assert first["cores for decoding"] == pytest.approx(min(speed, 2400) * (0.224 + 0.009), rel=0.01)
    assert first["decode nodes"] == -(-first["cores for decoding"] // 64)
    assert cooldown["samples"] == 12_000 * 3072
    assert whole["GPU-hours"] == pytest.approx(first["paid for"] + cooldown["paid for"], rel=0.01)
    assert whole["wall time"] == pytest.approx(first["wall time"] + cooldown["wall time"] + ingest["wall time"] / 24, rel=0.01)
    assert "cost" not in whole  # nobody has given a price
    assert result["gpu_hours"] == pytest.approx(whole["GPU-hours"], rel=0.01)


def test_microbatches_go_round_the_devices_in_turns():
    one = "stages=[{preset: vitl16_256_16f}]"
    speed = {gpus: planned("corpus.hours=1", one, f"gpus={gpus}")[0]["pretrain vitl16_256_16f"] for gpus in (64, 96, 128, 256)}
    assert speed[96]["devices at work"] == 64  # 128 microbatches: 32 of 96 devices have nothing to do in the second turn
    assert speed[64]["speed of the devices"] == speed[96]["speed of the devices"]
    assert speed[256]["speed of the feed"] == speed[128]["speed of the feed"] / 2
    with pytest.raises(UsageError, match="gpus=1000: a batch of 3072"):
        planned("corpus.hours=1", one, "gpus=1000")


def test_shards_cost_once_and_save_cores():
    one = ["corpus.hours=1000", "stages=[{preset: vitl16_256_16f}]", "gpus=128"]
    plain, shards = planned(*one)[0], planned(*one, "corpus.normalise=true")[0]
    assert shards["normalise"]["CPU"] == pytest.approx(1000 * 497 / 3600, rel=0.005)
    name = "pretrain vitl16_256_16f"
    assert shards[name]["cores for decoding"] < 0.15 * plain[name]["cores for decoding"]
    assert shards[name]["fetched"] < 0.2 * plain[name]["fetched"]


def test_prices_have_a_day_and_add_up():
    with pytest.raises(UsageError, match=r"prices\.date is missing"):
        config("corpus.hours=1", "prices.gpu_hour=2")
    tables, _ = planned("corpus.hours=1000", "gpus=128", "prices.date=2026-11-23", "prices.gpu_hour=2", "prices.core_hour=0.5")
    whole = tables["all of it"]
    assert whole["cost of GPU-hours"] == pytest.approx(2 * whole["GPU-hours"], rel=0.01)
    assert whole["cost"] == pytest.approx(whole["cost of GPU-hours"] + whole["cost of core-hours"], rel=0.01)
    stages, _ = capacity.plan(config("corpus.hours=1000", "gpus=128", "prices.date=2026-11-23", "prices.gpu_hour=2"), Rates())
    assert all("2026-11-23" in row.how for row in stages[-1].rows if row.what.startswith("cost"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "corpus.hours is missing"),
        (["corpus.hours=-1", "post_train.hours=1"], "corpus.hours=-1"),
        (["corpus.hours=1", "gpus=0"], "gpus=0"),
        (["corpus.hours=1", "gpu=TPU"], "gpu=TPU is unknown: choose from"),
        (["corpus.hours=1", "stages=[{preset: nope}]"], "preset=nope does not exist"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        planned(*words)


def test_every_rate_says_where_it_comes_from():
    shipped = yaml.safe_load((ROOT / "configs" / "rates.yaml").read_text())
    documents = " ".join(path.read_text() for path in (ROOT / "docs").glob("*.md")).replace(",", "")
    for name, rate in shipped.items():
        assert rate["source"], name
        assert rate["unit"], name
        assert rate.get("assumed") or re.search(r"make |jepa |tests/bench/|S3 lists", rate["source"]), name
        for page in re.findall(r"docs/[\w-]+\.md", rate["source"]):
            assert (ROOT / page).exists(), name
    for number in (
        "core-hours to make | 0 | 138000",
        "| **224** | **682** |",
        "27.4",
        "**18.5**",
        "1098",
        "196",
        "234 CPU-s",
        "0.30 MB per hour",
    ):
        assert number in documents, f"{number}: a page has changed, and with it a rate"


def test_rates_of_ones_own_replace_ours_and_are_checked(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("mfu: {value: 0.5, source: our first run}\n")
    rates = Rates(str(path))
    assert rates["mfu"] == 0.5
    assert not rates.used["mfu"].assumed
    assert rates["goodput"] == Rates()["goodput"]
    for text, words in (
        ("speed: {value: 1, source: x}", "unknown rate speed"),
        ("mfu: 0.5", "mfu needs value and source"),
        ("mfu: {value: 0.5}", "mfu needs value and source"),
        ("mfu: {value: fast, source: x}", "mfu.value='fast'"),
        ("- 1", "write NAME"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=re.escape(words)):
            Rates(str(path))


def test_operations_of_the_action_predictor_by_hand():
    encoder, predictor = encoder_config("vit_tiny"), ActionPredictorConfig(dim=96, depth=2, heads=3)
    tokens = 4
    frame = 2 * tokens * 12 * (4 * 192**2 + 2 * 192 * 768) + 4 * tokens**2 * 192 * 12 + tokens * 2 * 1536 * 192

    def predict(frames):
        length = frames * (tokens + 2)
        blocks = 2 * length * 2 * (4 * 96**2 + 2 * 96 * 384) + 4 * length**2 * 96 * 2
        return blocks + 4 * frames * tokens * 192 * 96

    expected = 3 * frame + 3 * (predict(2) + predict(1) + predict(2))
    assert action_flops(encoder, predictor, tokens, num_frames=3, rollout_steps=2) == pytest.approx(expected)


def test_kept_tokens_are_those_of_the_docs():
    run = capacity.stage_config(StageConfig("vitl16_256_16f"))
    from jepa_core.encoder import clip_grid

    grid = clip_grid(run.clip, run.model.encoder)
    small, large = ([kept / grid.num_tokens for kept in pair] for pair in capacity.kept_tokens(run.model, grid))
    assert small == pytest.approx([0.24, 0.47], abs=0.04)  # docs/models.md, for batches of 24
    assert large == pytest.approx([0.06, 0.70], abs=0.04)


@pytest.mark.parametrize("name", ["hours_1_600_000", "droid_62_hours"])
def test_the_worked_examples_are_what_the_command_prints(name, tmp_path):
    out = tmp_path / "plan.md"
    capacity.run(config(f"preset={name}", f"out={out}"), Reporter(open(tmp_path / "said", "w")))  # noqa: SIM115
    page = (ROOT / "docs" / "scale.md").read_text()
    block = re.search(rf"<!-- jepa plan-capacity preset={name} -->\n(.*?)<!-- end -->", page, re.S)
    assert block, "docs/scale.md has no such block"
    assert block[1] == out.read_text(), f"docs/scale.md is not what jepa plan-capacity preset={name} out=FILE writes"
    for line in out.read_text().splitlines():
        if "ASSUMED" in line:
            assert line.split("|")[1].strip() in ("latency", "mfu", "goodput", "probe_mb_sample")


def test_a_run_is_compared_with_its_plan(tmp_path):
    run_dir = str(tmp_path / "run")
    given = ["preset=demo", "catalog=none", f"run.dir={run_dir}"]
    (tmp_path / "run").mkdir()
    with pytest.raises((UsageError, InputRefused)):
        capacity.run(config(f"run={run_dir}"), Reporter(open(tmp_path / "said", "w")))  # noqa: SIM115
    from pipelines.config import PretrainConfig

    (tmp_path / "run" / "config.yaml").write_text(presets.to_yaml(presets.load(PretrainConfig, "pretrain", given)))
    run_folder.write_json(run_dir, run_folder.PROVENANCE, {"first_started": 1000.0})
    lines = [
        {"step": 10, "time": 1050.0, "step_s": 2.0, "workers": 2, "data_wait": 0.5, "goodput": 0.4},
        {"step": 30, "time": 1120.0, "step_s": 3.5, "workers": 1, "data_wait": 0.2, "goodput": 0.75, "mfu": 0.125},
    ]
    run_folder.write_part(run_dir, run_folder.METRICS, 0, lines)
    run_folder.write_part(run_dir, run_folder.QUARANTINE, 0, [{"step": 1, "reason": "undecodable"}])
    with open(tmp_path / "said", "w") as said:
        result = capacity.run(config(f"run={run_dir}", "gpu=cpu", "prices={date: today, gpu_hour: 36}"), Reporter(said))
    told = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    table = {row["what"]: row for row in told[0]["rows"]}
    number = {what: float(row["value"].replace(",", "")) for what, row in table.items()}
    assert number["samples"] == 30 * 16
    assert number["speed of the devices"] == pytest.approx(480 / (10 * 2 + 20 * 3.5), rel=0.01)
    assert number["waiting for data"] == pytest.approx((10 * 0.5 + 20 * 0.2) / 30, rel=0.01)
    assert number["MFU"] == 0.125
    assert number["goodput"] == 0.75
    assert number["wall time"] == pytest.approx(120 / 3600, rel=0.01)
    assert number["paid for"] == pytest.approx(120 * (20 * 2 + 70 * 1) / 90 / 3600, rel=0.01)
    assert number["clips replaced"] == 1
    assert number["cost of devices"] == pytest.approx(120 / 3600 * (40 + 70) / 90 * 36, rel=0.01)
    assert "planned 0.9" in table["goodput"]["how"]
    assert result["samples"] == 480


def test_ingests_are_compared_with_their_plan(tmp_path, monkeypatch):
    from datetime import UTC, datetime

    import pyarrow as pa

    from pipelines import catalog

    at = [datetime(2026, 11, 23, hour, tzinfo=UTC) for hour in (1, 2, 3, 5)]
    rows = [
        {"started": at[0], "finished": at[1], "ingested": 90, "refused": 10, "listed": 100, "config": '{"validate": "sample"}'},
        {"started": at[2], "finished": at[3], "ingested": 50, "refused": 0, "listed": 150, "config": '{"validate": "none"}'},
        {"started": at[2], "finished": None, "ingested": 0, "refused": 0, "listed": 0, "config": '{"validate": "none"}'},
    ]
    monkeypatch.setattr(catalog, "read", lambda ref, name, columns: pa.Table.from_pylist(rows).select(columns))
    (stage,), result = measured(config(f"run={tmp_path}", "ingest_cores=2"), Rates())
    table = {row.what: row for row in stage.rows}
    assert [table[name].value for name in ("ingests", "listed", "read", "wall time")] == ["2", "250", "150", "3"]
    assert f"planned {capacity.number((100 * 0.1 + 50 * 0.02) / 2 / 3600)} (CPU only, on 2 cores)" in table["wall time"].how
    assert result == {"run": str(tmp_path), "items": 150, "wall": "3h00m"}
