"""Three-dimensional rotary position tables, in the layout of the released V-JEPA 2 weights.

Legend: T H W grid of tubelets, N = T*H*W tokens in raster order (w fastest), hd head width.

The released weights were trained with sin and cos *tiled* ([a0..aM, a0..aM]) while the rotation pairs *adjacent* channels, so
the two members of a pair turn by different angles (vjepa2 PR 15). The quirk is kept: without it the weights are wrong.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Tubelets along time, height and width of a clip."""

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        """T*H*W."""
        return self.t * self.h * self.w

    @property
    def tokens_per_step(self) -> int:
        """H*W: the tokens of one tubelet step."""
        return self.h * self.w


@lru_cache(maxsize=32)
def rope_table(grid: Grid, head_dim: int, device: torch.device) -> Tensor:
    """Sine and cosine of every token of the grid: float32 [N, 2*hd] = [sin | cos], as timm's blocks take it.

    A head is split into three even parts for t, h and w; what remains (4 channels of 64) is not rotated. Computed in float32
    on the host and shared by every layer; gather rows by token id for masked sequences.
    """
    ids = torch.arange(grid.num_tokens)
    positions = (ids // grid.tokens_per_step, ids % grid.tokens_per_step // grid.w, ids % grid.w)
    return _table(positions, head_dim).to(device)


@lru_cache(maxsize=32)
def action_rope_table(grid: Grid, head_dim: int, num_conditions: int, device: torch.device) -> Tensor:
    """The table of an action-conditioned sequence: float32 [T*(C+H*W), 2*hd].

    Each step is C condition tokens (action, state), rotated by time alone, followed by its H*W patch tokens
    (reference: ACRoPEAttention).
    """
    patches = rope_table(Grid(*grid), head_dim, torch.device("cpu")).unflatten(0, (grid.t, grid.tokens_per_step))
    steps = torch.arange(grid.t)
    conditions = _table((steps, torch.zeros_like(steps), torch.zeros_like(steps)), head_dim)
    conditions = conditions[:, None].expand(-1, num_conditions, -1)
    return torch.cat([conditions, patches], dim=1).flatten(0, 1).to(device)


def _table(positions: tuple[Tensor, Tensor, Tensor], head_dim: int) -> Tensor:
    part = 2 * (head_dim // 3 // 2)
    frequencies = 10000 ** (-torch.arange(part // 2, dtype=torch.float32) / (part / 2))
    angles = [(position[:, None].float() * frequencies).tile(2) for position in positions]
    rest = torch.zeros(positions[0].shape[0], head_dim - 3 * part)
    angle = torch.cat([*angles, rest], dim=-1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
