"""Classes read out of frozen features: linear, attentive and k-NN probes, chosen on validation rows, one look at the test rows.

Legend: R rows (clips), D feature width, N tokens, C classes, V views of a row, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import LINEAR_GRID, AttentiveConfig, HeadGrid
from jepa_core.heads import AttentiveHeads, Heads, LinearHeads, probabilities, train_heads
from jepa_core.probe import standardise
from jepa_core.sampling import Stream, generator

KNN_NEIGHBOURS = (10, 20, 100, 200)
KNN_TEMPERATURE = 0.07
"""Both from DINO (arXiv 2104.14294, released eval_knn.py)."""
CHUNK = 1024
HEADS_BYTES = 1 << 30
"""What the attentive heads that are trained together may take: a grid of more is trained part by part, which changes no head. A
head on pixels, 1,536 wide, takes 0.7 GB."""
STATE_BYTES = 24
"""Of a parameter in training: itself, its gradient, two moments, and a copy with its gradient where heads are stacked."""


class Rows(NamedTuple):
    """Features [R, D] or tokens [R, N, D] of clips, and their labels int64 [R]. Held-out rows may have views: [R, V, ...]."""

    x: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """Rows to train on, to choose the head by, and to look at once; the names of the classes 0 .. C-1."""

    train: Rows
    validation: Rows
    test: Rows
    names: Sequence[str]


@dataclass(frozen=True)
class Choice:
    """One head, or one number of neighbours: its settings and its accuracy on the validation rows, in [0, 1]."""

    settings: dict[str, float]
    validation: float


@dataclass(frozen=True)
class Readout:
    """What a probe found. Accuracies in [0, 1]."""

    test: float
    """Top-1 of the chosen head on the test rows; no other head has seen them."""
    test_top5: float
    chosen: Choice
    table: tuple[Choice, ...]
    """Every head, in the order of the grid."""
    num_test: int
    """Rows behind `test`: see statistics.wilson_interval."""
    predicted: tuple[int, ...] = field(default=(), repr=False)
    """The chosen head's class of each test row."""


def check_splits(splits: Splits, row_axes: int) -> None:
    """Raises ValueError, with names and numbers, for splits that a probe would give a meaningless accuracy for.

    `row_axes` is 1 for features and 2 for tokens. Refused: labels that do not match rows or names, features that are not finite,
    rows of different shapes, classes without rows, and classes that are missing from a split.
    """
    present = {}
    for split in ("train", "validation", "test"):
        x, labels = getattr(splits, split)
        views = x.ndim - 1 - row_axes
        if views not in ((0,) if split == "train" else (0, 1)):
            raise ValueError(f"{split}: features of shape {list(x.shape)} do not have {row_axes} axes a row")
        if x.shape[-row_axes:] != splits.train.x.shape[-row_axes:]:
            raise ValueError(f"{split}: rows of shape {list(x.shape)}, train has {list(splits.train.x.shape)}")
        if len(x) != len(labels) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(
                f"{split}: {len(x)} rows, but labels {list(labels.shape)} of {labels.dtype}: one int64 a row is needed"
            )
        unknown = sorted(set(labels.tolist()) - set(range(len(splits.names))))
        if unknown:
            raise ValueError(f"{split}: labels {unknown[:5]} are none of the {len(splits.names)} classes")
        bad = [index for start in range(0, len(x), CHUNK) for index in _not_finite(x[start : start + CHUNK], start)]
        if bad:
            raise ValueError(f"{split}: {len(bad)} of {len(x)} rows have features that are NaN or infinite, first row {bad[0]}")
        present[split] = set(labels.tolist())
    everywhere = set.union(*present.values())
    empty = [name for number, name in enumerate(splits.names) if number not in everywhere]
    if empty:
        raise ValueError(f"{len(empty)} of {len(splits.names)} classes have no rows: {_few(empty)}")
    for split, found in present.items():
        missing = [name for number, name in enumerate(splits.names) if number not in found]
        if missing:
            raise ValueError(f"{split}: {len(missing)} of {len(splits.names)} classes are missing: {_few(missing)}")


def linear_probe(splits: Splits, grid: HeadGrid = LINEAR_GRID, seed: int = 0) -> Readout:
    """Logistic regression from features [R, D], standardised by the training rows. Raises ValueError as check_splits does."""
    check_splits(splits, row_axes=1)
    parts = (splits.train, splits.validation, splits.test)
    scaled = standardise(*(rows.x.double() for rows in parts))
    splits = Splits(*(rows._replace(x=x.float()) for rows, x in zip(parts, scaled, strict=True)), splits.names)
    heads = LinearHeads(splits.train.x.shape[1], len(splits.names), len(grid.heads))
    train_heads(heads, *splits.train, grid, seed)
    table = _validated(heads, splits.validation, grid)
    best = best_choice(table)
    return _readout(_tested(heads, best, splits.test), splits.test.labels, table, best)


def attentive_probe(
    splits: Splits, config: AttentiveConfig, grid: HeadGrid | None = None, seed: int = 0, device: str = "cpu"
) -> tuple[Readout, dict[str, Tensor]]:
    """The attentive probe from tokens [R, N, D], as the encoder gives them -> (readout, state of the chosen AttentiveClassifier).

    `config.num_classes` is set to the number of classes. The published protocol gives a row the tokens of all its clips, one
    after the other, and held-out rows several views. Raises ValueError as check_splits does.
    """
    check_splits(splits, row_axes=2)
    grid, dim = grid or HeadGrid(), splits.train.x.shape[2]
    table: list[Choice] = []
    chosen: AttentiveHeads | None = None
    best = 0
    for part in _parts(grid, max(1, HEADS_BYTES // _head_bytes(config, dim, len(splits.names)))):
        heads = attentive_heads(config, dim, len(splits.names), part, seed).to(device)
        train_heads(heads, *splits.train, part, seed)
        before = len(table)
        table += _validated(heads, splits.validation, part)
        best = best_choice(table)
        if best >= before:
            heads.heads = nn.ModuleList([heads.heads[best - before]])
            chosen = heads
    assert chosen is not None
    readout = _readout(_tested(chosen, 0, splits.test), splits.test.labels, table, best)
    return readout, {name: value.detach().cpu().clone() for name, value in chosen.heads[0].state_dict().items()}


def knn_probe(splits: Splits, neighbours: Sequence[int] = KNN_NEIGHBOURS, temperature: float = KNN_TEMPERATURE) -> Readout:
    """Weighted k-NN from features [R, D] by cosine, with the k that is best on the validation rows.

    Features are taken as they are: standardise them first where one direction is common to all rows. A k above the number of
    training rows takes all of them. Raises ValueError as check_splits does, and for views.
    """
    check_splits(splits, row_axes=1)
    if max(splits.validation.x.ndim, splits.test.x.ndim) > 2:
        raise ValueError("k-NN has no probabilities to average over views: give it one feature a row")
    table = []
    for k in neighbours:
        votes = knn_votes(splits.train, splits.validation.x, k, temperature, len(splits.names))
        table.append(Choice({"k": k, "temperature": temperature}, top_k_accuracy(votes, splits.validation.labels)))
    best = best_choice(table)
    votes = knn_votes(splits.train, splits.test.x, int(table[best].settings["k"]), temperature, len(splits.names))
    return _readout(votes, splits.test.labels, table, best)


def knn_votes(train: Rows, queries: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    """Queries [Q, D] -> votes [Q, C]: each of the k training rows nearest by cosine votes for its label.

    A vote weighs exp(cosine / temperature), relative to the nearest row's, which changes no order. Source: Wu et al. 2018 (arXiv
    1805.01978), as in DINO.
    """
    gallery = F.normalize(train.x.float(), dim=-1)
    votes = torch.zeros(len(queries), num_classes)
    for start in range(0, len(queries), CHUNK):
        similar = F.normalize(queries[start : start + CHUNK].float(), dim=-1) @ gallery.T
        nearest, rows = similar.topk(min(k, len(gallery)), dim=1)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes[start : start + CHUNK].scatter_add_(1, train.labels[rows], weights)
    return votes


def few_labels(splits: Splits, count: int, seed: int) -> Splits:
    """The same splits with `count` training rows, as stratified_subset chooses them."""
    rows = torch.from_numpy(stratified_subset(splits.train.labels.numpy(), count, seed))
    return splits._replace(train=Rows(splits.train.x[rows], splits.train.labels[rows]))


def stratified_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows of a random subset with the shares of the classes kept: ascending int64 [count], a function of seed and labels [R].

    Every class has at least one row, and the subset of a smaller count is part of the subset of a larger one. Raises ValueError
    where there are fewer rows than asked for, or fewer asked for than classes.
    """
    classes = len(np.unique(labels))
    if not classes <= count <= len(labels):
        raise ValueError(f"{count} labels cannot be chosen from {len(labels)} rows of {classes} classes, one of each at least")
    rng = generator(seed, Stream.PROBE)
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)  # the first n rows by place hold n times each class's share ...
        place[rows[0]] = -1.0  # ... and one row at least
    return np.sort(shuffled[np.argsort(place[shuffled], kind="stable")[:count]])


def views_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Top-k of logits [R, V, C]: a row's prediction is the mean of its views' softmax (reference eval.py, run_one_epoch).

    The reference's views are spatial: tokens of the temporal clips of one view are joined before the head. Where each clip was
    classified alone, V is clips times views.
    """
    return top_k_accuracy(logits.float().softmax(-1).mean(1), labels, k)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label [R] is among the k highest of scores [R, C]; with fewer than k classes, 1."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).double().mean().item()


def best_choice(table: Sequence[Choice]) -> int:
    """The index of the highest validation accuracy; ties go to the smaller settings, the first of which is lr or k."""
    return min(range(len(table)), key=lambda index: (-table[index].validation, *table[index].settings.values()))


def attentive_heads(config: AttentiveConfig, dim: int, num_classes: int, grid: HeadGrid, seed: int) -> AttentiveHeads:
    """Untrained heads of a grid."""
    return AttentiveHeads(replace(config, num_classes=num_classes), dim, len(grid.heads), seed)


def _head_bytes(config: AttentiveConfig, dim: int, num_classes: int) -> int:
    """What one attentive head takes while it is trained."""
    with torch.device("meta"):
        head = AttentiveClassifier(replace(config, num_classes=num_classes), dim)
    return STATE_BYTES * sum(parameter.numel() for parameter in head.parameters())


def _parts(grid: HeadGrid, size: int) -> list[HeadGrid]:
    """A grid in parts of at most so many heads, in its order."""
    lrs, decays = grid.lrs, grid.weight_decays
    if size < len(decays):
        return [replace(grid, lrs=(lr,), weight_decays=decays[n : n + size]) for lr in lrs for n in range(0, len(decays), size)]
    step = size // len(decays)
    return [replace(grid, lrs=lrs[n : n + step]) for n in range(0, len(lrs), step)]


def _validated(heads: Heads, rows: Rows, grid: HeadGrid) -> list[Choice]:
    """Every head's accuracy on the validation rows."""
    correct = torch.zeros(len(grid.heads), dtype=torch.int64)
    for which in heads.passes():
        for piece, found in probabilities(heads, rows.x, which):
            correct[which] += (found.argmax(-1).cpu() == rows.labels[piece]).sum(1)
    return [
        Choice({"lr": lr, "weight_decay": decay}, hits / len(rows.labels))
        for (lr, decay), hits in zip(grid.heads, correct.tolist(), strict=True)
    ]


def _tested(heads: Heads, which: int, rows: Rows) -> Tensor:
    """Probabilities [R, C] of the test rows by one head."""
    return torch.cat([found[0].cpu() for _, found in probabilities(heads, rows.x, [which])])


def _readout(scores: Tensor, labels: Tensor, table: list[Choice], best: int) -> Readout:
    top1, top5 = (top_k_accuracy(scores, labels, k) for k in (1, 5))
    return Readout(top1, top5, table[best], tuple(table), len(labels), tuple(scores.argmax(1).tolist()))


def _not_finite(x: Tensor, start: int) -> list[int]:
    return (~x.isfinite().flatten(1).all(1)).nonzero()[:, 0].add(start).tolist()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
