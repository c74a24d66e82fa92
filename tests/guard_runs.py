"""Tiny pretraining runs on generated clips, healthy and broken on purpose, with the numbers that training logs: no Ray, no video.

Legend: B batch, N tokens, P values of a tubelet, D width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jepa_core import health
from jepa_core.config import EncoderConfig, MaskConfig, OptimConfig, PredictorConfig, PretrainModelConfig
from jepa_core.masks import draw_masks
from jepa_core.optimization import ema_update, make_optimizer, set_rates
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining

SIDE, PATCH, FRAMES, BATCH, DIM = 16, 4, 8, 16, 64
GRID = Grid(FRAMES // 2, SIDE // PATCH, SIDE // PATCH)
LOG_EVERY = 10
HARM_AT = 40
LR, EMA = 5e-4, 0.998
BACKGROUNDS = 8

Harm = Callable[[Pretraining, Tensor], tuple[Tensor | None, dict[str, float]]]
"""(model, clips) -> a term that is added to the loss, and other values for lr and ema."""


def moving_clips(rng: np.random.Generator, batch: int) -> Tensor:
    """Smooth random textures that move on a torus: uint8 tubelets [B, N, P]."""
    noise = np.fft.fft2(rng.normal(size=(batch, SIDE, SIDE, 3)), axes=(1, 2))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))[None, :, :, None]
    texture = np.fft.ifft2(noise / (0.08 + frequency) ** 1.5, axes=(1, 2)).real
    texture = (texture - texture.mean((1, 2, 3), keepdims=True)) / texture.std((1, 2, 3), keepdims=True)
    speed = rng.integers(-2, 3, (batch, 2))
    frames = [[np.roll(texture[b], tuple(speed[b] * t), (0, 1)) for t in range(FRAMES)] for b in range(batch)]
    pixels = np.clip(128 + 50 * np.array(frames), 0, 255).astype(np.uint8)
    cut = pixels.reshape(batch, GRID.t, 2, GRID.h, PATCH, GRID.w, PATCH, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return torch.from_numpy(np.ascontiguousarray(cut.reshape(batch, GRID.num_tokens, -1)))


def clips_before_backgrounds(rng: np.random.Generator, batch: int) -> Tensor:
    """The same, but 70 % of the tokens show one of BACKGROUNDS pictures, whose number is the first value of the clip."""
    clips, which = moving_clips(rng, batch), rng.integers(0, BACKGROUNDS, batch)
    covered = torch.from_numpy(rng.random((batch, GRID.num_tokens)) < 0.7)
    clips[covered] = moving_clips(np.random.default_rng(5), BACKGROUNDS)[which][covered]
    clips[:, 0, 0] = torch.from_numpy(which.astype(np.uint8))
    return clips


def lines(
    seed: int, steps: int, harm: Harm | None = None, *, backgrounds: bool = False, position: str = "rope"
) -> Iterator[dict]:
    """Train, and give what the guard is shown of every tenth step. The harm is done from step HARM_AT on."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    draw = clips_before_backgrounds if backgrounds else moving_clips
    encoder = EncoderConfig(DIM, depth=2, heads=2, patch_size=PATCH, position=position, native_grid=tuple(GRID))
    config = PretrainModelConfig(encoder, PredictorConfig(dim=48, depth=1, heads=2), [MaskConfig(1, (0.5, 0.5))])
    model, recent = Pretraining(config), health.RecentClips()
    optimizer = make_optimizer([model], OptimConfig())
    for step in range(steps):
        clips, done = draw(rng, BATCH), step + 1
        drawn = draw_masks(config.masks[0], 0, GRID, seed, step, range(step * BATCH, done * BATCH))
        masks = [MaskIds(*(None if ids is None else torch.from_numpy(ids) for ids in drawn))]
        loss, numbers = model(clips, GRID, masks, measure=done % LOG_EVERY == 0)
        term, rates = harm(model, clips) if harm and step >= HARM_AT else (None, {})
        (loss if term is None else loss + term).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        set_rates(optimizer, rates.get("lr", LR * min(1.0, done / 20)), 0.04)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema_update(model.target_encoder, model.encoder, rates.get("ema", EMA))
        recent.add(numbers.pop(health.CLIPS))
        if done % LOG_EVERY == 0:
            yield _line(done, loss, numbers, recent)


def _line(step: int, loss: Tensor, numbers: dict[str, Any], recent: health.RecentClips) -> dict[str, Any]:
    tokens, clips = health.effective_ranks(numbers.pop(health.FEATURES)), recent.ranks()
    scalars = {key: float(value) for key, value in numbers.items() if key != health.SAMPLE_LOSS}
    ranks = {"rank_me": tokens[0], "participation": tokens[1]}
    return {"step": step, "loss": loss.item(), **scalars, **ranks} | ({"rank_me_clip": clips[0]} if clips else {})


def _tokens(model: Pretraining, clips: Tensor) -> Tensor:
    return model.encoder(clips, GRID)


def _codes(count: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(1))


def one_vector(model: Pretraining, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The encoder is paid for telling nothing apart."""
    tokens = _tokens(model, clips)
    return 3 * (tokens - tokens.mean((0, 1), keepdim=True)).square().mean(), {"ema": 0.9}


def one_direction(model: Pretraining, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The encoder is paid for variance along one direction, and for none elsewhere."""
    tokens, direction = _tokens(model, clips), F.normalize(_codes(1)[0], dim=0)
    centred = tokens - tokens.mean((0, 1), keepdim=True)
    along = centred @ direction
    across = (centred - along[..., None] * direction).square().mean()
    return 3 * (F.relu(6 - along.std()) / 6 + across), {"ema": 0.9}


def fast_and_unsteady(model: Pretraining, clips: Tensor) -> tuple[None, dict[str, float]]:
    """No term of the loss: twenty times the learning rate, and a target encoder that follows at once."""
    return None, {"lr": 20 * LR, "ema": 0.9}


def background_only(model: Pretraining, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The encoder is paid for saying which background a clip has."""
    return (_tokens(model, clips) - _codes(BACKGROUNDS)[clips[:, 0, 0].long()][:, None]).square().mean(), {"ema": 0.9}


def position_only(model: Pretraining, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The encoder is paid for saying where a token is."""
    return 3 * (_tokens(model, clips) - _codes(GRID.num_tokens)).square().mean(), {"ema": 0.9, "lr": 3e-3}
