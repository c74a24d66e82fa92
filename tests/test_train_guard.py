"""What a run does about an alarm: which checkpoint it names, keeps, sets aside; and that a rollback cannot be half done."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jepa_core.config import GuardConfig, OptimConfig
from jepa_core.guard import FULL, Alarm
from pipelines import run_folder, train_guard
from pipelines.errors import UsageError
from pipelines.train_config import TrainConfig, check_train

ALARM = Alarm(FULL, since=70, sound=60, told="target_std 0.01 (was 0.9)", first=True)


@pytest.fixture
def run_dir(tmp_path) -> str:
    """Checkpoints of steps 40, 60, 80, 90."""
    for step in (40, 60, 80, 90):
        run_folder.commit(run_folder.checkpoint_folder(str(tmp_path), step, "abcdef"), {"step": step, "files": {}})
    return str(tmp_path)


def steps(run_dir: str) -> list[int]:
    return [found.step for found in run_folder.checkpoints(run_dir)]


def make_loop(run_dir: str, optim: OptimConfig = OptimConfig(), **guard) -> SimpleNamespace:  # noqa: B008
    return SimpleNamespace(run_dir=run_dir, optim=optim, train=TrainConfig(steps=200, guard=GuardConfig(**guard)))


def test_stop_names_signature_onset_and_checkpoint_and_touches_nothing(run_dir):
    ending = train_guard.ending(make_loop(run_dir, action="stop"), ALARM, 95)
    assert "full_collapse since step 70" in ending["refused"]
    assert f"{run_dir}/checkpoints/step_00000060-abcdef" in ending["refused"]
    assert steps(run_dir) == [90, 80, 60, 40]


def test_rollbacks_add_up_and_then_the_run_stops(run_dir):
    loop = make_loop(run_dir, action="rollback", rollback_lr_scale=0.25)
    assert "step_00000060" in train_guard.ending(loop, ALARM, 95)["rolled_back"]
    assert steps(run_dir) == [60, 40]
    assert train_guard.apply(run_dir, loop.optim) == 0.25
    again = replace(ALARM, since=20, sound=10)
    assert "the start of the run" in train_guard.ending(loop, again, 65)["rolled_back"]
    assert steps(run_dir) == []
    assert train_guard.apply(run_dir, loop.optim) == 0.0625
    assert "rolled back 2 times (train.guard.max_rollbacks)" in train_guard.ending(loop, again, 65)["refused"]
    assert [note["to"] for note in train_guard.read(run_dir, loop.optim)] == [60, 0]


def test_a_rollback_that_was_interrupted_is_finished_at_the_next_start(run_dir, monkeypatch):
    loop = make_loop(run_dir, action="rollback")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "set_aside", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_guard.ending(loop, ALARM, 95)
    assert steps(run_dir) == [90, 80, 60, 40]
    assert train_guard.apply(run_dir, loop.optim) == 0.5
    assert steps(run_dir) == [60, 40]
    new = Path(run_folder.checkpoint_folder(run_dir, 80, "fedcba"))
    run_folder.commit(str(new), {"step": 80, "files": {}})
    train_guard.apply(run_dir, loop.optim)
    assert steps(run_dir) == [80, 60, 40], "what was written since counts"


def test_other_settings_of_the_optimizer_are_another_beginning(run_dir):
    train_guard.ending(make_loop(run_dir, action="rollback"), ALARM, 95)
    assert train_guard.apply(run_dir, OptimConfig(lr=1e-5)) == 1.0


def test_the_checkpoint_to_return_to_is_kept(run_dir):
    run_folder.prune_checkpoints(run_dir, 1, sound=70)
    assert steps(run_dir) == [90, 60]
    run_folder.prune_checkpoints(run_dir, 1, sound=95)
    assert steps(run_dir) == [90]


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"warmup": 0}, {"rollback_lr_scale": 0.0}, {"max_rollbacks": -1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match=r"train\.guard"):
        check_train(TrainConfig(steps=1, guard=GuardConfig(**wrong)))


def test_the_optimizers_settings_survive_json():
    optim = OptimConfig(final_ema=0.5)
    assert OptimConfig(**json.loads(json.dumps(optim.__dict__))) == optim
