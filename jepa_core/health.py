"""What tells learning from collapse: a loss beside those of trivial predictors, and how many directions the features use.

Legend: B batch, N tokens, D width, R rows, M target tokens, G targets of a sample.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

FEATURES, CLIPS, SAMPLE_LOSS = "features", "clips", "sample_loss"
"""Keys of tensors among a step's numbers: a sample of the target encoder's tokens [R, D], its mean token of every clip [B, D],
and the L1 of every sample [B]."""
HEALTH_TOKENS = 512
"""Tokens that rank and standard deviation are taken over."""
CLIP_ROWS = 128
"""Clips that ranks at clip level are taken over. A rank grows with the number of rows, so it is always the same one."""


@torch.no_grad()
def feature_std(features: Tensor) -> float:
    """Mean over channels of the standard deviation over all tokens of [..., D]; near zero means full collapse."""
    return features.float().flatten(0, -2).std(dim=0).mean().item()


@torch.no_grad()
def effective_ranks(features: Tensor) -> tuple[float, float]:
    """(RankMe, participation ratio) of centred features [R, D]: how many directions they use, between 1 and min(R - 1, D).

    RankMe (arXiv 2210.02885) is exp of the entropy of the singular values, the participation ratio (sum v)^2 / sum v^2 of the
    variances v along them. The first counts weak directions too, the second those that hold most of the variance.
    """
    features = features.float()
    singular = torch.linalg.svdvals(features - features.mean(dim=0))
    share = singular / singular.sum().clamp_min(1e-12)
    entropy = -(share * (share + 1e-12).log()).sum()
    variance = share.square()
    return torch.exp(entropy).item(), (variance.sum().square() / variance.square().sum().clamp_min(1e-24)).item()


def rank_me(features: Tensor) -> float:
    """RankMe of features [R, D]. Falls towards 1 when they keep few directions, which the standard deviation does not see."""
    return effective_ranks(features)[0]


@torch.no_grad()
def mean_cosine(features: Tensor) -> Tensor:
    """Mean cosine between different rows of [R, D], a scalar: 1 when all point one way, which full collapse ends in."""
    rows = F.normalize(features.float(), dim=-1)
    return (rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))


def mean_predictor_l1(target: Tensor) -> Tensor:
    """L1 of the trivial predictor that answers the batch's mean token [D] everywhere: a loss below it shows skill."""
    return (target - target.mean(dim=(0, 1), keepdim=True)).abs().mean()


@torch.no_grad()
def position_mean_l1(target: Tensor) -> Tensor | None:
    """L1 at every token of the predictor that answers the mean target at its position: [B, N, D] -> [B, N]; None for one clip.

    A loss that is not below it knows positions and nothing about the clip. The mean is that of the batch, not a running one,
    which would lag behind the moving target encoder and flatter the loss. A clip's own part in the mean makes differences
    smaller by sqrt(1 - 1 / B) (exact for their standard deviation, for the L1 where they are normal); that is undone.
    """
    batch = len(target)
    if batch < 2:
        return None
    return (target - target.mean(dim=0)).abs().mean(dim=-1) * (batch / (batch - 1)) ** 0.5


@torch.no_grad()
def sample_l1(prediction: Tensor, hidden: Tensor, groups: int, valid: Tensor | None = None) -> Tensor:
    """L1 of each sample: predictions and hidden targets [G*B, M, D], `valid` bool [G*B, M] -> [B]."""
    error = (prediction.float() - hidden).abs().mean(dim=-1)
    rows = error.mean(dim=-1) if valid is None else (error * valid).sum(dim=-1) / valid.sum(dim=-1)
    return rows.view(groups, -1).mean(dim=0)


class RecentClips:
    """Mean tokens of the last CLIP_ROWS clips: a microbatch may have four, too few to take a rank over."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, clips: Tensor) -> None:
        """Clips [B, D]; older ones than needed are forgotten."""
        self._rows.append(clips[-CLIP_ROWS:])
        self._count += len(self._rows[-1])
        while self._count - len(self._rows[0]) >= CLIP_ROWS:
            self._count -= len(self._rows.pop(0))

    def ranks(self) -> tuple[float, float] | None:
        """(RankMe, participation ratio) over the last CLIP_ROWS; None before there are so many."""
        return effective_ranks(torch.cat(self._rows)[-CLIP_ROWS:]) if self._count >= CLIP_ROWS else None
