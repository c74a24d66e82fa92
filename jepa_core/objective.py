"""Losses, the target encoder's update, schedules, optimizer groups and health numbers of training.

Legend: B batch, N tokens, M target tokens, D width, T steps, P patch tokens of a step.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import OptimConfig


def normalize_targets(features: Tensor) -> Tensor:
    """LayerNorm without weights over the last axis, in float32: what the predictor has to hit (reference train.py)."""
    return F.layer_norm(features.float(), features.shape[-1:])


def latent_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference, in float32, over every axis."""
    return (prediction.float() - target).abs().mean()


def mean_predictor_l1(target: Tensor) -> Tensor:
    """L1 of the trivial predictor that answers the batch's mean token [D] everywhere: a loss below it shows skill."""
    return (target - target.mean(dim=(0, 1), keepdim=True)).abs().mean()


def action_losses(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, actions: Tensor, states: Tensor, rollout_steps: int
) -> tuple[Tensor, Tensor]:
    """(teacher forcing, rollout) losses of V-JEPA 2-AC, section 3.1.

    z [B, T, P, D] normalised target tokens, actions [B, T-1, A], states [B, T, S]. `predict(z, a, s)` returns normalised tokens,
    slot t for step t+1. The rollout feeds predictions back for `rollout_steps` steps, with true states and with gradients
    through every step; it starts from step 1's own prediction (the fixed variant, vjepa2 PR 25).
    """
    forced = predict(z[:, :-1], actions, states[:, :-1])
    rolled = torch.cat([z[:, :1], forced[:, :1]], dim=1)
    for step in range(1, rollout_steps):
        following = predict(rolled, actions[:, : step + 1], states[:, : step + 1])[:, -1:]
        rolled = torch.cat([rolled, following], dim=1)
    return latent_l1(forced, z[:, 1:]), latent_l1(rolled[:, 1:], z[:, 1 : rollout_steps + 1])


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Target <- momentum * target + (1 - momentum) * online, all parameters in one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Warmup (linear), constant, decay (linear to final_lr over the last `decay_steps`): a pure function of the step."""
    if step < config.warmup_steps:
        return config.start_lr + (config.lr - config.start_lr) * step / config.warmup_steps
    decay_start = total_steps - config.decay_steps
    if step > decay_start:
        return config.lr + (config.final_lr - config.lr) * (step - decay_start) / config.decay_steps
    return config.lr


def make_optimizer(modules: Iterable[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms (one axis) are left alone (reference app/vjepa/utils.py)."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean over channels of the standard deviation over all tokens of [..., D]; near zero means full collapse."""
    return features.float().flatten(0, -2).std(dim=0).mean().item()


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Effective rank of centred features [R, D]: exp of the entropy of the singular values (RankMe, arXiv 2210.02885).

    Falls towards 1 when the features keep few directions, which the standard deviation does not see.
    """
    features = features.float()
    singular = torch.linalg.svdvals(features - features.mean(dim=0))
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(share * (share + 1e-12).log()).sum()).item()
