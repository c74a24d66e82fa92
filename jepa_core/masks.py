"""Multi-block 3D masks as a pure function of (seed, step, sample).

Legend: B batch, K context tokens, M target tokens of the grid's N.

Source: the reference's multiseq_multiblock3d collator. Block sizes are drawn once per step and mask, block positions per
sample; the target is the union of the blocks, the context its complement. Differences, on purpose: every draw is keyed by its
step or sample number, so that workers, ranks and restarts agree; and where a batch must be cut to its shortest sequence, a
random subset of tokens stays instead of the first ones in raster order (which loses the end of the clip).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jepa_core.config import MaskConfig
from jepa_core.rope import Grid
from jepa_core.sampling import Stream, generator

MAX_REDRAWS = 100


class MaskIds(NamedTuple):
    """Token ids int64, ascending: context [B, K] and target [B, M]."""

    context: np.ndarray
    target: np.ndarray


def draw_masks(config: MaskConfig, index: int, grid: Grid, seed: int, step: int, samples: Sequence[int]) -> MaskIds:
    """The masks number `index` of a batch of sample numbers at a step.

    Raises ValueError when the configuration leaves no context: the message has the numbers.
    """
    size = _block_size(config, grid, generator(seed, Stream.MASK_SIZE, step, index))
    kept = np.stack([_keep_map(config.num_blocks, size, grid, seed, int(n), index) for n in samples])
    return MaskIds(_cut(kept, seed, samples, index), _cut(~kept, seed, samples, index))


def _block_size(config: MaskConfig, grid: Grid, rng: np.random.Generator) -> tuple[int, int, int]:
    """(t, h, w) of one block, in tubelets: scale of the grid's area, then aspect ratio h / w."""
    temporal, spatial, aspect = (rng.uniform(*r) for r in (config.temporal_scale, config.spatial_scale, config.aspect_ratio))
    t = max(1, int(grid.t * temporal))
    area = int(grid.h * grid.w * spatial)
    h = int(np.clip(round((area * aspect) ** 0.5), 1, grid.h))
    w = int(np.clip(round((area / aspect) ** 0.5), 1, grid.w))
    return t, h, w


def _keep_map(num_blocks: int, size: tuple[int, int, int], grid: Grid, seed: int, sample: int, index: int) -> np.ndarray:
    """Bool [N], True where a token stays context."""
    rng = generator(seed, Stream.MASK_POSITION, sample, index)
    limits = np.array([grid.t - size[0], grid.h - size[1], grid.w - size[2]]) + 1
    for _ in range(MAX_REDRAWS):
        keep = np.ones(grid, dtype=bool)
        for start in rng.integers(0, limits, size=(num_blocks, 3)):
            keep[tuple(slice(s, s + length) for s, length in zip(start, size, strict=True))] = False
        if keep.any():
            return keep.ravel()
    raise ValueError(
        f"{num_blocks} mask blocks of {size} (t, h, w) leave no context on a grid of {tuple(grid)} in {MAX_REDRAWS} draws: "
        "use fewer or smaller blocks, or a larger crop"
    )


def _cut(chosen: np.ndarray, seed: int, samples: Sequence[int], index: int) -> np.ndarray:
    """Ids of True tokens per row, each row cut to the shortest by a random subset: bool [B, N] -> int64 [B, K]."""
    shortest = int(chosen.sum(axis=1).min())
    rows = []
    for row, sample in zip(chosen, samples, strict=True):
        ids = np.flatnonzero(row)
        if len(ids) > shortest:
            ids = np.sort(generator(seed, Stream.MASK_CUT, int(sample), index).permutation(ids)[:shortest])
        rows.append(ids)
    return np.stack(rows)
