"""The probe beside a pretraining: what it asks, that it finds what is there, and that training does not know of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encode, make_frames
from harness import slow

from jepa_core.positions import Grid
from pipelines import gauges, online_probe, pretrain, probe, progress, report, run_folder, train_probe
from pipelines.config import PretrainConfig, ReportConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.features import Features
from pipelines.label_free_rows import Task
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.seeing_config import ARROW, RETRIEVAL
from pipelines.sweep_config import ProbeConfig
from pipelines.train_probe import OnlineProbe

SMOKE = ("preset=demo", "smoke=true", "train.precision=fp32", "train.batch_size=4", "train.microbatches=2", "train.steps=4")
PROBE = ("probe.every=2", "probe.max_clips=24")


def settings(catalog_uri: str, run_dir: Path, *more: str) -> PretrainConfig:
    return load(PretrainConfig, "pretrain", [*SMOKE, f"catalog={catalog_uri}", f"run.dir={run_dir}", *more])


def lines_of(run_dir: Path) -> list[dict]:
    return run_folder.read_parts(str(run_dir), run_folder.METRICS)


def asked(groups: int = 8, moments: int = 4) -> online_probe.ProbeSet:
    """Retrieval of `groups` pairs, and the direction of clips of as many groups."""
    pairs = np.arange(2 * groups).reshape(groups, 2)
    rows = 2 * groups * moments
    of_group = np.arange(rows) // (2 * moments)
    names = tuple(str(number) for number in range(groups))
    arrow = Task(ARROW, 2 * groups + np.arange(rows), np.arange(rows) % 2, of_group, ("forward", "reversed"), names,
                 (np.arange(groups) % 4)[None], "between videos", [])  # fmt: skip
    everyone = np.arange(groups)
    retrieval = Task(RETRIEVAL, pairs, everyone, everyone, (), names, np.empty((0, 0), np.int64), "between videos", [])
    count = 2 * groups + rows
    found = Features(np.arange(count), {}, [])
    tubelets = np.zeros((count, 2, 3), np.uint8)
    return online_probe.ProbeSet(tubelets, Grid(1, 1, 2), online_probe.Asked([], [retrieval, arrow]), found, {})


def test_features_that_know_are_told_from_those_that_do_not():
    made, generator = asked(), torch.Generator().manual_seed(0)
    count = len(made.tubelets)
    noise = torch.randn(count, 16, generator=generator)
    assert made.scores(noise)[ARROW] < 0.75
    assert made.scores(noise)[RETRIEVAL] < 0.5
    knows = 0.1 * noise
    knows[16:, 0] += torch.arange(count - 16) % 2
    for group in range(8):
        knows[2 * group : 2 * group + 2, 1 + group] += 3
    assert made.scores(knows) == {RETRIEVAL: 1.0, ARROW: 1.0}
    assert made.scores(torch.full((count, 16), torch.nan)) == {}


@pytest.mark.parametrize(("count", "size", "world"), [(24, 4, 1), (25, 4, 2), (3, 4, 2), (64, 8, 3), (1, 1, 4)])
def test_every_clip_is_encoded_once_and_all_workers_pass_equally_often(count, size, world):
    mine = [train_probe.turns(count, size, rank, world) for rank in range(world)]
    assert len({len(turns) for turns in mine}) == 1
    own = sorted(row for turns in mine for rows, is_own in turns if is_own for row in range(rows.start, rows.stop))
    assert own == list(range(count))


def test_measurements_come_with_lines_of_metrics():
    watcher = OnlineProbe.__new__(OnlineProbe)

    def due(every: int, log_every: int, steps: int) -> list[int]:
        watcher.every = every
        watcher.train = settings("c", Path("r"), f"train.log_every={log_every}", f"train.steps={steps}").train
        return [step for step in range(1, steps + 1) if watcher.due(step)]

    assert due(4, 2, 10) == [4, 8, 10]
    assert due(5, 2, 12) == [6, 10, 12], "the first line from each multiple on"
    assert due(1, 5, 10) == [5, 10]
    assert due(7, 1, 14) == [7, 14]


def test_the_dashboard_and_the_gauges_know_the_probe():
    line = {"step": 4, "loss": 0.5, "probe/arrow": 0.614, "probe_random/arrow": 0.5, "probe_s": 0.1}
    assert progress.dashboard(line).endswith("arrow 61%")
    assert "random" not in progress.dashboard(line)
    assert gauges.LABELLED["probe/"][2] == "question"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("probe.every=-1", "probe.every"),
        ("probe.max_clips=5", "probe.max_clips=5"),
        ("probe.max_mb=0", "probe.max_mb"),
        ("clip.crop_size=512", "MB decoded"),
        ("probe.labels.holdout=l", "labels.holdout"),
    ],
)
def test_options_that_cannot_be_meant(given, words):
    with pytest.raises(UsageError, match=words):
        settings("c", Path("r"), *PROBE, "probe.max_mb=10", given)


@pytest.fixture(scope="module")
def without(catalog_uri, ray_session, reporter, tmp_path_factory) -> Path:
    """Four steps in one process, without a probe."""
    run_dir = tmp_path_factory.mktemp("without") / "run"
    pretrain.run(settings(catalog_uri, run_dir, "train.num_workers=0"), reporter)
    return run_dir


def weights(run_dir: Path) -> dict[str, bytes]:
    folder = Path(run_folder.require_checkpoint(str(run_dir)).uri)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.ray
def test_training_is_the_same_bits_with_the_probe_and_without(without, catalog_uri, tmp_path, capsys):
    run_dir = tmp_path / "run"
    pretrain.run(settings(catalog_uri, run_dir, *PROBE, "train.num_workers=0", "train.stop_at=2"), Reporter())
    first = lines_of(run_dir)
    pretrain.run(settings(catalog_uri, run_dir, *PROBE, "train.num_workers=0"), Reporter())  # continues
    assert lines_of(run_dir)[:2] == first
    keys = ("step", "loss", "trivial", "grad_norm", "lr", "rank_me")
    assert [[line[key] for key in keys] for line in lines_of(run_dir)] == [
        [line[key] for key in keys] for line in lines_of(without)
    ]
    assert weights(run_dir) == weights(without)
    probed = [line for line in lines_of(run_dir) if "probe_s" in line]
    assert [line["step"] for line in probed] == [2, 4]
    for line in probed:
        assert {key for key in line if "/" in key} == {
            f"{when}/{name}" for when in ("probe", "probe_random", "probe_pixels") for name in (RETRIEVAL, ARROW)
        }
        assert all(0 <= line[key] <= 1 for key in line if "/" in key)
        assert line["probe_cost"] == pytest.approx(line["probe_s"] / (2 * line["step_s"]))
    same = ("probe_random/arrow", "probe_random/retrieval", "probe_pixels/arrow")
    assert [probed[0][key] for key in same] == [probed[1][key] for key in same], "a run that continues knows how it began"
    told = json.loads((run_dir / "probe.json").read_text())
    assert told["failures"]["count"] == 0
    assert 12 <= told["clips"] <= 24
    assert told["chance"]["arrow"] == 0.5
    events = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert not [event for event in events if event["event"] == "warning"]
    page = Path(report.run(ReportConfig(run=str(run_dir)), Reporter())["report"]).read_text()
    assert "a small fixed set of clips" in page


@slow
@pytest.mark.chaos
@pytest.mark.ray
def test_workers_share_the_clips_of_a_sharded_encoder(without, catalog_uri, reporter, tmp_path):
    more = ("train.num_workers=2", "train.parallel=fsdp", "probe.every=4", "probe.max_clips=24")
    pretrain.run(settings(catalog_uri, tmp_path / "run", *more), reporter)
    alone = settings(catalog_uri, without, "train.num_workers=0", "probe.every=4", "probe.max_clips=24")
    encoder, _ = pretrain.load_encoder(str(tmp_path / "run"))
    found = online_probe.prepare(pretrain.pinned(alone), reporter)
    with torch.no_grad():
        pieces = torch.tensor(found.tubelets).split(2)
        x = torch.cat([encoder(piece, found.grid).mean(1) for piece in pieces])
    line = lines_of(tmp_path / "run")[-1]
    assert {key: line[f"probe/{key}"] for key in (RETRIEVAL, ARROW)} == found.scores(x)


@pytest.mark.ray
def test_what_does_not_decode_is_counted_and_too_short_videos_ask_nothing(catalog_uri, corpus, ray_session, tmp_path, capsys):
    from pipelines import ingest
    from pipelines.ingest_config import IngestConfig

    (tmp_path / "videos").mkdir()
    for index in range(4):
        (tmp_path / "videos" / f"{index}.mp4").write_bytes(encode(make_frames(60, seed=index)))
    uri = str(tmp_path / "catalog")
    ingest.run(IngestConfig(source=str(tmp_path / "videos"), catalog=uri, validate="none"), Reporter())
    (tmp_path / "videos" / "0.mp4").unlink()
    config = pretrain.pinned(settings(uri, tmp_path / "run", *PROBE))
    found = online_probe.prepare(config, Reporter())
    told = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert told["failures"]["reasons"] == {"vanished": told["failures"]["count"]}
    assert told["failures"]["count"] + len(found.tubelets) == 24
    assert "24 clips" not in capsys.readouterr().out
    thirds = probe.load_data(ProbeConfig("retrieval"), config)
    assert [row["reason"] for row in thirds.failures] == ["vanished"], "the probe of sweeps counts it too"
    long = pretrain.pinned(settings(uri, tmp_path / "long", *PROBE, "clip.num_frames=16"))
    assert online_probe.prepare(long, Reporter()) is None
    assert "nothing is measured" in capsys.readouterr().out


@pytest.mark.ray
def test_a_labelled_list_is_read_by_linear_and_knn_probes(catalog_uri, ray_session, reporter, tmp_path):
    from pipelines import ingest
    from pipelines.ingest_config import IngestConfig

    tints = {"red": (1.0, 0.2, 0.2), "blue": (0.2, 0.2, 1.0)}
    for name, tint in tints.items():
        (tmp_path / "videos" / name).mkdir(parents=True)
        for index in range(12):
            frames = (make_frames(12, 48, 48, seed=index) * tint).astype(np.uint8)
            (tmp_path / "videos" / name / f"{index}.mp4").write_bytes(encode(frames, options={"preset": "ultrafast"}))
    uri = str(tmp_path / "catalog")
    ingest.run(IngestConfig(source=str(tmp_path / "videos"), catalog=uri, validate="none"), reporter)
    given = ("probe.every=2", f"probe.catalog={uri}", "probe.format=folders", "probe.max_clips=24", "train.num_workers=0")
    pretrain.run(settings(catalog_uri, tmp_path / "run", *given, "train.steps=2"), reporter)
    line = lines_of(tmp_path / "run")[-1]
    assert line["probe/linear"] > 0.7
    assert line["probe/knn"] > 0.7
    assert line["probe_pixels/linear"] == 1.0
    told = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert told["classes"] == ["blue", "red"]
    assert sum(told["splits"].values()) == told["clips"] == 24
    assert "@" in run_folder.read_config(str(tmp_path / "run"))["probe"]["catalog"], "pinned like that of the clips"
    with pytest.raises(InputRefused, match=r"none\.csv does not exist"):
        bad = settings(catalog_uri, tmp_path / "bad", *given, "probe.format=auto", f"probe.labels={tmp_path}/none.csv")
        online_probe.prepare(pretrain.pinned(bad), reporter)
