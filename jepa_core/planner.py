"""Planning towards a goal image with the cross-entropy method in latent space (V-JEPA 2-AC, section 4).

Legend: S samples, H horizon, P patch tokens, D width. Actions are 7 numbers: xyz, rotation (kept at zero), gripper.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jepa_core.config import PlannerConfig
from jepa_core.poses import compose

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z [S, T, P, D], actions [S, T, 7], states [S, T, 7]) -> normalised tokens [S, T, P, D], slot t for step t+1."""

SEARCHED = [0, 1, 2, 6]
"""The search covers translation and gripper; rotation stays zero, as in the released planner."""


class Plan(NamedTuple):
    """Actions [H, 7] in metres, radians and gripper closedness; the energy of the best sample of each iteration."""

    actions: Tensor
    energies: list[float]


@torch.no_grad()
def rollout(predict: Predict, z: Tensor, state: Tensor, actions: Tensor) -> Tensor:
    """Tokens [S, P, D] after the actions [S, H, 7] from tokens z [P, D] and state [7]."""
    samples, horizon = actions.shape[:2]
    tokens = z.expand(samples, 1, *z.shape)
    states = state.expand(samples, 1, -1)
    for step in range(horizon):
        following = predict(tokens, actions[:, : step + 1], states)[:, -1:]
        tokens = torch.cat([tokens, following], dim=1)
        states = torch.cat([states, compose(states[:, -1:], actions[:, step : step + 1])], dim=1)
    return tokens[:, -1]


@torch.no_grad()
def plan(predict: Predict, z: Tensor, state: Tensor, goal: Tensor, config: PlannerConfig, rng: torch.Generator) -> Plan:
    """The actions whose predicted outcome is nearest to the goal's tokens in mean absolute difference.

    z, goal: normalised tokens [P, D]; state: [7]. Samples are drawn around a Gaussian that moves to its elites.
    """
    if config.elites > config.samples:
        raise ValueError(f"planner.elites={config.elites} of planner.samples={config.samples}: elites cannot exceed samples")
    bound = torch.tensor([config.max_step] * 3 + [config.max_gripper], device=z.device)
    mean = torch.zeros(config.horizon, len(SEARCHED), device=z.device)
    std = bound.expand_as(mean).clone()
    energies = []
    for _ in range(config.iterations):
        noise = torch.randn(config.samples, *mean.shape, generator=rng, device=z.device)
        drawn = (mean + std * noise).clamp(-bound, bound)
        actions = drawn.new_zeros(*drawn.shape[:2], 7)
        actions[..., SEARCHED] = drawn
        energy = (rollout(predict, z, state, actions) - goal).abs().mean(dim=(1, 2))
        best, index = energy.topk(config.elites, largest=False)
        elites = drawn[index]
        mean = (1 - config.momentum_mean) * elites.mean(0) + config.momentum_mean * mean
        std = (1 - config.momentum_std) * elites.std(0) + config.momentum_std * std
        energies.append(best[0].item())
    chosen = mean.new_zeros(config.horizon, 7)
    chosen[:, SEARCHED] = mean
    return Plan(chosen, energies)
