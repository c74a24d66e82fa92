"""Many heads of a frozen probe, trained at once on the same batches; each is an ordinary module with the official weight names.

Legend: B batch, N tokens, D width, C classes, P heads of the probe (one for each learning rate and weight decay), H attention
heads of d channels each, V views of a row.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import AttentiveConfig, HeadGrid, OptimConfig
from jepa_core.schedules import learning_rate

PASS_BYTES = 256 << 20
"""Activations of one pass stay within about this; larger batches accumulate their gradient."""


class Heads(nn.Module):
    """P modules of one kind in `heads`, with equal initial weights: only learning rate and weight decay set them apart."""

    row_axes: int
    """Axes of one row of features."""

    def __init__(self, first: nn.Module, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([first] + [deepcopy(first) for _ in range(count - 1)])

    def passes(self) -> list[list[int]]:
        """Which heads go through a forward and backward pass together; what the rest needs is not kept meanwhile."""
        return [list(range(len(self.heads)))]

    def row_bytes(self, row: Sequence[int]) -> int:
        """About what the activations of one pass take for one row of this shape."""
        raise NotImplementedError

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        """Rows [B, ...] -> logits [P, B, C] of the heads `which`."""
        raise NotImplementedError

    def _stack(self, name: str, which: Sequence[int]) -> Tensor:
        return torch.stack([self.heads[index].get_parameter(name) for index in which])


class LinearHeads(Heads):
    """Logistic regressions on features [B, D]: one matrix product for all heads. They start at zero."""

    row_axes = 1

    def __init__(self, dim: int, num_classes: int, count: int) -> None:
        first = nn.Linear(dim, num_classes)
        nn.init.zeros_(first.weight)
        nn.init.zeros_(first.bias)
        super().__init__(first, count)

    def row_bytes(self, row: Sequence[int]) -> int:
        """Features and logits."""
        return 4 * (row[0] + 3 * len(self.heads) * self.heads[0].out_features)

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        """Features [B, D] -> logits [P, B, C]."""
        weight, bias = self._stack("weight", which), self._stack("bias", which)
        return F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, (len(which), -1)).transpose(0, 1)


class AttentiveHeads(Heads):
    """Attentive probes on tokens [B, N, D].

    A probe of depth 1, cross-attention alone, asks every clip the same question, so its products can be ordered anew. The score
    of a token is q . (W_k x + b) = (W_k^T q) . x + a constant that the softmax drops, and the weighted sum of values is W_v times
    the weighted sum of tokens. Normalised tokens are then shared by all heads, and a head costs 2*H products a token and channel
    instead of 2*D: with 16 clips of 1568 x 384 in a batch, 20 heads take the time of one module. Deeper probes, like the
    published ones of depth 4, have self-attention over all tokens, which is each head's own: those go through one after the
    other, so memory is that of one head, and time that of P. Measured by tests/bench/bench_heads.py.
    """

    row_axes = 2

    def __init__(self, config: AttentiveConfig, dim: int, count: int, seed: int = 0) -> None:
        if config.num_queries != 1:
            raise ValueError(f"heads with one label a row need num_queries=1, not {config.num_queries}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = AttentiveClassifier(config, dim)
        super().__init__(first, count)
        self.config = config

    def passes(self) -> list[list[int]]:
        """All heads together where they share their work, else one by one."""
        return super().passes() if self.config.depth == 1 else [[index] for index in range(len(self.heads))]

    def row_bytes(self, row: Sequence[int]) -> int:
        """Tokens, and attention weights or the activations of self-attention blocks."""
        tokens, dim = row
        if self.config.depth == 1:
            return 4 * tokens * (2 * dim + 3 * len(self.heads) * self.config.heads)
        return 4 * tokens * dim * (4 + round(12 + 3 * self.config.mlp_ratio) * (self.config.depth - 1))

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        """Tokens [B, N, D] -> logits [P, B, C]."""
        if self.config.depth > 1:
            return torch.stack([self.heads[index](x) for index in which])
        block = "pooler.cross_attention_block."
        query = self._stack("pooler.query_tokens", which)[:, 0]  # [P, 1, D]
        z = query + self._gathered(x, query, which, block + "norm1.", block + "xattn.")
        hidden = self._norm(F.layer_norm(z, z.shape[-1:], eps=self.config.norm_eps), block + "norm2.", which)
        hidden = F.gelu(self._linear(hidden, block + "mlp.fc1.", which))
        return self._linear(z + self._linear(hidden, block + "mlp.fc2.", which), "linear.", which)

    def _gathered(self, x: Tensor, query: Tensor, which: Sequence[int], norm: str, attention: str) -> Tensor:
        """What cross-attention reads: tokens [B, N, D], queries [P, 1, D] -> [P, B, D]."""
        heads = self.config.heads
        q = self._linear(query, attention + "q.", which).unflatten(-1, (heads, 1, -1))[:, 0]  # [P, H, 1, d]
        k, v = self._stack(attention + "kv.weight", which).unflatten(1, (2, heads, -1)).unbind(1)  # [P, H, d, D]
        v_bias = self._stack(attention + "kv.bias", which).unflatten(1, (2, heads, 1, -1))[:, 1]  # [P, H, 1, d]
        # Weights of attention sum to 1, so the norm's gain and shift may act on what is asked and gathered, not on every token.
        gain, shift = (self._stack(norm + part, which)[:, None, None] for part in ("weight", "bias"))  # [P, 1, 1, D]
        asked = q @ k * gain * q.shape[-1] ** -0.5  # [P, H, 1, D]
        x = F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        weights = torch.bmm(asked.flatten(0, 2).expand(len(x), -1, -1), x.transpose(1, 2)).softmax(-1)  # [B, P*H, N]
        pooled = (weights @ x).unflatten(1, (-1, heads)).permute(1, 2, 0, 3)  # [P, H, B, D]
        values = pooled @ (v * gain).transpose(2, 3) + (v_bias + shift @ v.transpose(2, 3))  # [P, H, B, d]
        return values.transpose(1, 2).flatten(2)

    def _norm(self, x: Tensor, name: str, which: Sequence[int]) -> Tensor:
        return torch.addcmul(self._stack(name + "bias", which)[:, None], x, self._stack(name + "weight", which)[:, None])

    def _linear(self, x: Tensor, name: str, which: Sequence[int]) -> Tensor:
        weight, bias = self._stack(name + "weight", which), self._stack(name + "bias", which)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


class HeadTrainer:
    """AdamW for each head with its own learning rate and weight decay; the rates follow the grid's warmup and half cosine."""

    def __init__(self, heads: Heads, grid: HeadGrid, steps_per_epoch: int) -> None:
        if len(heads.heads) != len(grid.heads):
            raise ValueError(f"{len(heads.heads)} heads, but the grid has {len(grid.heads)} pairs of lr and weight decay")
        self.heads, self.grid, self.steps_done = heads, grid, 0
        self.total_steps = grid.epochs * steps_per_epoch
        warmup = round(grid.warmup_epochs * steps_per_epoch)
        self.schedule = OptimConfig(lr=1.0, start_lr=0.0, final_lr=0.0, warmup_steps=warmup, schedule="cosine")
        groups = [
            {"params": list(head.parameters()), "weight_decay": decay}
            for head, (_, decay) in zip(heads.heads, grid.heads, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One update of every head from rows [B, ...] and labels int64 [B] -> cross-entropies [P] before it."""
        losses = torch.zeros(len(self.heads.heads), device=labels.device)
        for rows, which in _pieces(self.heads, x):
            logits = self.heads(x[rows].float(), which)
            target = labels[rows].expand(len(which), -1)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").unflatten(0, target.shape)
            loss = loss.sum(1) / len(labels)
            loss.sum().backward()
            losses[which] += loss.detach()
        factor = learning_rate(self.steps_done, self.total_steps, self.schedule)
        for group, (lr, _) in zip(self.optimizer.param_groups, self.grid.heads, strict=True):
            group["lr"] = lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return losses


def train_heads(heads: Heads, x: Tensor, labels: Tensor, grid: HeadGrid, seed: int) -> None:
    """All epochs of a grid on cached rows [R, ...] (float32 or narrower; they may be mapped from a file) and labels [R].

    The order of rows is a function of the seed. Rows go to the device of the heads batch by batch.
    """
    device = next(heads.parameters()).device
    steps = -(-len(x) // (grid.batch_size or len(x)))
    trainer = HeadTrainer(heads, grid, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(grid.epochs):
        for rows in torch.randperm(len(x), generator=order).tensor_split(steps):
            trainer.step(x[rows].to(device), labels[rows].to(device))


@torch.no_grad()
def probabilities(heads: Heads, x: Tensor, which: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Rows [R, ...] or [R, V, ...] with views -> slices of the rows, each with probabilities [P, r, C] of the heads `which`.

    Those of a row are the mean over its views of each view's softmax, as published.
    """
    device = next(heads.parameters()).device
    has_views = x.ndim == heads.row_axes + 2
    views = x.shape[1] if has_views else 1
    size = max(1, PASS_BYTES // (heads.row_bytes(x.shape[-heads.row_axes :]) * views))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        piece = x[rows].to(device).float()
        logits = heads(piece.flatten(0, 1) if has_views else piece, which)
        yield rows, logits.unflatten(1, (-1, views)).softmax(-1).mean(2)


def _pieces(heads: Heads, x: Tensor) -> Iterator[tuple[slice, list[int]]]:
    size = max(1, PASS_BYTES // heads.row_bytes(x.shape[1:]))
    for start in range(0, len(x), size):
        for which in heads.passes():
            yield slice(start, start + size), which
