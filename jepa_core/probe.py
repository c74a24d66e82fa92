"""Frozen probes: what features know, measured without training the encoder.

Legend: R rows (clips), D feature width, Y label width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def standardise(train_x: Tensor, *others: Tensor) -> list[Tensor]:
    """Features [R, ..., D] of training rows and of others, brought to mean 0 and deviation 1 of each channel in training."""
    flat = train_x.reshape(-1, train_x.shape[-1])
    mean, std = flat.mean(0), flat.std(0)
    std = (std + 0.01 * std.mean()).clamp_min(1e-12)  # a channel that hardly moves in training must not explode on held-out rows
    return [(x - mean) / std for x in (train_x, *others)]


def ridge_r2(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """R^2 on held-out rows of a ridge regression from features [R, D] to labels [R, Y], averaged over the Y labels.

    1 is perfect, 0 is the mean label, below 0 is worse. See ridge_predictions.
    """
    return r2(ridge_predictions(train_x, train_y, test_x), test_y.double())


def ridge_predictions(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> Tensor:
    """Labels float64 [R, Y] of held-out rows by a ridge regression from features [R, D] to labels [R, Y].

    Features are standardised by the training rows; the ridge strength is chosen on the last quarter of the training rows, then
    refitted on all of them, so the held-out rows are looked at once.
    """
    train_x, test_x = standardise(train_x.double(), test_x.double())
    train_y = train_y.double()
    cut = max(1, len(train_x) * 3 // 4)
    strengths = [10.0**power for power in range(-1, 6)]
    scores = [r2(_ridge(train_x[:cut], train_y[:cut], train_x[cut:], ridge), train_y[cut:]) for ridge in strengths]
    return _ridge(train_x, train_y, test_x, strengths[max(range(len(scores)), key=scores.__getitem__)])


def ridge_classes(train_x: Tensor, labels: Tensor, test_x: Tensor, classes: int) -> Tensor:
    """Classes int64 [R] of held-out rows by a ridge regression from features [R, D] to labels int64 [R], one-hot.

    A linear probe in closed form: milliseconds, no randomness. See ridge_predictions, which wants training rows in no order that
    knows their labels.
    """
    return ridge_predictions(train_x, F.one_hot(labels, classes), test_x).argmax(1)


def _ridge(train_x: Tensor, train_y: Tensor, test_x: Tensor, ridge: float) -> Tensor:
    offset = train_y.mean(0)
    rows, width = train_x.shape
    if rows < width:  # the same answer from the smaller system
        gram = train_x @ train_x.T + ridge * torch.eye(rows, dtype=train_x.dtype)
        return test_x @ (train_x.T @ torch.linalg.solve(gram, train_y - offset)) + offset
    gram = train_x.T @ train_x + ridge * torch.eye(width, dtype=train_x.dtype)
    return test_x @ torch.linalg.solve(gram, train_x.T @ (train_y - offset)) + offset


def r2(predicted: Tensor, labels: Tensor) -> float:
    """R^2 of predictions [R, Y], averaged over the Y labels."""
    residual = ((predicted - labels) ** 2).sum(0)
    total = ((labels - labels.mean(0)) ** 2).sum(0).clamp_min(1e-12)
    return (1 - residual / total).mean().item()


def retrieval_accuracy(queries: Tensor, gallery: Tensor) -> float:
    """Share of queries [R, D] whose nearest gallery row [R, D] by cosine is their own (row i belongs to row i)."""
    return retrieval_hits(queries, gallery).float().mean().item()


def retrieval_hits(queries: Tensor, gallery: Tensor) -> Tensor:
    """Bool [R]: whether the row of a gallery [R, D] that is nearest to a query [R, D], by cosine from its mean, is its own."""
    centre = gallery.mean(0)
    q = F.normalize(queries - centre, dim=-1)
    g = F.normalize(gallery - centre, dim=-1)
    return (q @ g.T).argmax(1) == torch.arange(len(q))
