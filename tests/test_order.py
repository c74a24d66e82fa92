"""Which video a sample shows: every video once per epoch, exact shares, the same however the run is cut."""

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_core.order import LONGEST_PERIOD, DatasetSize, SamplePlan, epoch_order, permuted

GOLDEN_ORDER = [3, 1, 4, 8, 2, 6, 0, 9, 7, 5]
GOLDEN_SAMPLES = [(2, 1, 0, 3), (2, 1, 1, 1), (1, 1, 2, 0), (0, 2, 1, 1), (0, 2, 2, 4), (1, 2, 0, 1), (0, 2, 3, 2), (0, 2, 4, 0)]
"""(dataset, epoch, place, row) each"""
SEEDS = st.integers(0, 2**63)


@given(seed=SEEDS, size=st.integers(1, 3000), dataset=st.integers(0, 20), epoch=st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_a_permutation(seed, size, dataset, epoch):
    np.testing.assert_array_equal(np.sort(epoch_order(seed, dataset, epoch, size)), np.arange(size))


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**15 + 1, 10**5 + 3, 2**20])
def test_large_ones_too_and_any_part_of_them_alone(size):
    whole = epoch_order(5, 1, 2, size)
    assert np.bincount(whole, minlength=size).max() == 1
    places = np.random.default_rng(0).integers(0, size, 1000)
    np.testing.assert_array_equal(permuted(places, size, 5, 1, 2), whole[places])


def test_sizes_beyond_memory_stay_in_range_and_apart():
    size = 10**15 + 7
    rows = permuted(np.concatenate([np.arange(10**5), size - 1 - np.arange(10**5)]), size, 3)
    assert rows.min() >= 0
    assert rows.max() < size
    assert len(np.unique(rows)) == 2 * 10**5


def test_places_outside_are_refused():
    for place in (-1, 10):
        with pytest.raises(ValueError, match=r"not in range\(10\)"):
            permuted(np.array([3, place]), 10, 0)


def test_orders_are_the_same_on_every_machine():
    assert epoch_order(0, 0, 0, 10).tolist() == GOLDEN_ORDER
    plan = SamplePlan(7, [DatasetSize(5, 2.0, 0), DatasetSize(3, 1.0, 0), DatasetSize(4, 1.0, 1)], 2)
    assert [tuple(map(int, sample[1:])) for sample in zip(*plan.samples(20, 8), strict=True)] == GOLDEN_SAMPLES


def excess(counts: np.ndarray, expected: float, free: int) -> float:
    """Chi-squared against equal counts, in standard deviations above its mean."""
    return (((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_orders_of_few_videos_are_equally_likely(size):
    seen = Counter(tuple(epoch_order(seed, 0, 0, size)) for seed in range(4000))
    counts = np.array([seen[order] for order in itertools.permutations(range(size))])
    assert excess(counts, 4000 / len(counts), len(counts) - 1) < 5


@pytest.mark.parametrize("size", [12, 31])
def test_places_and_neighbours_are_left_to_chance(size):
    orders = np.stack([epoch_order(seed, 0, 0, size) for seed in range(4000)])
    cells = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    assert excess(cells, 4000 / size, (size - 1) ** 2) < 5
    steps = np.bincount((np.diff(orders) % size).ravel(), minlength=size)[1:]
    assert excess(steps, 4000.0, size - 2) < 5
    fixed = (orders == np.arange(size)).sum(axis=1)  # one on average, with variance one
    assert abs(fixed.mean() - 1) < 5 / math.sqrt(4000)
    assert abs(fixed.var() - 1) < 0.2


def test_epochs_datasets_and_seeds_have_orders_of_their_own():
    size = 20_000
    orders = [epoch_order(*key, size) for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**40, 0, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.05


def test_ten_million_places_take_seconds():
    used = time.process_time()
    epoch_order(0, 0, 0, 10**7)
    assert time.process_time() - used < 15  # 1.1 s on an idle core


# Mixtures.

DATASETS = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.2, 0.25, 0.5, 1.0, 1.5, 3.0, 7.0]), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


def plan_of(datasets, samples_per_unit, seed=0):
    groups = sorted({group for _, _, group in datasets})
    return SamplePlan(seed, [DatasetSize(size, weight, groups.index(g)) for size, weight, g in datasets], samples_per_unit)


@given(datasets=DATASETS, per_unit=st.integers(1, 6), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_every_dataset_is_walked_epoch_by_epoch(datasets, per_unit, seed):
    plan = plan_of(datasets, per_unit, seed)
    draw = plan.samples(0, 400)
    for number, (size, _, _) in enumerate(datasets):
        mine = draw.dataset == number
        count = np.arange(mine.sum())
        np.testing.assert_array_equal(draw.epoch[mine], count // size)
        np.testing.assert_array_equal(draw.place[mine], count % size)
        for epoch in range(len(count) // size):
            rows = draw.row[mine][epoch * size : (epoch + 1) * size]
            np.testing.assert_array_equal(rows, epoch_order(seed, number, epoch, size))


@given(datasets=DATASETS, per_unit=st.integers(1, 6), first=st.integers(0, 10**12), count=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_units_and_samples_agree_wherever_one_begins(datasets, per_unit, first, count):
    plan = plan_of(datasets, per_unit)
    units = range(first // per_unit, (first + count - 1) // per_unit + 1)
    drawn = [plan.unit(u) for u in units]
    for group, draw in drawn:
        assert {plan.datasets[d].group for d in draw.dataset} == {group}
        assert len(draw.sample) == per_unit
    skip = first - units[0] * per_unit
    for field, whole in enumerate(plan.samples(first, count)):
        parts = np.concatenate([draw[field] for _, draw in drawn])
        np.testing.assert_array_equal(parts[skip : skip + count], whole)


@pytest.mark.parametrize("weights", [(1, 3), (0.1, 0.2, 0.7), (5, 5), (1, 1, 1), (0.5, 1, 2.25, 10)])
def test_shares_are_exact_in_every_period_and_even_within(weights):
    exact = [Fraction(str(weight)) for weight in weights]
    plan = SamplePlan(0, [DatasetSize(1000, weight, 0) for weight in weights], 4)
    period = math.lcm(*((w / sum(exact)).denominator for w in exact))
    draw = plan.samples(10**9 * period, 3 * period)
    for start in (0, period // 3, period, 2 * period):
        counts = np.bincount(draw.dataset[start : start + period], minlength=len(weights))
        assert counts.tolist() == [int(w / sum(exact) * period) for w in exact]
    behind = [np.cumsum(draw.dataset == d) - np.arange(1, 3 * period + 1) * float(w / sum(exact)) for d, w in enumerate(exact)]
    assert np.abs(behind).max() < len(weights) / 2 + 1e-9


def test_groups_share_the_units_by_their_weights_together():
    plan = SamplePlan(0, [DatasetSize(9, 0.1, 0), DatasetSize(9, 0.2, 1), DatasetSize(9, 0.2, 0), DatasetSize(9, 0.5, 1)], 8)
    groups = [plan.unit(u)[0] for u in range(100)]
    assert Counter(groups) == {0: 30, 1: 70}
    draw = plan.samples(0, 10 * 3 * 7 * 8)
    assert (np.bincount(draw.dataset) / len(draw.dataset)).tolist() == pytest.approx([0.1, 0.2, 0.2, 0.5])


def test_weights_that_never_repeat_are_rounded():
    weights = (math.pi, math.e, 1e-9)
    plan = SamplePlan(0, [DatasetSize(10**6, weight, 0) for weight in weights], 1)
    counts = np.bincount(plan.samples(0, LONGEST_PERIOD).dataset)
    assert counts.sum() == LONGEST_PERIOD
    np.testing.assert_allclose(counts / LONGEST_PERIOD, np.array(weights) / sum(weights), atol=2 / LONGEST_PERIOD)
    assert counts[2] == 1


def test_replacements_keep_the_mixture_and_vary():
    plan = SamplePlan(3, [DatasetSize(1000, 1.0, 0), DatasetSize(50, 1.0, 1)], 4)
    for n in range(64):
        draw = plan.samples(n, 1)
        others = [plan.replacement(n, attempt) for attempt in range(1, 6)]
        assert {int(other.dataset[0]) for other in others} == {int(draw.dataset[0])}
        assert len({int(other.row[0]) for other in others}) > 1
        size, key = plan.datasets[draw.dataset[0]].size, (3, int(draw.dataset[0]), int(draw.epoch[0]))
        assert [other.row for other in others] == [permuted(other.place, size, *key) for other in others]
    again = SamplePlan(3, plan.datasets, 4)
    assert plan.replacement(17, 2) == again.replacement(17, 2)
    rows = np.array([plan.replacement(n, 1).row[0] for n in range(4, 8 * 2000, 8)])
    assert excess(np.bincount(rows, minlength=50), len(rows) / 50, 49) < 5


@pytest.mark.parametrize(
    "datasets", [[], [(0, 1.0, 0)], [(5, 0.0, 0)], [(5, -1.0, 0)], [(5, math.inf, 0)], [(5, math.nan, 0)], [(5, 1.0, 1)]]
)
def test_datasets_that_make_no_sense_are_refused(datasets):
    with pytest.raises(ValueError, match=r"at least one|count from 0"):
        SamplePlan(0, [DatasetSize(*dataset) for dataset in datasets], 1)
