"""The guard in real runs: it stops one whose target encoder fades, or takes it back to before that."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray.train
from harness import faulty, ledger, once, settings, slow, trace

from pipelines import pretrain, run_folder
from pipelines.errors import InputRefused

pytestmark = [pytest.mark.ray, pytest.mark.guard]

HARM_AT = 18
OPTIONS = ("train.steps=32", "train.batch_size=16", "train.checkpoint_every=4", "train.log_every=1", "train.keep_checkpoints=1")


def fading(marker: Path | None) -> Any:
    """The target encoder's weights fade after every step from HARM_AT on; with a marker, in the first task of a rank only."""

    def fault(task: Any) -> None:
        rank = ray.train.get_context().get_world_rank()
        if marker is not None and not once(marker.with_name(f"{marker.name}-{rank}")):
            return
        original = task.after_step

        def after_step(step: int) -> None:
            original(step)
            if step >= HARM_AT:
                for parameter in task.module.target_encoder.parameters():
                    parameter.data.mul_(0.1)

        task.after_step = after_step

    return fault


def test_a_run_that_collapses_stops_and_says_where_it_was_sound(catalog_uri, reporter, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with faulty(monkeypatch, fading(None)), pytest.raises(InputRefused) as refused:
        pretrain.run(settings(catalog_uri, run_dir, *OPTIONS, "train.num_workers=2", "train.guard.action=stop"), reporter)
    lines = run_folder.read_parts(str(run_dir), run_folder.METRICS)
    told = lines[-1]["guard"]
    since = int(told.rpartition(" ")[2])
    assert told.startswith("full_collapse since step")
    assert HARM_AT < since <= lines[-1]["step"] < 32, "what led there can be read"
    assert f"full_collapse since step {since} " in str(refused.value)
    named = next(found for found in run_folder.checkpoints(str(run_dir)) if found.uri in str(refused.value))
    assert named.step == (since - 1) // 4 * 4, "although keep_checkpoints=1, and later ones were written"
    assert {"rank_me_clip", "target_std", "grad_norm_encoder", "grad_norm_predictor", "loss_over_position"} <= lines[-1].keys()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=slow)])
def test_a_run_that_collapses_goes_back_and_on(catalog_uri, reporter, tmp_path, monkeypatch, workers):
    run_dir = tmp_path / "run"
    with faulty(monkeypatch, fading(tmp_path / "harmed")):
        end = pretrain.run(
            settings(catalog_uri, run_dir, *OPTIONS, f"train.num_workers={workers}", "train.guard.action=rollback"), reporter
        )
    assert end["step"] == 32
    (note,) = json.loads((run_dir / "rollbacks.json").read_text())
    assert note["signature"] == "full_collapse"
    assert note["to"] == note["sound"] // 4 * 4 < note["since"] <= note["at"]
    lines = run_folder.read_parts(str(run_dir), run_folder.METRICS)
    assert [line["step"] for line in lines] == list(range(1, 33))
    assert not any("guard" in line for line in lines)
    assert len(ledger(run_dir)) == 32 * 2
    for line in lines:
        scale = 0.5 if line["step"] > note["to"] else 1.0
        assert line["lr"] == pytest.approx(scale * rate(line["step"]))
    straight = tmp_path / "straight"
    pretrain.run(settings(catalog_uri, straight, *OPTIONS, f"train.steps={note['to']}", f"train.num_workers={workers}"), reporter)
    keys = ("step", "loss", "feature_std")
    assert trace(run_dir, keys)[: note["to"] - 1] == trace(straight, keys)[:-1], "up to there nothing was changed"


def rate(step: int) -> float:
    from jepa_core.schedules import learning_rate

    return learning_rate(step - 1, 32, settings("catalog", "run").optim)
