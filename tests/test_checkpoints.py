"""Checkpoints: only what is committed counts, what is damaged is passed over, what fails to be written harms nothing."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines import run_folder, storage
from pipelines.errors import Retryable
from pipelines.train_state import Saver, TrainState


def make_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    module = nn.ModuleDict({"encoder": nn.Linear(8, 8), "predictor": nn.Linear(8, 4)})
    return TrainState(module, torch.optim.AdamW(module.parameters(), lr=0.1))


def learn(state: TrainState, steps: int = 1) -> None:
    for _ in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(state.progress.step))
        state.module["predictor"](state.module["encoder"](x)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.progress.step += 1


def make_saver(run_dir: Path, keep: int = 2) -> Saver:
    return Saver(str(run_dir), keep, {"catalogs": {"videos": "c@3"}}, "abcdef", None)


def save(saver: Saver, state: TrainState) -> None:
    saver.begin(state, ("encoder",), lambda: None)
    saver.finish()


@pytest.fixture
def saved(tmp_path) -> tuple[Path, TrainState]:
    """A run with the checkpoints of steps 1, 2 and 3."""
    state, saver = make_state(), make_saver(tmp_path, keep=3)
    for _ in range(3):
        learn(state)
        save(saver, state)
        assert saver.error is None
    return tmp_path, state


def files_of(run_dir: Path, step: int) -> list[Path]:
    folder = next((run_dir / "checkpoints").glob(f"step_{step:08d}-*"))
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != run_folder.COMMIT)


def test_a_run_that_continues_from_a_checkpoint_does_what_the_unbroken_one_does(saved):
    run_dir, state = saved
    learn(state, 2)
    other = make_state(seed=9)
    other.load(run_folder.latest_checkpoint(str(run_dir)))
    assert other.progress.step == 3
    learn(other, 2)
    for name, value in state.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name])
    for mine, theirs in zip(state.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_commit_is_the_evidence(saved):
    run_dir, state = saved
    checkpoint = run_folder.latest_checkpoint(str(run_dir))
    record = run_folder.read_commit(checkpoint)
    assert (record["step"], record["catalogs"], record["progress"]["step"]) == (3, {"videos": "c@3"}, 3)
    assert record["progress"]["save_s"] > 0
    assert set(record["files"]) == {path.relative_to(checkpoint.uri).as_posix() for path in files_of(run_dir, 3)}
    encoder = run_folder.load_weights(checkpoint, "encoder")
    assert torch.equal(encoder["weight"], state.module["encoder"].weight)


def test_the_copy_is_of_the_moment_it_was_made(tmp_path, monkeypatch):
    """What is written in the background is the state of that step, although training goes on meanwhile."""
    state, saver = make_state(), make_saver(tmp_path)
    learn(state)
    expected = state.module["encoder"].weight.detach().clone()
    write, writing, learnt = storage.upload, threading.Event(), threading.Event()

    def slow(*args):
        writing.set()
        assert learnt.wait(30)
        write(*args)

    monkeypatch.setattr(storage, "upload", slow)
    saver.begin(state, ("encoder",), lambda: None)
    assert writing.wait(30)
    assert saver.busy
    learn(state, 3)
    learnt.set()
    saver.finish()
    found = run_folder.latest_checkpoint(str(tmp_path))
    assert found.step == 1
    assert torch.equal(run_folder.load_weights(found, "encoder")["weight"], expected)
    other = make_state(seed=1)
    other.load(found)
    assert torch.equal(other.module["encoder"].weight, expected)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("which", range(4))
def test_damage_to_any_file_leads_to_the_checkpoint_before(saved, harm, which):
    run_dir, _ = saved
    names = files_of(run_dir, 3)
    assert len(names) > 2
    path = names[which % len(names)]
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert run_folder.newest_sound_checkpoint(str(run_dir)).step == 2
    assert run_folder.latest_checkpoint(str(run_dir)).step == 2, "every later reader passes it over as well"
    (reason,) = run_folder.damaged_checkpoints(str(run_dir)).values()
    assert path.name in reason


@pytest.mark.parametrize("text", ["", "{", '{"step": 3}', "[]"])
def test_a_damaged_commit_leads_to_the_checkpoint_before(saved, text):
    run_dir, _ = saved
    folder = Path(run_folder.latest_checkpoint(str(run_dir)).uri)
    (folder / run_folder.COMMIT).write_text(text)
    assert run_folder.newest_sound_checkpoint(str(run_dir)).step == 2


def test_without_any_sound_checkpoint_there_is_none(saved):
    run_dir, _ = saved
    for step in (1, 2, 3):
        files_of(run_dir, step)[0].unlink()
    assert run_folder.newest_sound_checkpoint(str(run_dir)) is None


def test_torn_checkpoints_do_not_count_and_go_with_the_next_good_one(saved):
    run_dir, state = saved
    torn = run_dir / "checkpoints" / "step_00000003-dead00"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "__0_0.distcp").write_bytes(b"half")
    ahead = run_dir / "checkpoints" / "step_00000099-dead01"
    ahead.mkdir()
    (ahead / "encoder.safetensors").write_bytes(b"half")
    assert run_folder.latest_checkpoint(str(run_dir)).step == 3
    learn(state)
    save(make_saver(run_dir, keep=2), state)
    there = {path.name[:13] for path in (run_dir / "checkpoints").iterdir() if any(path.iterdir())}
    assert there == {"step_00000003", "step_00000004", "step_00000099"}, "two are kept; what is ahead may be at work"
    assert not list(torn.rglob("*.distcp"))


def test_a_full_disk_fails_the_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    state, saver = make_state(), make_saver(tmp_path)
    learn(state)
    save(saver, state)
    history: list[int] = []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    learn(state)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", full)
        saver.begin(state, ("encoder",), lambda: history.append(2))
        saver.finish()
    assert isinstance(saver.error, Retryable)
    assert "No space left on device" in str(saver.error)
    assert (saver.failures, saver.committed) == (1, 1)
    assert run_folder.newest_sound_checkpoint(str(tmp_path)).step == 1
    learn(state)
    save(saver, state)
    assert (saver.error, saver.failures, saver.committed) == (None, 0, 3)
    assert run_folder.newest_sound_checkpoint(str(tmp_path)).step == 3


def test_history_is_written_before_the_checkpoint_counts(tmp_path):
    state, saver = make_state(), make_saver(tmp_path)
    learn(state)
    seen = []
    saver.begin(state, ("encoder",), lambda: seen.append(run_folder.latest_checkpoint(str(tmp_path))))
    saver.finish()
    assert seen == [None]
    assert run_folder.latest_checkpoint(str(tmp_path)).step == 1


def test_parts_beyond_a_checkpoint_are_forgotten(tmp_path):
    for kind in (run_folder.METRICS, run_folder.LEDGER, run_folder.QUARANTINE):
        for first, rank in ((1, 0), (1, 1), (5, 0), (5, 1), (9, 0)):
            run_folder.write_part(str(tmp_path), kind, first, [{"step": first}], rank)
    run_folder.delete_parts_after(str(tmp_path), 4)
    left = [path.name for path in sorted((tmp_path / "ledger").iterdir())]
    assert left == ["00000001-r1.jsonl", "00000001.jsonl"]


def test_starts_are_counted_and_the_first_is_remembered(tmp_path, monkeypatch):
    from pipelines.config import RunConfig

    config = {"a": 1}
    monkeypatch.setattr(run_folder, "to_yaml", lambda tree: json.dumps(tree))
    run_folder.begin(RunConfig(dir=str(tmp_path)), config)
    first = run_folder.read_json(str(tmp_path), run_folder.PROVENANCE)
    run_folder.begin(RunConfig(dir=str(tmp_path)), config)
    second = run_folder.read_json(str(tmp_path), run_folder.PROVENANCE)
    assert (first["starts"], second["starts"]) == (1, 2)
    assert first["first_started"] == second["first_started"]
