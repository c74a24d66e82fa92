"""Learning rate, weight decay, EMA momentum and loss weights as pure functions of the step: nothing to save, nothing to restore.

`step` counts from 0 and is the number of updates done before this one; `total_steps` is the length of the run.

On the reference's `ipe_scale: 1.25` (our `stretch`): it makes every schedule 25 % longer than the run, so none reaches its end.
The published V-JEPA 2 cooldown is meant to fall to 1e-6 and, with it, stops at 1.06e-4; the presets in configs/ use 1.0. Likewise
the published ViT-L and ViT-H files say 10 epochs of 300 steps with a warmup of 12,000: such a run ends inside its warmup, at
2.06e-4. The presets have the paper's 12,000 warmup + 228,000 constant steps, and a cooldown of 12,000 (arXiv 2506.09985).
"""

import math

from jepa_core.config import LossConfig, OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Linear warmup, then constant and at last a linear decay, or a half cosine (reference schedulers.py).

    The reference advances its schedules before each update, so the first update already has the rate of step 1: as here.
    """
    step += 1
    length = int(config.stretch * total_steps)
    if step < config.warmup_steps:
        return config.start_lr + (config.lr - config.start_lr) * step / config.warmup_steps
    if config.schedule == "cosine":
        return _half_cosine(config.lr, config.final_lr, (step - config.warmup_steps) / max(1, length - config.warmup_steps))
    decay_start = length - int(config.stretch * config.decay_steps)
    if step > decay_start:
        return config.lr + (config.final_lr - config.lr) * (step - decay_start) / (length - decay_start)
    return config.lr


def weight_decay(step: int, total_steps: int, config: OptimConfig) -> float:
    """Constant, or a half cosine from weight_decay to final_weight_decay over the stretched run."""
    if config.final_weight_decay is None:
        return config.weight_decay
    return _half_cosine(config.weight_decay, config.final_weight_decay, (step + 1) / int(config.stretch * total_steps))


def ema_momentum(step: int, total_steps: int, config: OptimConfig) -> float:
    """Constant, or linear from ema to final_ema over the stretched run."""
    if config.final_ema is None:
        return config.ema
    return config.ema + (config.final_ema - config.ema) * min(1.0, step / (config.stretch * total_steps))


def context_weight(step: int, config: LossConfig) -> float:
    """Weight of the loss on visible tokens (V-JEPA 2.1): 0, then growing between the two steps of the ramp, then constant."""
    begin, end = config.context_ramp
    return config.context_weight * min(1.0, max(0.0, (step - begin) / max(1, end - begin)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
