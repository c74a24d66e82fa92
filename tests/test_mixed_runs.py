"""Runs that mix catalogs, clip lengths and images: each microbatch of one length, the mix exact, any number of workers."""

import os
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_catalogs

from pipelines import pretrain, run_folder
from pipelines.config import PretrainConfig
from pipelines.errors import UsageError
from pipelines.presets import load

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def catalogs(ray_session, reporter, tmp_path_factory) -> dict[str, str]:
    """Videos, other videos, images."""
    return make_catalogs(tmp_path_factory.mktemp("mixed"), {"videos": 3, "others": 2}, reporter)


def settings(catalogs: dict[str, str], run_dir: Path, *more: str) -> PretrainConfig:
    mix = [f"datasets.{name}.catalog={uri}" for name, uri in catalogs.items()]
    mix += ["datasets.videos.weight=0.5", "datasets.others.weight=0.25", "datasets.images.weight=0.25"]
    mix += ["datasets.others.num_frames=8", "datasets.others.fps=10.0", "datasets.images.num_frames=1"]
    model = ["model.encoder.image_tokenizer=true", "model.predictor.mask_token_by=clip", "model.predictor.num_mask_tokens=4"]
    plain = ["preset=demo", "smoke=true", "train.precision=fp32", "train.batch_size=8", "train.microbatches=4", "train.steps=8"]
    return load(PretrainConfig, "pretrain", [*plain, *mix, *model, f"run.dir={run_dir}", *more])


@pytest.fixture(scope="module")
def alone(catalogs, reporter, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    pretrain.run(settings(catalogs, run_dir, "train.num_workers=0"), reporter)
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in run_folder.read_parts(str(run_dir), run_folder.METRICS)]


FULL = pytest.mark.skipif(os.environ.get("JEPA_CHAOS") != "all", reason="make chaos runs it")


@pytest.mark.chaos
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=FULL)])
def test_two_workers_learn_from_the_mix_what_one_does(catalogs, alone, reporter, tmp_path, parallel):
    """On two workers a step has clips on one and images on the other, which use different weights: none may be left behind."""
    run_dir = tmp_path / "run"
    pretrain.run(settings(catalogs, run_dir, "train.num_workers=2", f"train.parallel={parallel}"), reporter)
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-3)
    mine, theirs = (run_folder.load_weights(run_folder.latest_checkpoint(str(folder)), "encoder") for folder in (run_dir, alone))
    for key, value in theirs.items():
        assert mine[key] == pytest.approx(value, rel=1e-2, abs=2e-4), key


def test_weights_are_quotas_and_units_have_one_length(catalogs, alone):
    from jepa_core.order import DatasetSize, SamplePlan

    plan = SamplePlan(0, [DatasetSize(3, 0.5, 0), DatasetSize(2, 0.25, 1), DatasetSize(5, 0.25, 2)], 2)
    shown = Counter()
    for unit in range(32):
        group, draw = plan.unit(unit)
        assert {plan.datasets[d].group for d in draw.dataset} == {group}
        shown.update(draw.dataset.tolist())
    assert shown == {0: 32, 1: 16, 2: 16}
    assert len(losses(alone)) == 8


def test_every_dataset_has_its_loss(alone):
    lines = run_folder.read_parts(str(alone), run_folder.METRICS)
    told = [{key: value for key, value in line.items() if key.startswith("loss/")} for line in lines]
    assert set().union(*told) == {"loss/videos", "loss/others", "loss/images"}
    for line, each in zip(lines, told, strict=True):
        assert min(each.values()) * 0.9999 <= line["loss"] <= max(each.values()) * 1.0001
    assert any(len(each) > 1 for each in told)


def test_a_run_names_one_catalog_or_several_datasets(catalogs, tmp_path):
    with pytest.raises(UsageError, match=r"catalog"):
        settings(catalogs, tmp_path, "catalog=x").check()
    with pytest.raises(UsageError, match=r"catalog"):
        load(PretrainConfig, "pretrain", ["preset=demo", "smoke=true", f"run.dir={tmp_path}"])
