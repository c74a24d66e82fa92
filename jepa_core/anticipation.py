"""Action anticipation: which frames precede an action, heads for verb, noun and action, their loss and their recall.

Source: the EPIC-KITCHENS-100 task (arXiv 2006.13256) and V-JEPA 2's frozen evaluation (evals/action_anticipation_frozen).

Legend: B batch, N tokens, D width, C classes, R rows, T frames, P heads of one grid.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.attentive import AttentivePooler
from jepa_core.config import AttentiveConfig, HeadGrid, OptimConfig
from jepa_core.schedules import learning_rate

TASKS = ("verb", "noun", "action")
ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss, in the reference and in arXiv 1708.02002."""
ROWS_AT_ONCE = 16


class Answers(NamedTuple):
    """Labels int64 [R] of each task."""

    verb: Tensor
    noun: Tensor
    action: Tensor


def clip_before(
    start: float,
    stop: float,
    num_frames: int,
    fps: float,
    gap: float,
    protocol: Literal["strict", "reference"],
    point: float = 0.0,
) -> np.ndarray:
    """Times float64 [num_frames] in seconds of the clip from which an action from `start` to `stop` is to be told.

    strict: every frame lies more than `gap` seconds before the start. reference: before the *stop*, or before the moment that
    lies the share `point` of the action's length earlier; so it may show the action. As there, the last frame lies one step of
    1 / fps before that moment. Times may be negative.
    """
    anchor = start if protocol == "strict" else stop - point * (stop - start)
    return anchor - gap - np.arange(num_frames, 0, -1) / fps


class AnticipationHead(nn.Module):
    """An attentive pooler with three queries and a linear head on each, under the reference's names."""

    def __init__(self, config: AttentiveConfig, dim: int, classes: Sequence[int]) -> None:
        """`classes`: how many verbs, nouns and actions."""
        super().__init__()
        if config.num_queries != len(TASKS):
            raise ValueError(f"anticipation asks {len(TASKS)} queries, not {config.num_queries}")
        self.pooler = AttentivePooler(config, dim)
        self.verb_classifier, self.noun_classifier, self.action_classifier = (nn.Linear(dim, count) for count in classes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, D] -> logits [B, C] of verb, noun and action."""
        verb, noun, action = self.pooler(tokens).unbind(1)
        return self.verb_classifier(verb), self.noun_classifier(noun), self.action_classifier(action)


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid focal loss of logits [B, C] for one class a row, labels int64 [B], summed: a scalar."""
    targets = F.one_hot(labels, logits.shape[1]).to(logits)
    likely = logits.sigmoid()
    hit = likely * targets + (1 - likely) * (1 - targets)
    weight = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weight * (1 - hit) ** GAMMA * loss).sum()


def class_mean_recall(scores: Tensor, labels: Tensor, k: int = 5, among: Sequence[int] | None = None) -> float:
    """Mean over the classes in labels [R] of the share of their rows whose class is among the k highest of scores [R, C].

    Only classes `among` are answered, those in the labels by default, as the reference does for EPIC-KITCHENS' validation set:
    which classes occur there is told, so a k of their number or more scores 1.
    """
    present = labels.unique()
    allowed = present if among is None else torch.as_tensor(sorted(among))
    best = allowed[scores[:, allowed].topk(min(k, len(allowed)), dim=1).indices]
    hit = (best == labels[:, None]).any(1).double()
    return float(torch.stack([hit[labels == label].mean() for label in present]).mean())


class HeadSet(nn.Module):
    """Heads of a grid with equal initial weights, trained on the same batches, one pass each."""

    def __init__(self, config: AttentiveConfig, dim: int, classes: Sequence[int], grid: HeadGrid, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = AnticipationHead(config, dim, classes)
        self.heads = nn.ModuleList([first] + [deepcopy(first) for _ in grid.heads[1:]])
        self.grid = grid

    def fit(self, x: Tensor, answers: Answers, seed: int) -> None:
        """All epochs of the grid on cached tokens [R, N, D]: AdamW, the rate along a half cosine to 0, focal losses added up."""
        grid, device = self.grid, next(self.parameters()).device
        steps = -(-len(x) // (grid.batch_size or len(x)))
        warmup = round(grid.warmup_epochs * steps)
        schedule = OptimConfig(lr=1.0, start_lr=0.0, final_lr=0.0, warmup_steps=warmup, schedule="cosine")
        groups = [
            {"params": list(head.parameters()), "weight_decay": decay}
            for head, (_, decay) in zip(self.heads, grid.heads, strict=True)
        ]
        optimizer, order, step = torch.optim.AdamW(groups), torch.Generator().manual_seed(seed), 0
        for _ in range(grid.epochs):
            for rows in torch.randperm(len(x), generator=order).tensor_split(steps):
                for piece in rows.split(ROWS_AT_ONCE):
                    tokens, labels = x[piece].to(device).float(), [labels[piece].to(device) for labels in answers]
                    for head in self.heads:
                        sum(map(focal_loss, head(tokens), labels)).div(len(rows)).backward()
                factor = learning_rate(step, grid.epochs * steps, schedule)
                for group, (lr, _) in zip(optimizer.param_groups, grid.heads, strict=True):
                    group["lr"] = lr * factor
                optimizer.step()
                optimizer.zero_grad()
                step += 1

    @torch.no_grad()
    def scores(self, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [R, C] of verb, noun and action by one head, from tokens [R, N, D]."""
        device = next(self.parameters()).device
        parts = [self.heads[head](piece.to(device).float()) for piece in x.split(ROWS_AT_ONCE)]
        return tuple(torch.cat(found).cpu() for found in zip(*parts, strict=True))
