"""The guard: collapses that are injected into real training are caught, healthy seeds raise no alarm, nothing is forgotten."""

import json

import guard_runs
import pytest
import torch

from jepa_core.config import GuardConfig
from jepa_core.guard import DIMENSIONAL, FULL, SHORTCUT, Guard, sound_step
from jepa_core.health import (
    CLIP_ROWS,
    RecentClips,
    effective_ranks,
    mean_cosine,
    mean_predictor_l1,
    position_mean_l1,
    sample_l1,
)

SOUND = {"loss": 0.8, "target_std": 0.9, "rank_me": 40.0, "rank_me_clip": 25.0, "loss_over_trivial": 0.99, "trivial": 0.8,
         "position_mean": 0.8}  # fmt: skip
SIGNS = {
    FULL: {"loss": 0.1, "target_std": 0.05},
    DIMENSIONAL: {"rank_me": 5.0, "rank_me_clip": 2.0},
    SHORTCUT: {"loss_over_trivial": 0.6, "rank_me_clip": 9.0},
}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alarms(lines) -> list:
    guard = Guard(GuardConfig(), {})
    return [alarm for line in lines if (alarm := guard.see(line)) is not None]


HARMS = [
    (guard_runs.one_vector, FULL, {}),
    (guard_runs.one_direction, DIMENSIONAL, {}),
    (guard_runs.fast_and_unsteady, DIMENSIONAL, {}),
    (guard_runs.background_only, SHORTCUT, {"backgrounds": True}),
    (guard_runs.position_only, SHORTCUT, {"position": "sincos"}),
]


@pytest.mark.guard
@pytest.mark.parametrize(("harm", "signature", "options"), HARMS, ids=[harm.__name__ for harm, *_ in HARMS])
def test_an_injected_collapse_is_caught_within_100_steps(one_thread, harm, signature, options):
    guard, first = Guard(GuardConfig(), {}), None
    for line in guard_runs.lines(0, guard_runs.HARM_AT + 100, harm, **options):
        first = guard.see(line)
        if first:
            break
    assert first is not None
    assert first.signature == signature
    assert guard_runs.HARM_AT < first.since < line["step"]
    assert guard_runs.HARM_AT <= first.sound < first.since


@pytest.mark.guard
@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_seed_raises_no_alarm(one_thread, seed):
    """Backgrounds and a fixed table of positions, which shortcuts could feed on, are there in some of the runs."""
    options = {"backgrounds": seed % 3 == 1, "position": "sincos" if seed % 3 == 2 else "rope"}
    lines = list(guard_runs.lines(seed, guard_runs.HARM_AT + 80, **options))
    assert alarms(lines) == []
    assert lines[-1]["loss"] < lines[0]["loss"], "it does train"
    assert all("rank_me_clip" in line for line in lines)


@pytest.mark.parametrize("signature", SIGNS)
def test_a_signature_must_stay_for_some_lines_and_is_told_once(signature):
    sick = SOUND | SIGNS[signature]
    lines = [{"step": 10 * n, **line} for n, line in enumerate([SOUND] * 5 + [sick] * 2 + [SOUND] + [sick] * 5, 1)]
    found = alarms(lines)
    assert [alarm.first for alarm in found] == [True, False, False]
    assert {(alarm.signature, alarm.since, alarm.sound) for alarm in found} == {(signature, 90, 80)}
    assert alarms(lines[:5] + [{**line, **SOUND} for line in lines[5:]]) == []


@pytest.mark.parametrize("signature", SIGNS)
def test_a_run_that_continues_has_forgotten_nothing(signature):
    lines = [{"step": n, **SOUND, **(SIGNS[signature] if n > 5 else {})} for n in range(1, 12)]
    state: dict = {}
    told = []
    for line in lines:
        state = json.loads(json.dumps(state))  # a checkpoint after every line
        told.append(Guard(GuardConfig(), state).see(line))
    assert told == [next((a for a in alarms(lines[: n + 1]) if n >= 7), None) and alarms(lines[: n + 1])[-1] for n in range(11)]
    assert told[7] is not None
    assert sound_step(state) == 5, "a checkpoint up to here is kept"


def test_what_is_not_measured_decides_nothing():
    unmeasured = {key: value for key, value in SOUND.items() if key != "rank_me_clip"}
    sick = SOUND | SIGNS[FULL]
    first = [{"step": n, **SOUND} for n in (1, 2, 3)]
    middle = [{"step": 4, **sick}, {"step": 5, **sick}, {"step": 6, **unmeasured}]
    assert alarms([*first, *middle]) == []
    (alarm,) = alarms([*first, *middle, {"step": 7, **sick}])
    assert (alarm.since, alarm.sound) == (4, 3)
    assert alarms([{"step": n, **unmeasured, **SIGNS[FULL]} for n in range(20)]) == [], "without a reference there is no verdict"


def test_a_run_that_starts_collapsed_is_seen_by_the_floor():
    flat = SOUND | {"target_std": 0.01, "loss": 0.01}
    assert alarms([{"step": n, **flat} for n in range(1, 10)])[0].signature == FULL


def test_clips_of_other_lengths_are_compared_with_their_like():
    image = SOUND | {"rank_me": 8.0, "rank_me_clip": 5.0}
    guard = Guard(GuardConfig(), {})
    seen = [guard.see({"step": n, **(image if n % 2 else SOUND), "loss_over_trivial": 0.5}, n % 2) for n in range(1, 20)]
    assert seen == [None] * 19


def test_ranks_count_directions():
    torch.manual_seed(0)
    rank, directions = effective_ranks(torch.randn(2000, 8))
    assert rank == pytest.approx(8, abs=0.1)
    assert directions == pytest.approx(8, abs=0.2)
    uneven = torch.randn(4000, 4) * torch.tensor([3.0, 1.0, 1.0, 1.0])
    assert effective_ranks(uneven)[1] == pytest.approx((9 + 3) ** 2 / (81 + 3), rel=0.05), "(sum v)^2 / sum v^2"
    assert effective_ranks(torch.ones(5, 3)) == pytest.approx((1, 0), abs=1e-3)


def test_clips_of_several_microbatches_make_a_rank():
    recent, rows = RecentClips(), torch.randn(CLIP_ROWS + 40, 6, generator=torch.Generator().manual_seed(0))
    for part in rows[: CLIP_ROWS - 4].split(4):
        recent.add(part)
        assert recent.ranks() is None
    for part in rows[CLIP_ROWS - 4 :].split(4):
        recent.add(part)
    assert recent.ranks() == pytest.approx(effective_ranks(rows[-CLIP_ROWS:]))


def test_the_mean_at_each_position_is_a_stronger_baseline_where_position_tells_something():
    torch.manual_seed(0)
    places, content = torch.randn(1, 32, 64) * 3, torch.randn(4, 32, 64)
    alone = content.abs().mean().item()
    assert position_mean_l1(content + places).mean().item() == pytest.approx(alone, rel=0.03), "what is left without the position"
    assert mean_predictor_l1(content + places) > 2 * alone
    assert position_mean_l1(content[:1]) is None


def test_cosines_and_losses_of_samples():
    assert mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])) == pytest.approx((0 + 0 - 1) / 3)
    assert mean_cosine(torch.ones(7, 3)) == pytest.approx(1)
    prediction = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]], [[0.0], [2.0]], [[4.0], [9.0]]])  # 2 targets of 2 samples
    valid = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    assert sample_l1(prediction, torch.zeros_like(prediction), 2, valid).tolist() == [1.5, (5 + 6.5) / 2]
