"""Where an attentive probe looks: the weights of its cross-attention over the tokens, laid over the frames.

A weight says where the probe reads. It does not say that what is shown there decided the answer: tokens of an encoder have
looked at each other, and so have those of a probe with more than one block.

Legend: R rows, N = t*h*w tokens of a clip, G clips (segments) that are read together, L blocks of the encoder whose outputs are
read together, D width, T frames, S pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import AttentiveConfig
from jepa_core.positions import Grid
from pipelines import frame_sheet
from pipelines.frame_sheet import Block, Row

COLUMNS = 8
HEAT = ((0.0, (20, 11, 53)), (0.35, (137, 34, 106)), (0.65, (227, 89, 51)), (0.85, (249, 164, 21)), (1.0, (252, 255, 164)))
"""Parts of BRIGHT and their colours, from dark to bright."""
BRIGHT = 4.0
"""Weight that is shown brightest, in even shares of 1 / N: colours compare between clips, and even attention has one colour."""
HEAD = (
    f"Attention of the probe over the tokens, mean over its heads: black is none, violet an even share for every token, yellow "
    f"{BRIGHT:g} times that or more. Beside it, how many tokens share the attention (exp of its entropy)."
)


def attention(state: Mapping[str, Tensor], config: AttentiveConfig, tokens: Tensor) -> Tensor:
    """Weights float32 [R, M] of a probe's first query on tokens [R, M, D], mean over heads, 1 in sum.

    `state` is that of an AttentiveClassifier, as jepa_core.readout.attentive_probe gives it.
    """
    classes = state["linear.weight"].shape[0]
    probe = AttentiveClassifier(replace(config, num_classes=classes), tokens.shape[-1])
    probe.load_state_dict(dict(state))
    with torch.no_grad():
        return torch.cat([probe.pooler.attention(piece.float())[:, :, 0].mean(1) for piece in tokens.split(16)])


def draw(
    state: Mapping[str, Tensor],
    config: AttentiveConfig,
    tokens: Tensor,
    frames: np.ndarray,
    grid: Grid,
    titles: Sequence[str],
    blocks: int = 1,
) -> bytes:
    """PNG: for each row its frames, and below them the same frames under the probe's attention.

    `tokens` [R, G*L*N, D] as the probe was given them, clip after clip, and of each block after block; `frames` uint8
    [R, G*T, S, S, 3] of their clips in the order shown, `grid` that of one clip, a title for each row. Attention to several
    blocks' outputs at one place is summed. Raises ValueError where tokens are not `blocks` (L) times those of whole clips.
    """
    clips, rest = divmod(tokens.shape[1], blocks * grid.num_tokens)
    if rest or frames.shape[1] % (clips * grid.t or 1):
        told = f"{tokens.shape[1]} tokens and {frames.shape[1]} frames a row"
        raise ValueError(f"{told} are no clips of {tuple(grid)} with {blocks} outputs each")
    weights = attention(state, config, tokens).unflatten(1, (clips, blocks, grid.num_tokens)).sum(2).flatten(1)
    grid = grid._replace(t=clips * grid.t)
    drawn = []
    for title, clip, row in zip(titles, frames, weights, strict=True):
        shown = frame_sheet.picked(len(clip), COLUMNS)
        spread = float((-(row * row.clamp_min(1e-12).log()).sum()).exp())
        label = f"attention\n{spread:.0f} of {grid.num_tokens} tokens"
        drawn.append(Block(title, [Row("the clip", clip[shown]), Row(label, overlay(clip, row, grid)[shown])]))
    return frame_sheet.draw(drawn, HEAD)


def overlay(frames: np.ndarray, weights: Tensor, grid: Grid) -> np.ndarray:
    """Frames uint8 [T, S, S, 3], grey, under the colours of weights [N]: uint8 [T, S, S, 3]."""
    told = (weights * (len(weights) / BRIGHT)).clamp_max(1).reshape(1, *grid, 1)
    heat = upsampled(told, frames.shape[:3])[..., 0]
    points, colours = np.array([point for point, _ in HEAT]), np.array([colour for _, colour in HEAT], np.float64)
    tint = np.stack([np.interp(heat, points, colours[:, channel]) for channel in range(3)], axis=-1)
    grey = frames.mean(axis=-1, keepdims=True)
    return (0.45 * grey + 0.55 * tint).round().astype(np.uint8)


def upsampled(maps: Tensor, shape: Sequence[int], smooth: bool = True) -> np.ndarray:
    """Values of tokens [1, t, h, w, C] for pixels of frames (T, S, S): float32 [T, S, S, C]; smooth in space only."""
    _, t, _, _, channels = maps.shape
    flat = maps[0].permute(0, 3, 1, 2).float()
    way = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
    large = F.interpolate(flat, size=tuple(shape[1:]), **way).permute(0, 2, 3, 1).numpy()
    return large.reshape(t, *shape[1:], channels).repeat(shape[0] // t, axis=0)
