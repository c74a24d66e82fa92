"""Which tokens are context and which are targets, as a pure function of (seed, step, sample, configuration). Numpy only.

Legend: B batch, R rows of it, N = T*H*W tokens of the grid in raster order (w fastest), P blocks, K context tokens, M target
tokens, G 2 when context and target are cut together and 1 when the context is cut alone.

Three layers, each without random state of its own: sizes of blocks from uniform numbers (`union_size`, `separate_sizes`); keep
maps from sizes and corners (`union_context`, `separate_blocks`); a rectangular batch from keep maps (`cut`). `draw_masks` feeds
them with counter-based random numbers. The tests feed them with the draws of the reference collators (V-JEPA 2's
multiseq_multiblock3d and I-JEPA's multiblock) and get the same ids.

Differences from the reference, on purpose: every draw is keyed by its step or sample number, so that workers, ranks and restarts
agree; where rows are cut to the shortest, a random subset can stay instead of the first tokens, which lose the end of the clip;
a context or target of one token works; and blocks that can never fit are an error instead of an endless loop.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jepa_core.config import MaskConfig, MaskPolicy
from jepa_core.positions import Grid
from jepa_core.sampling import Stream, random_words, splitmix, unit_interval

MAX_REDRAWS = 100
"""Attempts to find blocks that leave a context (`union`); the reference tries for ever."""
ATTEMPTS_PER_TARGET = 20
"""Failed context blocks after which one target fewer is taken out of them (`separate`; reference: timeout)."""

Corners = Callable[[np.ndarray, int], np.ndarray]
"""Where the blocks of some rows begin: (rows int64 [R], number of the attempt) -> corners int64 [R, P, 3] as (t, h, w)."""
Keys = Callable[[], np.ndarray]
"""A random key of each row: uint64 [B]. Called only where a policy needs random bits."""


class Masks(NamedTuple):
    """Token ids of one mask type for a batch. P is 1 for kind `union` and num_blocks for `separate`.

    Padded entries (policy `exact`) repeat the row's last id and are marked False. `separate` targets are never padded.
    """

    context: np.ndarray
    """int64 [B, K], ascending."""
    target: np.ndarray
    """int64 [P, B, M], ascending."""
    context_valid: np.ndarray | None
    """bool [B, K]; None when every entry is real."""
    target_valid: np.ndarray | None
    """bool [P, B, M]; None when every entry is real."""

    def ratios(self, grid: Grid) -> tuple[float, float]:
        """Mean share of the grid's tokens in the context, and in one target. Padding does not count."""
        context = self.context.shape[-1] if self.context_valid is None else self.context_valid.sum(axis=-1).mean()
        target = self.target.shape[-1] if self.target_valid is None else self.target_valid.sum(axis=-1).mean()
        return float(context) / grid.num_tokens, float(target) / grid.num_tokens

    def tokens_of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of one row's context, and of its targets together, without padding."""
        everywhere = slice(None)
        context = self.context[row, everywhere if self.context_valid is None else self.context_valid[row]]
        target = self.target[:, row] if self.target_valid is None else self.target[:, row][self.target_valid[:, row]]
        return context, np.unique(target)


class BlockSize(NamedTuple):
    """Tokens of a block along time, height and width."""

    t: int
    h: int
    w: int


def draw_masks(
    config: MaskConfig, index: int, grid: Grid, seed: int, step: int, samples: Sequence[int], policy: MaskPolicy = "random"
) -> Masks:
    """The masks number `index` of a batch of B sample numbers at a step.

    Block sizes belong to the step, everything else to the sample: the other rows only set the length to which a row is cut.
    Raises ValueError when blocks of the configuration cannot be placed on the grid; the message has the numbers.
    """
    numbers = np.asarray(samples, dtype=np.uint64)
    per_attempt = _draws_per_attempt(config)
    # One call for the size, the key of cuts and the first positions: random numbers take a third of the time of a batch.
    streams = np.full((len(numbers) + 2, 1), Stream.MASK_POSITION)
    streams[-2:, 0] = Stream.MASK_SIZE, Stream.MASK_CUT
    words = random_words(seed, streams, index, np.append(numbers, np.array([step, 0], dtype=np.uint64)), 0, per_attempt)
    first_draws, size_draws = unit_interval(words[:-2]), unit_interval(words[-2])

    def keys() -> np.ndarray:
        return splitmix(words[-1, :1], numbers)[0]

    def redraw(rows: np.ndarray, first: int, count: int) -> np.ndarray:
        return unit_interval(random_words(seed, Stream.MASK_POSITION, index, numbers[rows], first, count))

    if config.kind == "separate":
        target_size, context_size = separate_sizes(config, grid, size_draws[:2])
        target_corners = _separate_corners(first_draws, grid, target_size)

        def context_corners(rows: np.ndarray, attempt: int) -> np.ndarray:
            return _separate_corners(redraw(rows, per_attempt + attempt, 1), grid, context_size)

        context, target = separate_blocks(config, grid, target_size, context_size, target_corners, context_corners)
        ((ids, valid),) = cut(context[None], policy, 0, keys)
        return Masks(ids, target, valid, None)

    size = union_size(config, grid, size_draws)

    def corners(rows: np.ndarray, attempt: int) -> np.ndarray:
        draws = redraw(rows, attempt * per_attempt, per_attempt) if attempt else first_draws
        return _union_corners(draws, config.num_blocks, grid, size)

    context = union_context(config, grid, size, len(numbers), corners)
    (ids, valid), (target, target_valid) = cut(np.stack([context, ~context]), policy, config.max_context, keys)
    return Masks(ids, target[None], valid, None if target_valid is None else target_valid[None])


# Layer 1: sizes of blocks.


def union_size(config: MaskConfig, grid: Grid, draws: Sequence[float]) -> BlockSize:
    """Size of every block of a step from three uniform numbers: temporal scale, spatial scale, aspect ratio h / w."""
    temporal, spatial, aspect = map(_scaled, draws, (config.temporal_scale, config.spatial_scale, config.aspect_ratio))
    h, w = _rectangle(int(grid.h * grid.w * spatial), aspect)
    return BlockSize(max(1, int(grid.t * temporal)), min(max(1, h), grid.h), min(max(1, w), grid.w))


def separate_sizes(config: MaskConfig, grid: Grid, draws: Sequence[float]) -> tuple[BlockSize, BlockSize]:
    """Sizes (target, context) of a step from two uniform numbers, one for each.

    As in I-JEPA's reference, the target's number sets its scale and its aspect ratio, so that large blocks are also the tall
    ones, and blocks are smaller than the grid along both axes. Raises ValueError for grids with time and for blocks that have
    min_tokens or fewer, with which the reference never returns.
    """
    if grid.t != 1:
        raise ValueError(f"separate mask blocks are for images: the grid {tuple(grid)} has {grid.t} steps of time, not 1")
    area = grid.h * grid.w
    target = _rectangle(int(area * _scaled(draws[0], config.spatial_scale)), _scaled(draws[0], config.aspect_ratio))
    context = _rectangle(int(area * _scaled(draws[1], config.context_scale)), 1.0)
    sizes = [BlockSize(1, min(h, grid.h - 1), min(w, grid.w - 1)) for h, w in (target, context)]
    for name, size in zip(("target", "context"), sizes, strict=True):
        if size.h * size.w <= config.min_tokens:
            raise ValueError(
                f"a {name} block of {tuple(size)} (t, h, w) on a grid of {tuple(grid)} has no more than min_tokens = "
                f"{config.min_tokens} tokens: use larger blocks, a larger crop or a smaller min_tokens"
            )
    return sizes[0], sizes[1]


def _scaled(draw: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return low + draw * (high - low)


def _rectangle(area: int, aspect: float) -> tuple[int, int]:
    """(h, w) nearest to an area and h / w; halves go to the even number, as in the reference."""
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


# Layer 2: keep maps.


def union_context(config: MaskConfig, grid: Grid, size: BlockSize, batch: int, corners: Corners) -> np.ndarray:
    """Context of kind `union`: bool [B, N], False in the union of a row's blocks and after max_temporal_keep.

    What that cuts off becomes target, as in the reference. Rows without context are drawn again. Raises ValueError when some
    row has none in MAX_REDRAWS attempts.
    """
    in_time = np.arange(grid.t) < max(1, int(grid.t * config.max_temporal_keep))
    rows = np.arange(batch)
    free = np.empty(0)
    for attempt in range(MAX_REDRAWS):
        drawn = ~_covered(corners(rows, attempt), size, grid)
        drawn &= in_time[: drawn.shape[1], None, None]  # the first step, which stands for all in tubes, is always in time
        if attempt == 0:
            free = drawn
        else:
            free[rows] = drawn
        rows = rows[~drawn.reshape(len(rows), -1).any(axis=1)]
        if not rows.size:
            return (free & in_time[:, None, None]).reshape(batch, -1)
    raise ValueError(
        f"{config.num_blocks} mask blocks of {tuple(size)} (t, h, w) leave no context on a grid of {tuple(grid)} in "
        f"{MAX_REDRAWS} draws: use fewer or smaller blocks, or a larger crop"
    )


def separate_blocks(
    config: MaskConfig,
    grid: Grid,
    target_size: BlockSize,
    context_size: BlockSize,
    target_corners: np.ndarray,
    context_corners: Corners,
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of kind `separate`: context bool [B, N] and target ids int64 [P, B, M], from target corners int64 [B, P, 3].

    The context is one block without the targets, drawn again until it has more than min_tokens tokens. Each time that
    ATTEMPTS_PER_TARGET attempts have failed, the last of the targets still taken out is left in: context and target may then
    overlap, as in the reference.
    """
    batch, num_blocks, _ = target_corners.shape
    context = np.empty((batch, grid.num_tokens), dtype=bool)
    rows = np.arange(batch)
    attempt = 0
    while rows.size:
        taken_out = max(0, num_blocks - attempt // ATTEMPTS_PER_TARGET)
        block = _covered(context_corners(rows, attempt), context_size, grid)
        free = block & ~_covered(target_corners[rows, :taken_out], target_size, grid)
        context[rows] = free.reshape(len(rows), -1)
        rows = rows[free.sum(axis=(1, 2, 3)) <= config.min_tokens]
        attempt += 1
    first = target_corners[..., 1] * grid.w + target_corners[..., 2]
    inside = (np.arange(target_size.h)[:, None] * grid.w + np.arange(target_size.w)).ravel()
    return context, first.T[..., None] + inside


def _covered(corners: np.ndarray, size: BlockSize, grid: Grid) -> np.ndarray:
    """Union of each row's blocks: corners int64 [R, P, 3] -> bool [R, T, H, W], or [R, 1, H, W] for blocks of full length."""
    rows, cols = (_spans(corners[..., axis], size[axis], grid[axis]) for axis in (1, 2))
    if size.t < grid.t:
        steps = _spans(corners[..., 0], size.t, grid.t)
        rows = (steps[..., :, None] & rows[..., None, :]).reshape(*steps.shape[:2], -1)
    # A product of matrices counts the blocks over each cell; counts are small integers, so float32 is exact.
    blocks = rows.astype(np.float32).swapaxes(1, 2) @ cols.astype(np.float32)
    return blocks.reshape(len(corners), -1, grid.h, grid.w) > 0


def _spans(starts: np.ndarray, length: int, extent: int) -> np.ndarray:
    """int64 [R, P] -> bool [R, P, extent], True from each start for `length` cells."""
    offset = np.arange(extent) - starts[..., None]
    return offset.view(np.uint64) < length  # cells before the start are huge as unsigned numbers


def _draws_per_attempt(config: MaskConfig) -> int:
    """Draws, of two uniform numbers each, that place all blocks of a sample: 3 numbers for a box, 2 for a rectangle."""
    return config.num_blocks if config.kind == "separate" else (3 * config.num_blocks + 1) // 2


def _union_corners(u: np.ndarray, num_blocks: int, grid: Grid, size: BlockSize) -> np.ndarray:
    """Corners of kind `union`: float64 [R, 3 * P or more] -> int64 [R, P, 3]. Every place that fits is equally likely."""
    places = np.array([grid.t - size.t, grid.h - size.h, grid.w - size.w]) + 1
    return (u[:, : 3 * num_blocks].reshape(-1, num_blocks, 3) * places).astype(np.int64)


def _separate_corners(u: np.ndarray, grid: Grid, size: BlockSize) -> np.ndarray:
    """Corners of kind `separate`: float64 [R, 2 * P] -> int64 [R, P, 3].

    As in the reference, the last place that fits is never used: blocks don't reach the bottom row and the right column.
    """
    corners = np.zeros((len(u), u.shape[1] // 2, 3), dtype=np.int64)
    corners[..., 1:] = u.reshape(len(u), -1, 2) * np.array([grid.h - size.h, grid.w - size.w])
    return corners


# Layer 3: from keep maps of different sizes to a rectangle.


def cut(maps: np.ndarray, policy: MaskPolicy, max_context: int, keys: Keys) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Ids of the True tokens as the policy batches them: bool [G, B, N] -> G times (ids int64 [B, K], valid bool [B, K] or None).

    `max_context` limits map 0 (0: no limit); under `exact`, rows above it keep a random subset.
    """
    counts = _count(maps)
    lengths = counts.max(axis=1) if policy == "exact" else counts.min(axis=1)
    if max_context:
        lengths[0] = min(lengths[0], max_context)
    if policy != "first" and (counts > lengths[:, None]).any():
        wanted = np.minimum(counts, lengths[:, None])
        maps, counts = _random_subsets(maps, counts, wanted, keys()), wanted
    batches = []
    for group, length, count in zip(maps, lengths, counts, strict=True):
        tokens = np.flatnonzero(group)  # of all rows, one row after another
        begin = count.cumsum() - count
        if policy == "exact":
            place = np.arange(length)
            valid = place < count[:, None]
            ids = tokens[begin[:, None] + np.minimum(place, count[:, None] - 1)]
        else:
            valid = None
            # The first tokens of each row, as a view and one copy: faster than an index for each token.
            windows = np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens, strides=tokens.strides * 2)
            ids = windows[begin]
        ids -= np.arange(0, group.size, group.shape[-1])[:, None]
        batches.append((ids, valid))
    return batches


def _count(maps: np.ndarray) -> np.ndarray:
    """True entries along the last axis: int64. Four times faster than a sum of booleans, which are widened one by one."""
    narrow = np.uint16 if maps.shape[-1] < 2**16 else np.uint32
    return maps.view(np.uint8).sum(axis=-1, dtype=narrow).astype(np.int64)


def _random_subsets(maps: np.ndarray, counts: np.ndarray, wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A uniformly random subset of `wanted` int64 [G, B] of the `counts` True tokens of each row: bool [G, B, N] -> same.

    Sorting random numbers would take most of the time of a batch. Instead each token stays by a random octet of its own, with
    about the right chance, and then as many tokens as are too many (too few), drawn without replacement, leave (come back).
    No token is preferred at any point, so that all subsets are equally likely, whatever the rounding of the chance. Context and
    target share the octets: they have no token in common.
    """
    num_tokens = maps.shape[-1]
    octet_words = -(-num_tokens // 8)
    octets = splitmix(keys, np.arange(octet_words, dtype=np.uint64)).astype("<u8", copy=False).view(np.uint8)[:, :num_tokens]
    chance = np.minimum(256 * wanted // counts, 255).astype(np.uint8)  # 255 keeps all: only then may all be wanted
    chosen = np.less_equal(octets, chance[..., None], out=np.empty(maps.shape, dtype=bool))
    chosen &= maps
    kept = _count(chosen)
    missing = kept < wanted
    pool = chosen ^ missing[..., None]
    pool &= maps
    pool_sizes = np.where(missing, counts - kept, kept)

    def words(count: int) -> np.ndarray:
        return splitmix(keys, np.arange(octet_words, octet_words + count, dtype=np.uint64))

    picks = _picks(pool_sizes.ravel(), np.abs(kept - wanted).ravel(), maps.shape, words)
    chosen.reshape(-1)[np.flatnonzero(pool)[picks]] ^= True
    return chosen


def _picks(pool_sizes: np.ndarray, wanted: np.ndarray, shape: tuple[int, ...], words: Callable[[int], np.ndarray]) -> np.ndarray:
    """Draws `wanted` int64 [G * B] different members of each pool: positions int64 in the list of all pools' members.

    Each pool takes the first different ones of an endless row of draws. `shape` is (G, B, N); `words(n)` gives the first
    uint64 [B, n] of those rows, the groups' words alternating.
    """
    groups, batch, _ = shape
    count = int(wanted.max()) + 8
    while True:
        bits = words(count * groups).reshape(batch, count, groups).transpose(2, 0, 1).reshape(-1, count)
        ranks = ((bits >> np.uint64(32)).astype(np.int64) * pool_sizes[:, None]) >> 32
        # Sorted by rank and then by draw, the first of equal ranks was drawn first.
        by_rank = np.sort(ranks * count + np.arange(count), axis=1)
        repeated = np.zeros(ranks.shape, dtype=bool)
        repeated[:, 1:] = by_rank[:, 1:] // count == by_rank[:, :-1] // count
        new = np.empty_like(repeated)
        np.put_along_axis(new, by_rank % count, ~repeated, axis=1)
        taken = new & (new.cumsum(axis=1) <= wanted[:, None])
        if taken.sum() == wanted.sum():
            return (ranks + (pool_sizes.cumsum() - pool_sizes)[:, None])[taken]
        count *= 2
