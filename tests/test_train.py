"""Pretraining on Ray Train: two workers, exact resume after kill -9, refusals."""

import json
from pathlib import Path

import pytest

from pipelines import pretrain, run_folder
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.presets import load

pytestmark = pytest.mark.ray

SMOKE = ["preset=demo", "smoke=true", "train.precision=fp32"]


def settings(catalog_uri: str, run_dir: Path, *more: str) -> PretrainConfig:
    return load(PretrainConfig, "pretrain", [*SMOKE, f"catalog={catalog_uri}", f"run.dir={run_dir}", *more])


@pytest.fixture(scope="module")
def unbroken(catalog_uri, reporter, tmp_path_factory) -> Path:
    """Eight steps on two DDP workers, without any trouble."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    pretrain.run(settings(catalog_uri, run_dir, "train.steps=8", "train.num_workers=2"), reporter)
    return run_dir


def test_two_workers_train_and_every_step_is_logged_once(unbroken):
    lines = run_folder.read_parts(str(unbroken), run_folder.METRICS)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(0 < line["loss"] < 2 and line["rank_me"] > 1 for line in lines)
    assert run_folder.latest_checkpoint(str(unbroken)).step == 8
    encoder, config = pretrain.load_encoder(str(unbroken))
    assert config.catalog.rpartition("@")[2].isdigit(), "the catalog's version is pinned"
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_resume_rules(unbroken, catalog_uri, reporter, tmp_path):
    with pytest.raises(UsageError, match=r"already holds step 8.*run.resume=auto"):
        pretrain.run(settings(catalog_uri, unbroken, "train.steps=8", "run.resume=never"), reporter)
    with pytest.raises(InputRefused, match="no committed checkpoint"):
        pretrain.run(settings(catalog_uri, tmp_path / "new", "run.resume=must"), reporter)
    with pytest.raises(UsageError, match=r"was started with seed=0, now it is 1.*another run.dir"):
        pretrain.run(settings(catalog_uri, unbroken, "train.steps=8", "seed=1"), reporter)


def test_a_checkpoint_that_no_snapshot_names_does_not_count(unbroken, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(unbroken, copy)
    torn = copy / "checkpoints" / "step_00000099-dead00"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"half")
    assert run_folder.latest_checkpoint(str(copy)).step == 8


def test_a_non_finite_loss_stops_the_run_and_names_the_samples(catalog_uri, reporter, tmp_path):
    config = settings(catalog_uri, tmp_path / "run", "train.num_workers=0", "optim.lr=1.0e+30", "optim.start_lr=1.0e+30")
    with pytest.raises(InputRefused, match=r"loss is nan at step \d+ for samples \[\d+"):
        pretrain.run(config, reporter)


def test_more_workers_than_cpus_is_a_usage_error(catalog_uri, reporter, tmp_path):
    with pytest.raises(UsageError, match=r"train\.num_workers=64"):
        more = ("train.num_workers=64", "train.batch_size=64")
        pretrain.run(settings(catalog_uri, tmp_path / "run", *more), reporter)


def test_provenance_names_code_and_versions(unbroken):
    facts = json.loads((unbroken / "provenance.json").read_text())
    assert {"ray", "torch", "timm", "av"} <= facts["versions"].keys()


def test_sharded_training_equals_ddp_and_continues_unsharded(unbroken, catalog_uri, reporter, tmp_path):
    """FSDP2 on two workers, then the same run in one process: the checkpoint holds whole tensors by name."""
    run_dir = tmp_path / "run"
    pretrain.run(settings(catalog_uri, run_dir, "train.steps=8", "train.num_workers=2", "train.parallel=fsdp"), reporter)
    for sharded, whole in zip(lines_of(run_dir), lines_of(unbroken), strict=True):
        keys = ("step", "loss", "grad_norm", "lr", "feature_std")
        assert [sharded[key] for key in keys] == pytest.approx([whole[key] for key in keys], rel=1e-4)
    pretrain.run(settings(catalog_uri, run_dir, "train.steps=9", "train.num_workers=0"), reporter)
    assert [line["step"] for line in lines_of(run_dir)] == list(range(1, 10))


def test_a_run_starts_from_another_run_or_from_a_converted_model(unbroken, catalog_uri, reporter, tmp_path):
    """Without learning, what comes out of one step is what `init` held."""
    from pipelines import convert, model_folder
    from pipelines.config import ConvertConfig

    ours, official = str(tmp_path / "ours"), str(tmp_path / "official.pt")
    for way in (("jepa", "vjepa2", str(unbroken), official), ("vjepa2", "jepa", official, ours)):
        heads = {"heads": 2, "predictor_heads": 2} if way[0] == "vjepa2" else {}
        convert.run(ConvertConfig(*way, **heads), reporter)
    before = model_folder.read(str(unbroken)).parts
    still = ("optim.lr=0.0", "optim.start_lr=0.0", "optim.final_lr=0.0", "optim.ema=1.0", "train.steps=1", "train.num_workers=0")
    for name, init in (("from-run", unbroken), ("from-model", ours)):
        pretrain.run(settings(catalog_uri, tmp_path / name, f"init={init}", *still), reporter)
        after = model_folder.read(str(tmp_path / name)).parts
        assert after.keys() == before.keys()
        assert all((after[part][key] == value).all() for part, state in before.items() for key, value in state.items())
    with pytest.raises(InputRefused, match=r"init=.*does not fit model.*"):
        more = (f"init={ours}", "model.encoder.dim=96", "train.num_workers=0", "train.steps=1")
        pretrain.run(settings(catalog_uri, tmp_path / "unfit", *more), reporter)


def lines_of(run_dir: Path) -> list[dict]:
    return run_folder.read_parts(str(run_dir), run_folder.METRICS)
