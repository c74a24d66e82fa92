"""Losses, schedules, EMA, health numbers, planner and probes, each against a value worked out by other means."""

import copy

import pytest
import torch
from torch import nn

from jepa_core.config import OptimConfig, PlannerConfig
from jepa_core.objective import (
    action_losses,
    ema_update,
    feature_std,
    latent_l1,
    learning_rate,
    make_optimizer,
    mean_predictor_l1,
    normalize_targets,
    rank_me,
)
from jepa_core.planner import plan, rollout
from jepa_core.probe import retrieval_accuracy, ridge_r2


def test_targets_have_mean_zero_and_variance_one_per_token():
    target = normalize_targets(torch.randn(2, 5, 64) * 7 + 3)
    assert target.mean(-1).abs().max() < 1e-5
    assert (target.var(-1, unbiased=False) - 1).abs().max() < 1e-3


def test_the_mean_predictor_is_what_its_name_says():
    target = torch.tensor([[[0.0], [2.0]], [[4.0], [2.0]]])
    assert mean_predictor_l1(target) == latent_l1(torch.full_like(target, 2.0), target) == 1.0


def test_the_schedule_warms_up_stays_and_decays():
    config = OptimConfig(lr=1.0, start_lr=0.1, final_lr=0.0, warmup_steps=10, decay_steps=20)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate(99, 100, OptimConfig(lr=1.0, warmup_steps=0, decay_steps=0)) == 1.0


def test_ema_moves_the_target_by_one_minus_momentum():
    online = nn.Linear(3, 3)
    target = copy.deepcopy(online)
    with torch.no_grad():
        online.weight.add_(1.0)
    before = target.weight.clone()
    ema_update(target, online, 0.9)
    torch.testing.assert_close(target.weight, before + 0.1)
    torch.testing.assert_close(target.bias, online.bias)


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    decayed, spared = make_optimizer([model], OptimConfig(weight_decay=0.1)).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 4)]
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 3


def test_health_numbers_see_full_and_dimensional_collapse():
    torch.manual_seed(0)
    healthy = torch.randn(512, 32)
    assert feature_std(healthy) == pytest.approx(1, abs=0.05)
    assert rank_me(healthy) > 28
    assert feature_std(torch.ones(512, 32)) == 0
    line = torch.randn(512, 1) * torch.randn(1, 32) * 5
    assert feature_std(line) > 1, "the standard deviation alone does not see it"
    assert rank_me(line) < 1.1


def test_action_losses_of_a_perfect_and_of_a_copying_model():
    z = torch.arange(4.0)[None, :, None, None].expand(2, -1, 3, 5)  # step t is filled with t
    actions, states = torch.zeros(2, 3, 7), torch.zeros(2, 4, 7)
    assert action_losses(lambda tokens, a, s: tokens + 1, z, actions, states, 3) == (0.0, 0.0)
    forced, rolled = action_losses(lambda tokens, a, s: tokens, z, actions, states, 3)
    assert forced == 1
    assert rolled == 2  # errors 1, 2, 3: a rollout's error grows


def test_the_rollout_loss_trains_through_every_step():
    weight = torch.ones((), requires_grad=True)
    z = torch.randn(1, 3, 2, 4)
    _, rolled = action_losses(lambda tokens, a, s: tokens * weight, z, torch.zeros(1, 2, 7), torch.zeros(1, 3, 7), 2)
    rolled.backward()
    expected = ((z[:, 0] - z[:, 1]).sign() * z[:, 0]).mean() + ((z[:, 0] - z[:, 2]).sign() * 2 * z[:, 0]).mean()
    torch.testing.assert_close(weight.grad, expected / 2)


def toy_world(z: torch.Tensor, actions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Tokens hold the position: moving by an action adds it."""
    return z + actions[..., None, :3].expand(*z.shape[:2], z.shape[2], 3)


def test_the_planner_finds_the_way_and_respects_its_bounds():
    goal = torch.tensor([0.05, -0.03, 0.02]).expand(4, 3)
    config = PlannerConfig(samples=400, iterations=12, elites=20, horizon=1, max_step=0.075)
    found = plan(toy_world, torch.zeros(4, 3), torch.zeros(7), goal, config, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.actions[0, :3], goal[0], atol=3e-3, rtol=0)
    assert found.energies[-1] < found.energies[0]
    assert (found.actions[0, 3:6] == 0).all(), "rotation is not searched"
    far = plan(toy_world, torch.zeros(4, 3), torch.zeros(7), goal * 10, config, torch.Generator().manual_seed(0))
    assert far.actions.abs()[:, :3].max() <= 0.075 + 1e-6


def test_a_longer_horizon_reaches_further():
    goal = torch.tensor([0.14, 0.0, 0.0]).expand(4, 3)
    noise = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    ends = []
    for horizon in (1, 2):
        config = PlannerConfig(samples=400, iterations=12, elites=20, horizon=horizon, max_step=0.075)
        actions = plan(toy_world, torch.zeros(4, 3), torch.zeros(7), goal, config, noise()).actions
        ends.append(rollout(toy_world, torch.zeros(4, 3), torch.zeros(7), actions[None])[0, 0, 0].item())
    assert ends[0] == pytest.approx(0.075, abs=0.01)
    assert ends[1] == pytest.approx(0.14, abs=0.01)


def test_the_same_noise_gives_the_same_plan():
    config = PlannerConfig(samples=50, iterations=3, elites=5)
    goal = torch.full((4, 3), 0.04)
    first, second = (plan(toy_world, torch.zeros(4, 3), torch.zeros(7), goal, config, torch.Generator().manual_seed(5))
                     for _ in range(2))  # fmt: skip
    assert torch.equal(first.actions, second.actions)


def test_more_elites_than_samples_is_refused():
    with pytest.raises(ValueError, match=r"elites=10 of planner.samples=5"):
        plan(toy_world, torch.zeros(1, 3), torch.zeros(7), torch.zeros(1, 3), PlannerConfig(samples=5), torch.Generator())


def test_ridge_reads_what_is_there_and_not_what_is_not():
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    y = x @ torch.randn(20, 3) + 0.1 * torch.randn(400, 3)
    assert ridge_r2(x[:300], y[:300], x[300:], y[300:]) > 0.98
    noise = torch.randn(400, 3)
    assert ridge_r2(x[:300], noise[:300], x[300:], noise[300:]) < 0.05


def test_ridge_survives_channels_that_move_only_on_held_out_rows():
    torch.manual_seed(0)
    x = torch.randn(400, 20)
    y = x[:, :3].clone()
    x = torch.cat([x, torch.zeros(400, 5)], dim=1)
    x[300:, 20:] = torch.randn(100, 5)
    assert ridge_r2(x[:300], y[:300], x[300:], y[300:]) > 0.9


def test_retrieval_counts_rows_that_find_their_own():
    gallery = torch.eye(4)
    assert retrieval_accuracy(gallery, gallery) == 1
    assert retrieval_accuracy(gallery[[1, 0, 2, 3]], gallery) == 0.5
