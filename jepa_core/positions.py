"""Position tables: rotary ones in three dimensions, in two layouts, and fixed sine-cosine ones.

Legend: T H W grid of tubelets, N = T*H*W tokens in raster order (w fastest), d head width, D width.

A rotary table is [cos | sin], and the sine carries the sign of its place in the pair, so that turning x is
`x * cos + swap_pairs(x) * sin` (jepa_core.attention.rotate). The weights of V-JEPA 2 were trained with angles *tiled* over the
channels of a part ([a0..aM, a0..aM]) while adjacent channels form the pairs, so the two of a pair turn by different angles
(vjepa2 PR 15). The quirk is kept for their sake; V-JEPA 2.1 has it right.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import Position

FREQUENCY_BASE = 10_000.0
CPU = torch.device("cpu")
"""Tables are computed on the host, whatever the default device is: every device then rounds the same numbers."""


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


@lru_cache(maxsize=64)
def rope_table(
    grid: Grid, native: Grid, head_dim: int, position: Position, num_conditions: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Rotary table of a sequence: [T*(C+H*W), 2*d], computed in float32 and rounded once to `dtype`.

    A head is split into three even parts for t, h and w; what remains (4 channels of 64) is not turned. `num_conditions` C > 0
    puts so many tokens before the patches of each step, turned by time alone (reference: ACRoPEAttention). Layers share a table;
    for masked sequences gather its rows by token id. `native` is only read for rope_interpolated.
    """
    with torch.inference_mode(False):  # a table made during inference serves training too
        t, h, w = token_positions(grid)
        if position == "rope_interpolated":
            h = h * ((native.h - 1) / max(1, grid.h - 1))
            w = w * ((native.w - 1) / max(1, grid.w - 1))
        tiled = position == "rope"
        table = _rotations((t, h, w), head_dim, tiled).unflatten(0, (grid.t, grid.tokens_per_step))
        if num_conditions:
            steps = torch.arange(grid.t, dtype=torch.float32, device=CPU)
            conditions = _rotations((steps, steps * 0, steps * 0), head_dim, tiled)
            table = torch.cat([conditions[:, None].expand(-1, num_conditions, -1), table], dim=1)
        return table.flatten(0, 1).to(device=device, dtype=dtype)


def token_positions(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(t, h, w) of every token: float32 [N] each."""
    ids = torch.arange(grid.num_tokens, device=CPU)
    rest = ids % grid.tokens_per_step
    return (ids // grid.tokens_per_step).float(), (rest // grid.w).float(), (rest % grid.w).float()


def _rotations(positions: tuple[Tensor, Tensor, Tensor], head_dim: int, tiled: bool) -> Tensor:
    """[cos | signed sin] float32 [N, 2*d] for positions float32 [N] along the three axes."""
    part = 2 * (head_dim // 3 // 2)
    frequencies = FREQUENCY_BASE ** (-torch.arange(part // 2, dtype=torch.float32, device=CPU) / (part / 2))
    angles = [position[:, None] * frequencies for position in positions]
    angles = [angle.tile(2) if tiled else angle.repeat_interleave(2, dim=-1) for angle in angles]
    angle = torch.cat([*angles, torch.zeros(len(positions[0]), head_dim - 3 * part, device=CPU)], dim=-1)
    sign = torch.tensor([-1.0, 1.0], device=CPU).tile(head_dim // 2 + 1)[:head_dim]
    return torch.cat([angle.cos(), angle.sin() * sign], dim=-1)


def sincos_table(grid: Grid, dim: int, position: Position) -> Tensor:
    """The fixed table that V-JEPA 1 (`sincos`) or I-JEPA (`sincos_image`) adds to its tokens: float32 [1, N, D].

    V-JEPA 1 gives each axis an equal share of the channels, in the order t, h, w, and cuts what is too much (its uniform_power);
    I-JEPA gives half to w and half to h, in that order.
    """
    if position == "sincos_image" and grid.t != 1:
        raise ValueError(f"position=sincos_image is for images, got a grid of {grid.t} steps in time")
    t, h, w = (axis.double() for axis in token_positions(grid))
    share, axes = (dim // 2, (w, h)) if position == "sincos_image" else (-(-dim // 6) * 2, (t, h, w))
    frequencies = FREQUENCY_BASE ** (-torch.arange(share // 2, dtype=torch.float64, device=CPU) / (share / 2))
    parts = []
    for axis in axes:
        angle = axis[:, None] * frequencies
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=-1)[None, :, :dim].float()


def resample_table(table: Tensor, native: Grid, grid: Grid) -> Tensor:
    """A stored table [1, N, D] of the `native` grid for another grid: cut where only time is shorter, else interpolated."""
    if grid == native:
        return table
    if (grid.h, grid.w) == (native.h, native.w) and grid.t < native.t:
        return table[:, : grid.num_tokens]
    volume = table.unflatten(1, native).permute(0, 4, 1, 2, 3)
    if native.t == grid.t == 1:
        volume = F.interpolate(volume[:, :, 0], size=grid[1:], mode="bicubic").unsqueeze(2)
    else:
        volume = F.interpolate(volume, size=tuple(grid), mode="trilinear")
    return volume.flatten(2).transpose(1, 2)
