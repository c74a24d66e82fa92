"""Objective options beyond the papers' losses: targets standardised over the batch, and VICReg's variance and covariance terms.

All are off in the faithful presets. They make hundreds of steps on a CPU informative, where the papers' objective needs 10^5.

Legend: B batch, N tokens, R rows (tokens of a batch), D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

EPSILON = 1e-4
"""Added to a variance before its root, as in VICReg's reference."""


def standardize_targets(features: Tensor) -> Tensor:
    """Each of the D channels brought to mean 0 and variance 1 over all tokens of the batch [B, N, D], in float32.

    LayerNorm takes mean and scale of a token out, which leaves what all tokens share: at the start a constant vector is most of
    the target, and predicting it most of the loss. Here the constant is gone, and every channel counts the same.
    """
    features = features.float()
    variance, mean = torch.var_mean(features, dim=(0, 1), correction=0)
    return (features - mean) * (variance + EPSILON).rsqrt()


def variance_hinge(features: Tensor) -> Tensor:
    """VICReg's variance term (arXiv 2105.04906, eq. 1), a scalar: how far the channels of [R, D] stay below a deviation of 1."""
    variance = features.float().var(dim=0, correction=1)
    return F.relu(1 - (variance + EPSILON).sqrt()).mean()


def covariance_penalty(features: Tensor) -> Tensor:
    """VICReg's covariance term (arXiv 2105.04906, eq. 3 and 4), a scalar: squared covariances of different channels of [R, D],
    summed and divided by D.
    """
    with torch.autocast(features.device.type, enabled=False):  # bf16's 8 bits would be a tenth of small covariances
        centred = features.float() - features.float().mean(dim=0)
        covariance = centred.T @ centred / (len(centred) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / covariance.shape[0]
