"""The bridge from an encoder to a language model: tokens of a clip become as many visual tokens as the context has room for.

Legend: B clips, N tokens of the grid, Q visual tokens of a clip, D width of the encoder, L width of the language model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from jepa_core.attentive import AttentivePooler
from jepa_core.blocks import WEIGHT_STD
from jepa_core.config import AttentiveConfig, ProjectorConfig
from jepa_core.positions import Grid


class Projector(nn.Module):
    """Tokens [B, N, D] -> visual tokens [B, Q, L]; see ProjectorConfig for the two kinds."""

    def __init__(self, config: ProjectorConfig, dim_in: int, dim_out: int) -> None:
        """Raises ValueError where the heads of the attentive kind do not fit `dim_in`."""
        super().__init__()
        self.config = config
        if config.kind == "attentive":
            self.pooler = AttentivePooler(AttentiveConfig(config.depth, config.heads, config.budget), dim_in)
        hidden = config.hidden or dim_out
        self.norm = nn.LayerNorm(dim_in)
        self.fc1, self.fc2 = nn.Linear(dim_in, hidden), nn.Linear(hidden, dim_out)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of the kind and size that language models start from, so that first visual tokens are no louder than words."""
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=WEIGHT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens [B, N, D] in raster order of `grid` -> [B, Q, L]. Raises ValueError where they do not fill the grid."""
        if tokens.shape[1] != grid.num_tokens:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {tuple(grid)} = {grid.num_tokens}")
        tokens = self.pooler(tokens) if self.config.kind == "attentive" else pooled(tokens, grid, self.config.pool)
        return self.fc2(F.gelu(self.fc1(self.norm(tokens))))


def visual_tokens(config: ProjectorConfig, grid: Grid) -> int:
    """Q of a clip with tokens along time, height and width."""
    return config.budget if config.kind == "attentive" else pooled_grid(grid, config.pool).num_tokens


def pooled_grid(grid: Grid, pool: tuple[int, int, int]) -> Grid:
    """What averaging boxes leaves; the last box along an axis may be smaller."""
    return Grid(*(-(-size // step) for size, step in zip(grid, pool, strict=True)))


def pooled(tokens: Tensor, grid: Grid, pool: tuple[int, int, int]) -> Tensor:
    """Means of boxes of the grid: tokens [B, N, D] -> [B, Q, D]; boxes at the far edges hold what is left."""
    steps = tuple(min(size, step) for size, step in zip(grid, pool, strict=True))
    if steps == (1, 1, 1):
        return tokens
    boxes = tokens.transpose(1, 2).unflatten(2, tuple(grid))
    return F.avg_pool3d(boxes, steps, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
