"""The planner on worlds whose best action is known, and the cached rollout against the plain one."""

import math

import pytest
import torch
from torch.nn import functional as F

from jepa_core import planner
from jepa_core.action_cache import CachedPredict
from jepa_core.action_predictor import ActionPredictor
from jepa_core.config import ActionPredictorConfig
from jepa_core.planner import Pursuit, plan, unroll
from jepa_core.planner_config import PlannerConfig
from jepa_core.poses import compose

ORIGIN = torch.zeros(7)


def linear_world(z: torch.Tensor, actions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Tokens hold the pose: an action adds to it."""
    return z + actions[..., None, :].expand(*z.shape[:2], z.shape[2], 7)


def pose(**axes: float) -> torch.Tensor:
    """Tokens [4, 7] of a pose."""
    return torch.tensor([axes.get(name, 0.0) for name in ("x", "y", "z", "rx", "ry", "rz", "gripper")]).expand(4, 7)


def found(goal: torch.Tensor, start: planner.Plan | None = None, seed: int = 0, **settings: object) -> planner.Plan:
    return plan(linear_world, pose(), ORIGIN, goal, PlannerConfig(**settings), torch.Generator().manual_seed(seed), start)


@pytest.mark.parametrize("energy", ["l1", "l2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "cem", "samples": 300, "iterations": 12},
        {"method": "mppi", "samples": 300, "iterations": 12},
        {"method": "gradient", "samples": 4, "elites": 2, "iterations": 80, "learning_rate": 0.05},
    ],
    ids=lambda settings: settings["method"],
)
def test_each_method_finds_the_known_answer(settings, energy):
    goal = pose(x=0.05, y=-0.03, z=0.02, gripper=0.5)
    got = found(goal, energy=energy, **settings)
    torch.testing.assert_close(got.actions[0, :3], goal[0, :3], atol=4e-3, rtol=0)
    assert got.actions[0, 6].item() == pytest.approx(0.5, abs=0.06)
    assert (got.actions[0, 3:6] == 0).all(), "rotation is not searched unless asked for"
    assert got.energies[-1] < got.energies[0]


@pytest.mark.parametrize("method", ["cem", "mppi", "gradient"])
def test_no_action_leaves_its_bounds(method):
    far = pose(x=1.0, y=-1.0, z=1.0, rx=1.0, gripper=5.0)
    got = found(far, method=method, samples=60, iterations=25, horizon=2, bounds={"z": [-0.01, 0.02]}, max_rotation=0.1, refine=3)
    assert (got.mean.abs() <= torch.tensor([0.075, 0.075, 0.02, 0.1, 0.1, 0.1, 0.75]) + 1e-6).all()
    assert got.mean[:, 2].min() >= -0.01 - 1e-6
    x, y, z, turn, *_, gripper = got.mean.sum(0).tolist()
    assert (x > 0.09, y < -0.09, z > 0.0, turn > 0.08, gripper > 0.9) == (True,) * 5, "of at most twice the bound"


def test_pinned_axes_the_closing_gripper_and_small_gripper_changes():
    goal = pose(x=0.1, y=0.05, gripper=0.1)
    got = found(goal, samples=200, horizon=2, pinned={"y": 0.01}, close_gripper=1)
    assert got.actions[:, 1].tolist() == pytest.approx([0.01, 0.01])
    assert got.actions[1, 6] == 1.0
    sticky = found(goal, samples=200, bounds={"gripper": [0.0, 0.2]})
    assert sticky.mean[0, 6] > 0.05
    assert sticky.actions[0, 6] == 0, "a change below 0.25 is dropped, as in the released planner"
    assert found(goal, samples=200, bounds={"gripper": [0.0, 0.2]}, sticky_gripper=0.0).actions[0, 6] > 0.05


def test_the_sum_over_steps_arrives_earlier_than_the_last_step():
    goal = pose(x=0.075)
    early = found(goal, samples=400, horizon=2, energy_over="sum").actions[:, 0]
    torch.testing.assert_close(early, torch.tensor([0.075, 0.0]), atol=0.01, rtol=0)
    ends = found(goal, samples=400, horizon=2).actions[:, 0]
    assert ends.sum().item() == pytest.approx(0.075, abs=0.01)


def test_the_generator_decides():
    goal = pose(x=0.05)
    first, again, other = (found(goal, seed=seed, samples=50, iterations=2) for seed in (5, 5, 6))
    assert torch.equal(first.actions, again.actions)
    assert not torch.equal(first.actions, other.actions)


def test_a_warm_start_begins_where_the_last_plan_led():
    goal, tight = pose(x=0.06, y=-0.04), {"samples": 20, "iterations": 1, "elites": 4}
    before = found(goal, samples=400)
    cold, warm = found(goal, **tight), found(goal, start=before, **tight)
    assert warm.energies[0] < 0.5 * cold.energies[0]
    steps = torch.arange(21.0).view(3, 7) / 1000
    last = planner.Plan(steps, [])
    assert torch.equal(planner.Space(PlannerConfig(horizon=3), ORIGIN.device).first_mean(last)[:, 0], steps[[1, 2, 2], 0])
    assert torch.equal(planner.Space(PlannerConfig(), ORIGIN.device).first_mean(last)[:, 0], steps[[1], 0])


def test_a_budget_ends_the_search_between_iterations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(planner.time, "perf_counter", lambda: now[0])

    def slow(z, actions, states):
        now[0] += 1.0
        return linear_world(z, actions, states)

    def did(budget):
        now[0] = 0.0
        config = PlannerConfig(samples=20, budget_s=budget)
        return plan(slow, pose(), ORIGIN, pose(x=0.1), config, torch.Generator().manual_seed(0))

    assert [did(budget).iterations for budget in (0.5, 3.0, 3.9, 0.0)] == [1, 3, 3, 10]
    assert did(3.9).seconds == 3.0
    assert did(3.9).evaluations == 60


def test_evaluations_are_counted_as_the_settings_say():
    for settings in (
        {"samples": 30, "iterations": 4},
        {"samples": 40, "iterations": 4, "shrink": 0.5, "keep_elites": 5, "refine": 2, "horizon": 2},
        {"method": "gradient", "samples": 20, "iterations": 3},
    ):
        assert found(pose(x=0.05), **settings).evaluations == PlannerConfig(**settings).evaluations
    assert PlannerConfig(samples=40, iterations=4, shrink=0.5).evaluations == 40 + 20 + 10 + 10


def test_kept_elites_never_lose_the_best_sample():
    kept = found(pose(x=0.05, y=0.02), samples=20, iterations=8, keep_elites=10).energies
    assert kept == sorted(kept, reverse=True)


def test_refinement_improves_a_coarse_search():
    goal, coarse = pose(x=0.05, y=-0.02, z=0.01), {"samples": 20, "iterations": 2, "energy": "l2", "learning_rate": 0.05}
    plain, refined = found(goal, **coarse), found(goal, refine=20, **coarse)
    assert refined.energies[-1] < 0.2 * plain.energies[-1]


def test_goals_take_turns_and_a_new_goal_drops_the_warm_start():
    goals = torch.stack([pose(x=0.05), pose(y=0.05)])
    pursuit = Pursuit(linear_world, goals, [2, 1], PlannerConfig(samples=200), torch.Generator().manual_seed(0))
    indices, actions = [], []
    for _ in range(4):
        indices.append(pursuit.goal_index)
        actions.append(pursuit.act(pose(), ORIGIN).actions[0])
    assert indices == [0, 0, 1, 1]
    assert [bool(action[1] > 0.04) for action in actions] == [False, False, True, True]
    with pytest.raises(ValueError, match="2 goals need as many"):
        Pursuit(linear_world, goals, [2], PlannerConfig(), torch.Generator())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": 5}, "elites=10 of planner.samples=5"),
        ({"horizon": 0}, "planner.horizon=0"),
        ({"shrink": 1.5}, "planner.shrink=1.5"),
        ({"momentum_std": 1.0}, "planner.momentum_std=1.0"),
        ({"close_gripper": 1}, "planner.close_gripper=1"),
        ({"bounds": {"x": [1.0, 0.0]}}, "planner.bounds.x"),
        ({"bounds": {"w": [1.0, 0.0]}}, "planner.bounds.w"),
        ({"bounds": {"x": [0.0, 1.0]}, "pinned": {"x": 0.0}}, "planner.pinned.x"),
        ({"max_step": 0.0, "max_gripper": 0.0}, "no axis is left"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        found(pose(), **settings)


def test_goal_and_observation_are_encoded_alike():
    with pytest.raises(ValueError, match="encode both alike"):
        plan(linear_world, pose(), ORIGIN, torch.zeros(9, 7), PlannerConfig(), torch.Generator())


def world(**settings: object) -> tuple[CachedPredict, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random predictor of some size whose weights are large enough for actions to matter; z, state, goal."""
    torch.manual_seed(0)
    predictor = ActionPredictor(ActionPredictorConfig(48, heads=4, action_scale=10.0, **settings), 24).eval()
    for weight in predictor.requires_grad_(False).parameters():
        weight.mul_(3.0 if weight.dim() > 1 else 1.0)
    z, goal = (F.layer_norm(torch.randn(12, 24), (24,)) for _ in range(2))
    return CachedPredict(predictor, (3, 4)), z, torch.randn(7) * 0.3, goal


@pytest.mark.parametrize(
    "settings", [{"depth": 1}, {"depth": 3}, {"depth": 2, "predict_change": True}, {"depth": 2, "use_state": False}], ids=str
)
def test_the_cached_rollout_is_the_plain_one(settings):
    predict, z, state, _ = world(**settings)
    actions = torch.randn(5, 3, 7) * 0.1
    plain, cached = unroll(predict, z, state, actions), predict.begin(z, state)(actions)
    assert (plain[0] - plain[1]).abs().mean() > 1e-3, "actions matter"
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=0)
    assert predict.begin(z, state).batch(3) >= 1


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("batch", [0, 7])
def test_the_cached_plan_is_the_plain_one(horizon, batch):
    predict, z, state, goal = world(depth=2)
    config = PlannerConfig(samples=40, iterations=3, horizon=horizon, batch=batch)
    cached, plain = (plan(p, z, state, goal, config, torch.Generator().manual_seed(1)) for p in (predict, predict.__call__))
    torch.testing.assert_close(cached.actions, plain.actions, atol=1e-4, rtol=0)
    assert cached.evaluations == plain.evaluations


def test_gradients_of_the_cached_rollout_are_the_plain_ones():
    predict, z, state, goal = world(depth=2)
    config = PlannerConfig(samples=10, horizon=2, energy="l2")
    points = torch.randn(6, 2, 4) * 0.05
    cached, plain = (planner.Search(p, z, state, goal, config).slopes(points) for p in (predict, predict.__call__))
    torch.testing.assert_close(cached, plain, atol=1e-5, rtol=1e-3)


def test_poses_of_many_samples_equal_those_of_one_at_a_time():
    states, actions = torch.randn(50, 7), torch.randn(50, 7) * 0.5
    together = compose(states, actions)
    assert not math.isnan(together.sum().item())
    torch.testing.assert_close(together, torch.stack([compose(s, a) for s, a in zip(states, actions, strict=True)]))
