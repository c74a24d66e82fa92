"""Colours of features: their three main directions over many clips, as red, green and blue.

One basis for all clips, so that a colour means the same everywhere; its order and signs are fixed, so that the same features have
the same colours again. As DINOv2 (arXiv 2304.07193) and V-JEPA 2.1 show features; without their foreground threshold.

Legend: R clips, N tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS = 3
TAILS = (0.01, 0.99)
"""Shares of all tokens that lie below black and above white of each channel."""


class ColourBasis(NamedTuple):
    """What turns features into colours."""

    mean: Tensor
    """float64 [D]."""
    directions: Tensor
    """float64 [D, 3], orthonormal."""
    low: Tensor
    """float64 [3]: shown as 0."""
    high: Tensor
    """float64 [3]: shown as 1."""
    share: tuple[float, ...]
    """Of the features' variance, by direction."""


def fit_colours(tokens: Tensor) -> ColourBasis:
    """The basis of tokens [R, N, D] of all clips that are to be shown.

    Directions are ordered by variance, and point to where their largest component is positive. Raises ValueError for fewer
    than 4 tokens, or fewer than 3 channels.
    """
    x = tokens.double().flatten(0, -2)
    if len(x) <= CHANNELS or x.shape[1] < CHANNELS:
        raise ValueError(f"{len(x)} tokens of {x.shape[1]} channels have no {CHANNELS} main directions")
    mean = x.mean(0)
    x = x - mean
    variances, vectors = torch.linalg.eigh(x.T @ x / len(x))
    directions = vectors.flip(1)[:, :CHANNELS]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    low, high = torch.quantile(_sample(x @ directions), torch.tensor(TAILS, dtype=torch.float64), dim=0)
    share = variances.flip(0)[:CHANNELS] / variances.sum().clamp_min(1e-30)
    return ColourBasis(mean, directions, low, high, tuple(share.clamp_min(0).tolist()))


def colours(basis: ColourBasis, tokens: Tensor) -> Tensor:
    """Tokens [..., D] -> red, green and blue in [0, 1], float32 [..., 3]."""
    shown = (tokens.double() - basis.mean) @ basis.directions
    return ((shown - basis.low) / (basis.high - basis.low).clamp_min(1e-12)).clamp(0, 1).float()


def _sample(x: Tensor, most: int = 1_000_000) -> Tensor:
    """Rows evenly spread: quantiles of more have no other answer."""
    return x[:: -(-len(x) // most)]
