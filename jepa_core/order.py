"""Which video each sample shows: a pure function of (seed, sample number), however a run is cut into steps, units and workers.

Every dataset is walked epoch by epoch, each video exactly once per epoch, in a fresh random order. Several datasets are mixed by
weight with exact quotas. Nothing is kept: order, mixture and resuming are arithmetic on the number. Numpy only.

Legend: B samples of a unit, D datasets, n places of an epoch.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, lcm
from typing import NamedTuple

import numpy as np

from jepa_core.sampling import Stream, generator

ROUNDS = 12
"""Of the Feistel network. With 6, neighbours in sets of a dozen or two told it from chance; with 8, the orders of five."""
_BLOCK = 1 << 15
"""Places permuted at once: their intermediate numbers stay in the processor's cache."""
LONGEST_PERIOD = 10_000
"""Samples after which the pattern of a mixture repeats; weights are rounded to as many parts."""


def epoch_order(seed: int, dataset: int, epoch: int, size: int) -> np.ndarray:
    """Rows of a dataset in the order in which one epoch shows them: a permutation, int64 [size]."""
    return permuted(np.arange(size), size, seed, dataset, epoch)


def permuted(places: np.ndarray, size: int, seed: int, *counters: int) -> np.ndarray:
    """Where a random permutation of range(size) takes some places: int64 [n] -> int64 [n], without a table of it.

    `seed` and up to three counters choose the permutation. A Feistel network permutes the a x b >= size cells of a rectangle;
    what falls outside range(size) is sent through again until it falls inside ("cycle walking": Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"). Raises ValueError for a place outside range(size).
    """
    places = np.asarray(places, dtype=np.int64)
    if places.size and (places.min() < 0 or places.max() >= size):
        raise ValueError(f"places lie in {places.min()}..{places.max()}, not in range({size})")
    out = np.empty(places.size, dtype=np.int64)
    keys = _round_keys(seed, *counters)
    for start in range(0, places.size, _BLOCK):
        cells = _walk(places.reshape(-1)[start : start + _BLOCK].astype(np.uint64), size, keys)
        out[start : start + _BLOCK] = cells.view(np.int64)
    return out.reshape(places.shape)


def _walk(cells: np.ndarray, size: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    cells = _feistel(cells, rows, columns, keys)
    outside = np.flatnonzero(cells >= np.uint64(size))
    while outside.size:  # at most one cell in `columns` is outside
        again = _feistel(cells[outside], rows, columns, keys)
        cells[outside] = again
        outside = outside[again >= np.uint64(size)]
    return cells


def _feistel(cells: np.ndarray, rows: int, columns: int, keys: tuple[np.uint64, ...]) -> np.ndarray:
    """Each round moves one coordinate by a random function of the other, so it can be undone: uint64 [n] -> uint64 [n]."""
    row, column = cells // np.uint64(columns), cells % np.uint64(columns)
    for number, key in enumerate(keys):
        moved, fixed, extent = (column, row, np.uint64(columns)) if number % 2 else (row, column, np.uint64(rows))
        moved += _below(fixed ^ key, extent)
        moved -= (moved >= extent) * extent
    return row * np.uint64(columns) + column


def _below(z: np.ndarray, extent: np.uint64) -> np.ndarray:
    """A random number below `extent` < 2**32 for each word: SplitMix64's finaliser, its high half scaled. Overwrites z."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z >>= np.uint64(32)
    z *= extent
    z >>= np.uint64(32)
    return z


@lru_cache(maxsize=1024)
def _round_keys(seed: int, *counters: int) -> tuple[np.uint64, ...]:
    return tuple(generator(seed, Stream.ORDER, *counters).integers(0, 2**64, ROUNDS, dtype=np.uint64))


class DatasetSize(NamedTuple):
    """What the order needs to know of a dataset: videos, share of the samples, and its group of equal clip length."""

    size: int
    weight: float
    group: int


class Draw(NamedTuple):
    """Samples and the videos they show, int64 [B] each: `row` of the dataset's catalog order stands at `place` of its `epoch`."""

    sample: np.ndarray
    dataset: np.ndarray
    epoch: np.ndarray
    place: np.ndarray
    row: np.ndarray


class SamplePlan:
    """The order of a run's samples. Unit u holds samples u * b to (u + 1) * b - 1, all from datasets of one group.

    Groups share the units, and the datasets of a group share its samples, both in a fixed pattern that spreads each evenly and
    repeats after at most LONGEST_PERIOD. So each has its exact share of every period, and how many samples of a dataset come
    before one is a division and a look-up. Raises ValueError for empty datasets, weights that are not positive, or groups that
    do not count from 0.
    """

    def __init__(self, seed: int, datasets: Sequence[DatasetSize], samples_per_unit: int) -> None:
        groups = sorted({dataset.group for dataset in datasets})
        if groups != list(range(len(groups))) or not groups or samples_per_unit < 1:
            raise ValueError(f"groups {groups} must count from 0, and units of {samples_per_unit} samples have at least one")
        for dataset in datasets:
            if dataset.size < 1 or not 0 < dataset.weight < float("inf"):
                raise ValueError(f"a dataset needs at least one video and a positive weight: {dataset}")
        self.seed, self.datasets, self.samples_per_unit = seed, tuple(datasets), samples_per_unit
        members = [[d for d, dataset in enumerate(datasets) if dataset.group == group] for group in groups]
        self._members = [np.array(ids) for ids in members]
        self._within = [_Mixture([datasets[d].weight for d in ids]) for ids in members]
        # Sums of decimals as people write them, not of their nearest binary fractions: 0.1 + 0.2 is 0.3.
        self._groups = _Mixture([sum(Fraction(str(datasets[d].weight)) for d in ids) for ids in members])

    def unit(self, u: int) -> tuple[int, Draw]:
        """The group of unit u, and its samples."""
        group = int(self._groups.part(np.array([u]))[0])
        return group, self.samples(u * self.samples_per_unit, self.samples_per_unit)

    def samples(self, first: int, count: int) -> Draw:
        """Samples first to first + count - 1."""
        sample = np.arange(first, first + count)
        unit, inside = sample // self.samples_per_unit, sample % self.samples_per_unit
        group, number = self._groups.split(unit)
        number = number * self.samples_per_unit + inside  # within the group
        dataset, nth = np.empty_like(sample), np.empty_like(sample)
        for g in np.unique(group):
            of_group = np.flatnonzero(group == g)
            part, nth[of_group] = self._within[g].split(number[of_group])
            dataset[of_group] = self._members[g][part]
        epoch, place, row = np.empty_like(sample), np.empty_like(sample), np.empty_like(sample)
        for d in np.unique(dataset):
            of_dataset = np.flatnonzero(dataset == d)
            epoch[of_dataset], place[of_dataset] = np.divmod(nth[of_dataset], self.datasets[d].size)
            for e in np.unique(epoch[of_dataset]):
                walked = of_dataset[epoch[of_dataset] == e]
                row[walked] = permuted(place[walked], self.datasets[d].size, self.seed, int(d), int(e))
        return Draw(sample, dataset, epoch, place, row)

    def replacement(self, n: int, attempt: int) -> Draw:
        """What sample n shows, as a Draw of one, when its own video cannot be read; `attempt` is 1, 2, ...

        Drawn evenly from the same dataset, so that the mixture is kept, by (seed, n, attempt) alone.
        """
        (dataset,), (epoch,) = (draw := self.samples(n, 1)).dataset, draw.epoch
        size = self.datasets[dataset].size
        place = generator(self.seed, Stream.REPLACEMENT, n, attempt).integers(size, size=1)
        row = permuted(place, size, self.seed, int(dataset), int(epoch))
        return draw._replace(place=place, row=row)


class _Mixture:
    """Numbers 0, 1, 2, ... dealt to parts by weight, in a pattern that repeats."""

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        quotas = _quotas(weights)
        self.period = sum(quotas)
        self.quotas = np.array(quotas)
        # The k-th of q members of a part belongs at (k + 1/2) / q of the period.
        where = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
        parts = np.repeat(np.arange(len(quotas)), quotas)
        self._pattern = parts[np.argsort(where, kind="stable")]
        self._before = np.empty(self.period, dtype=np.int64)  # of the same part within the period
        for part, quota in enumerate(quotas):
            self._before[self._pattern == part] = np.arange(quota)

    def part(self, numbers: np.ndarray) -> np.ndarray:
        """To whom numbers int64 [n] are dealt: int64 [n]."""
        return self._pattern[numbers % self.period]

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part, how many of its own come before): int64 [n] each."""
        period, at = np.divmod(numbers, self.period)
        part = self._pattern[at]
        return part, period * self.quotas[part] + self._before[at]


def _quotas(weights: Sequence[float | Fraction]) -> list[int]:
    """Whole numbers in the proportion of the weights, at least 1 each; rounded where their sum would pass LONGEST_PERIOD."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    whole = [number // gcd(*whole) for number in whole]
    if sum(whole) <= LONGEST_PERIOD:
        return whole
    shares = [Fraction(number * LONGEST_PERIOD, sum(whole)) for number in whole]
    quotas = [max(1, int(share)) for share in shares]
    for part in sorted(range(len(shares)), key=lambda i: int(shares[i]) - shares[i])[: max(0, LONGEST_PERIOD - sum(quotas))]:
        quotas[part] += 1
    return quotas
