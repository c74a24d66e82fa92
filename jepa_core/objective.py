"""Losses of training; health.py has the numbers beside them.

Legend: B batch, N tokens, K context tokens, M target tokens, D width, L levels, T steps, P patch tokens of a step.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.positions import Grid, token_positions


def normalize_targets(features: Tensor, levels: int = 1) -> Tensor:
    """LayerNorm without weights, in float32, over each level of [..., L*D]: what the predictor has to hit (vjepa2)."""
    features = features.float().unflatten(-1, (levels, -1))
    return F.layer_norm(features, features.shape[-1:]).flatten(-2)


def latent_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of predictions and targets [..., D], in float32, over every axis."""
    return (prediction.float() - target).abs().mean()


def latent_distance(prediction: Tensor, target: Tensor, exponent: float = 1.0) -> Tensor:
    """Mean of |difference| ** exponent / exponent over every axis of [..., D], float32: 1 for L1, 2 for L2 (vjepa2: loss_exp)."""
    difference = (prediction.float() - target).abs()
    return difference.mean() if exponent == 1.0 else difference.pow(exponent).mean() / exponent


def latent_loss(
    prediction: Tensor,
    target: Tensor,
    kind: Literal["l1", "smooth_l1"],
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean difference of predictions and targets [B, M, D], in float32, over valid tokens.

    `valid` bool [B, M] leaves padding out. `weight` [B, M] multiplies a token's part; the mean still divides by the number of
    tokens, as the reference's does.
    """
    prediction = prediction.float()
    if valid is None and weight is None:
        return latent_l1(prediction, target) if kind == "l1" else F.smooth_l1_loss(prediction, target)
    each = (prediction - target).abs() if kind == "l1" else F.smooth_l1_loss(prediction, target, reduction="none")
    each = each.mean(dim=-1)
    if weight is not None:
        each = each * weight
    return each.mean() if valid is None else (each * valid).sum() / valid.sum()


def context_distance_weight(context_ids: Tensor, target_ids: Tensor, grid: Grid, target_valid: Tensor | None = None) -> Tensor:
    """V-JEPA 2.1: 1 / sqrt(distance to the nearest target token) per context token, float32 [B, K].

    Ids int64 [B, K] and [B, M]; the distance is Euclidean over (t, h, w), in patches of the 16x16 grid of 256 px.
    """
    positions = torch.stack(token_positions(grid), dim=-1).to(context_ids.device)
    distance = torch.cdist(positions[context_ids], positions[target_ids])
    if target_valid is not None:
        distance = distance.masked_fill(~target_valid[:, None, :], float("inf"))
    return (distance.amin(dim=-1) / max(1, grid.h // 16)).rsqrt()


RolloutVariant = Literal["fixed", "released"]


def action_losses(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    actions: Tensor,
    states: Tensor,
    rollout_steps: int,
    variant: RolloutVariant = "fixed",
    exponent: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(teacher forcing, rollout) losses of V-JEPA 2-AC, section 3.1: `latent_distance` of `action_predictions` to the tokens.

    Tokens z [B, T, P, D], actions [B, T-1, A], states [B, T, S] -> two scalars.
    """
    forced, rolled = action_predictions(predict, z, actions, states, rollout_steps, variant)
    return latent_distance(forced, z[:, 1:], exponent), latent_distance(rolled, z[:, 1 : rollout_steps + 1], exponent)


def action_predictions(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    actions: Tensor,
    states: Tensor,
    rollout_steps: int,
    variant: RolloutVariant = "fixed",
) -> tuple[Tensor, Tensor]:
    """Tokens under teacher forcing [B, T-1, P, D] and in a rollout [B, rollout_steps, P, D], both from step 1 on.

    z [B, T, P, D] target tokens, actions [B, T-1, A], states [B, T, S]. `predict(z, a, s)` returns tokens like the targets,
    slot t for step t+1. The rollout feeds predictions back for `rollout_steps` steps, with true states and with gradients
    through every step. `fixed` starts it from the prediction of step 1; `released` from that of step 2 in its place, the
    mistake under which the published weights were trained (vjepa2 PR 25), and needs three frames.
    """
    forced = predict(z[:, :-1], actions, states[:, :-1])
    start = 1 if variant == "released" else 0
    if forced.shape[1] <= start:
        raise ValueError(f"the {variant} rollout needs {start + 2} frames, got {z.shape[1]}")
    rolled = torch.cat([z[:, :1], forced[:, start : start + 1]], dim=1)
    for step in range(1, rollout_steps):
        following = predict(rolled, actions[:, : step + 1], states[:, : step + 1])[:, -1:]
        rolled = torch.cat([rolled, following], dim=1)
    return forced, rolled[:, 1:]
