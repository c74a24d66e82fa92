"""Losses, schedules, EMA, health numbers, planner and probes, each against a value worked out by other means."""

import copy

import pytest
import torch
from torch import nn

from jepa_core.config import (
    EncoderConfig,
    LossConfig,
    MaskConfig,
    OptimConfig,
    PlannerConfig,
    PredictorConfig,
    PretrainModelConfig,
)
from jepa_core.health import feature_std, mean_predictor_l1, rank_me
from jepa_core.masks import draw_masks
from jepa_core.objective import (
    action_losses,
    context_distance_weight,
    latent_l1,
    latent_loss,
    normalize_targets,
)
from jepa_core.optimization import autocast, ema_update, make_optimizer, set_rates
from jepa_core.planner import plan, rollout
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining
from jepa_core.probe import retrieval_accuracy, ridge_r2
from jepa_core.regularisation import EPSILON, covariance_penalty, standardize_targets, variance_hinge
from jepa_core.schedules import context_weight, ema_momentum, learning_rate, weight_decay


def test_targets_have_mean_zero_and_variance_one_per_token():
    target = normalize_targets(torch.randn(2, 5, 64) * 7 + 3)
    assert target.mean(-1).abs().max() < 1e-5
    assert (target.var(-1, unbiased=False) - 1).abs().max() < 1e-3


def test_the_mean_predictor_is_what_its_name_says():
    target = torch.tensor([[[0.0], [2.0]], [[4.0], [2.0]]])
    assert mean_predictor_l1(target) == latent_l1(torch.full_like(target, 2.0), target) == 1.0


def test_padding_and_weights_in_the_loss():
    prediction, target = torch.tensor([[[3.0], [1.0], [9.0]]]), torch.zeros(1, 3, 1)
    assert latent_loss(prediction, target, "l1") == pytest.approx(13 / 3)
    assert latent_loss(prediction, target, "l1", valid=torch.tensor([[True, True, False]])) == 2
    assert latent_loss(prediction, target, "l1", weight=torch.tensor([[1.0, 2.0, 0.0]])) == pytest.approx(5 / 3)
    assert latent_loss(prediction, target, "smooth_l1") == pytest.approx((2.5 + 0.5 + 8.5) / 3)


def test_levels_are_normalised_one_by_one():
    features = torch.cat([torch.randn(2, 5, 8), 100 + 30 * torch.randn(2, 5, 8)], dim=-1)
    expected = torch.cat([normalize_targets(piece) for piece in features.split(8, dim=-1)], dim=-1)
    torch.testing.assert_close(normalize_targets(features, 2), expected)


def test_context_counts_less_the_farther_it_is():
    weight = context_distance_weight(torch.tensor([[0, 3, 15]]), torch.tensor([[4, 5]]), Grid(1, 4, 4))
    torch.testing.assert_close(weight, torch.tensor([[1.0, 5**-0.25, 8**-0.25]]))


def rates(total: int, config: OptimConfig) -> list[float]:
    """Learning rates of all steps; as in the reference, the first update has the rate of step 1."""
    return [learning_rate(step, total, config) for step in range(total)]


def test_the_schedule_warms_up_stays_and_decays():
    lr = rates(100, OptimConfig(lr=1.0, start_lr=0.1, final_lr=0.0, warmup_steps=10, decay_steps=20))
    assert lr[4] == pytest.approx(0.55)
    assert lr[9:80] == [1.0] * 71
    assert lr[89] == pytest.approx(0.5)
    assert lr[99] == pytest.approx(0.0)
    assert rates(100, OptimConfig(lr=1.0, warmup_steps=0))[99] == 1.0


def test_a_cooldown_decays_from_its_first_step_and_a_stretched_one_stops_short():
    """The published cooldown: 12,000 steps from 5.25e-4 to 1e-6; with ipe_scale 1.25 it ends at 1.058e-4 (measured there)."""
    config = OptimConfig(lr=5.25e-4, final_lr=1e-6, warmup_steps=0, decay_steps=12_000)
    lr = rates(12_000, config)
    assert lr[0] == pytest.approx(5.25e-4, rel=1e-3)
    assert lr[-1] == pytest.approx(1e-6)
    stretched = OptimConfig(lr=5.25e-4, final_lr=1e-6, warmup_steps=0, decay_steps=12_000, stretch=1.25)
    assert rates(12_000, stretched)[-1] == pytest.approx(1.058e-4, rel=1e-3)


def test_the_published_vit_l_file_ends_inside_its_warmup():
    config = OptimConfig(lr=5.25e-4, start_lr=1e-4, warmup_steps=12_000, stretch=1.25)
    assert rates(3000, config)[-1] == pytest.approx(2.06e-4, rel=2e-3)


def test_v_jepa_1_falls_along_a_half_cosine_while_decay_and_momentum_rise():
    """vitl16 of V-JEPA 1: 300 epochs of 300 steps, warmup 40 epochs, schedules stretched by 1.25."""
    config = OptimConfig(lr=6.25e-4, start_lr=2e-4, final_lr=1e-6, warmup_steps=12_000, schedule="cosine", stretch=1.25,
                         weight_decay=0.04, final_weight_decay=0.4, ema=0.998, final_ema=1.0)  # fmt: skip
    total, length = 90_000, 112_500
    assert learning_rate(11_999, total, config) == pytest.approx(6.25e-4)
    middle = 12_000 + (length - 12_000) // 2
    assert learning_rate(middle - 1, total, config) == pytest.approx((6.25e-4 + 1e-6) / 2)
    assert weight_decay(length // 2 - 1, total, config) == pytest.approx(0.22)
    assert weight_decay(0, total, OptimConfig()) == 0.04
    assert ema_momentum(0, total, config) == 0.998
    assert ema_momentum(45_000, total, config) == pytest.approx(0.9988)
    assert ema_momentum(10**9, total, config) == 1.0


def test_the_context_loss_grows_between_two_steps():
    config = LossConfig(context_weight=0.5, context_ramp=(100, 200))
    assert [context_weight(step, config) for step in (0, 100, 150, 200, 999)] == [0, 0, 0.25, 0.5, 0.5]


def test_rates_reach_the_right_groups():
    optimizer = make_optimizer([nn.Linear(4, 4)], OptimConfig())
    set_rates(optimizer, 0.5, 0.25)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.5, 0.0)]


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="float16 on a CPU"):
        autocast(torch.device("cpu"), torch.float16)


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


def test_standardised_targets_have_mean_zero_and_variance_one_per_channel_whatever_the_tokens_share():
    torch.manual_seed(0)
    features = torch.randn(8, 30, 16) * torch.linspace(0.5, 4, 16) + torch.linspace(-9, 9, 16)
    target = standardize_targets(features)
    assert target.mean(dim=(0, 1)).abs().max() < 1e-5
    assert (target.var(dim=(0, 1), correction=0) - 1).abs().max() < 1e-3
    assert mean_predictor_l1(target) == pytest.approx((2 / torch.pi) ** 0.5, abs=0.01), "of a normal distribution: E|x|"
    assert mean_predictor_l1(normalize_targets(features)) < 0.5, "LayerNorm leaves the constant in"
    assert standardize_targets(torch.ones(2, 3, 4)).abs().max() == 0, "a collapsed encoder gives zeros, not NaN"


def test_the_variance_term_is_one_for_constant_features_and_zero_for_spread_ones():
    assert variance_hinge(torch.full((64, 8), 3.0)) == pytest.approx(1 - EPSILON**0.5)
    half = torch.tensor([[0.5], [-0.5]]).repeat(500, 1)  # variance 0.25 * 1000 / 999
    assert variance_hinge(half) == pytest.approx(0.5, abs=1e-3)
    assert variance_hinge(half * 4) == 0
    assert variance_hinge(torch.cat([half, half * 4], dim=1)) == pytest.approx(0.25, abs=1e-3)


def test_the_covariance_term_is_zero_for_decorrelated_features_and_known_for_equal_ones():
    hadamard = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert covariance_penalty(hadamard) == pytest.approx(0, abs=1e-6)
    equal = torch.tensor([[1.0], [-1.0]]).repeat(50, 1).expand(-1, 3)
    assert covariance_penalty(equal) == pytest.approx(2 * (100 / 99) ** 2), "6 pairs of covariance 100/99, divided by 3"
    with torch.autocast("cpu", torch.bfloat16):
        assert covariance_penalty(equal) == pytest.approx(2 * (100 / 99) ** 2)


@pytest.mark.parametrize("term", [variance_hinge, covariance_penalty])
def test_descending_a_regularisation_term_lowers_it(term):
    torch.manual_seed(0)
    features = (0.3 * torch.randn(200, 1) + 0.1 * torch.randn(200, 6)).requires_grad_()
    before = term(features)
    before.backward()
    assert term(features - 10 * features.grad) < before


def toy_pretraining(**loss) -> tuple[Pretraining, tuple]:
    """A small model with padded rows (policy exact), and the arguments of its forward."""
    torch.manual_seed(0)
    config = PretrainModelConfig(
        encoder=EncoderConfig(dim=24, depth=2, heads=2, patch_size=4),
        predictor=PredictorConfig(dim=24, depth=1, heads=2),
        masks=[MaskConfig(2, (0.3, 0.3)), MaskConfig(1, (0.1, 0.1), max_temporal_keep=0.5)],
        mask_policy="exact",
        loss=LossConfig(**loss),
    )
    grid = Grid(4, 4, 4)
    clip = torch.randint(0, 256, (6, grid.num_tokens, 96), dtype=torch.uint8)
    drawn = [draw_masks(mask, index, grid, 0, 0, range(6), "exact") for index, mask in enumerate(config.masks)]
    masks = [MaskIds(*(None if ids is None else torch.from_numpy(ids) for ids in mask)) for mask in drawn]
    return Pretraining(config), (clip, grid, masks)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"target_norm": "standardised"},
        {"target_norm": "standardised", "variance_weight": 0.5, "covariance_weight": 0.1},
        {"prediction_weight": 0.0, "variance_weight": 0.5},
        {"prediction_weight": 0.0, "covariance_weight": 0.1},
    ],
    ids=str,
)
def test_every_trained_parameter_has_a_gradient_and_the_encoder_one_that_is_not_zero(loss):
    model, arguments = toy_pretraining(**loss)
    value, numbers = model(*arguments)
    value.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values()), "DDP waits for each of them"
    norm = {part: sum(p.grad.norm() for name, p in trained.items() if name.startswith(part)) for part in ("encoder", "predictor")}
    assert norm["encoder"] > 0
    assert (norm["predictor"] > 0) == (loss.get("prediction_weight", 1) > 0), "the control teaches the predictor nothing"
    assert ("regularisation" in numbers) == any(f"{term}_weight" in loss for term in ("variance", "covariance"))


def test_the_loss_is_the_sum_of_its_weighted_terms():
    weights = {"variance_weight": 0.5, "covariance_weight": 0.1}
    (model, arguments), (control, _), (bare, _) = (
        toy_pretraining(**weights),
        toy_pretraining(prediction_weight=0.0, **weights),
        toy_pretraining(),
    )
    both, numbers = model(*arguments)
    alone, _ = control(*arguments)
    prediction, _ = bare(*arguments)
    assert both.item() == pytest.approx((prediction + alone).item())
    assert numbers["regularisation"] == pytest.approx(alone.item())
    clip, grid, masks = arguments
    expected = []
    for mask in masks:
        tokens = model.encoder(clip, grid, mask.context, mask.context_valid)
        rows = torch.cat([row[real] for row, real in zip(tokens, mask.context_valid, strict=True)])
        expected.append(0.5 * variance_hinge(rows) + 0.1 * covariance_penalty(rows))
    assert alone.item() == pytest.approx(torch.stack(expected).mean().item()), "padding does not count"


@pytest.mark.parametrize(
    ("loss", "words"),
    [({"prediction_weight": 0.0}, "nothing to train"), ({"variance_weight": -1.0}, "variance_weight=-1.0")],
)
def test_weights_that_train_nothing_are_refused(loss, words):
    with pytest.raises(ValueError, match=words):
        toy_pretraining(**loss)
