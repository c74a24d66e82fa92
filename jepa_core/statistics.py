"""Means, differences and shares with the uncertainty that belongs to them. No tensors, no scipy.

Source of the formulas: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4 (Student's t of whole degrees of freedom, finite sums);
Wilson 1927, "Probable inference" (shares); Fisher 1935 (sign flips); Efron 1979 (bootstrap, percentiles).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

MAX_SIGN_FLIPS = 20
"""Pairs up to which all sign flips, 2**n, are counted."""


@dataclass(frozen=True)
class Interval:
    """A mean of n values and the confidence interval around it."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Interval):
    """A mean difference of n pairs, with two-sided p-values."""

    p_t: float
    """Of the paired t test: assumes differences that are normal."""
    p_sign_flip: float | None
    """Of the exact permutation test: assumes only that, without an effect, a difference is as likely as its opposite. It cannot
    be below 2 / 2**n: with 5 seeds 0.0625 at best. None above MAX_SIGN_FLIPS pairs."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of at least 2 values, one for each seed, with Student's interval. Raises ValueError for fewer, or for NaN."""
    values = [float(value) for value in values]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least 2 finite values, got {values}")
    mean = fmean(values)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Difference:
    """First minus second, paired by seed. Raises ValueError where they do not pair, for fewer than 2 pairs and for NaN."""
    if len(first) != len(second):
        raise ValueError(f"paired values must be as many: {len(first)} and {len(second)}")
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    interval = mean_interval(differences, confidence)
    error = stdev(differences) / math.sqrt(len(differences))
    p_t = 2 * t_cdf(-abs(interval.mean) / error, len(differences) - 1) if error else float(interval.mean == 0)
    p_flip = sign_flip_p(differences) if len(differences) <= MAX_SIGN_FLIPS else None
    return Difference(interval.mean, interval.low, interval.high, interval.n, p_t, p_flip)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of all 2**n choices of signs whose sum is at least as far from 0: two-sided, exact. At most MAX_SIGN_FLIPS values."""
    if len(differences) > MAX_SIGN_FLIPS:
        raise ValueError(f"{len(differences)} pairs are too many to count all sign flips: at most {MAX_SIGN_FLIPS}")
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    observed, slack = abs(sum(differences)), 1e-12 * sum(map(abs, differences))  # equal sums differ by rounding
    return float((np.abs(sums) >= observed - slack).mean())


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> Interval:
    """Accuracy of `correct` out of `total` rows with Wilson's score interval: stays within [0, 1], sound for few rows.

    It knows the chance of the test rows, not that of training. Raises ValueError for counts that are none.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} correct of {total} rows is no share")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), total)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], units: int, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The statistic of all units and the percentile interval of its values on units drawn with replacement.

    `statistic` takes numbers of units int64 [n], with repetitions. A unit is what was drawn independently (an episode, not its
    frames). Pass a difference of two statistics to pair them. With few units the interval is too narrow. Raises ValueError below
    2 units, and for values that are not finite.
    """
    if units < 2:
        raise ValueError(f"a bootstrap needs at least 2 units, got {units}")
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(units, size=units)) for _ in range(draws)]
    if not np.isfinite(values).all():
        raise ValueError("a bootstrap met values that are not finite: the statistic has no value on some of the draws")
    low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(statistic(np.arange(units)), float(low), float(high), units)


def t_cdf(t: float, freedom: int) -> float:
    """Probability that Student's t with a whole number of degrees of freedom is at most t. Raises ValueError below 1."""
    if freedom < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {freedom}")
    angle = math.atan2(abs(t), math.sqrt(freedom))
    cos = math.cos(angle)
    odd = freedom % 2
    term = cos if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for number in range(3 if odd else 2, freedom - 1, 2):
        term *= cos * cos * (number - 1) / number
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(probability: float, freedom: int) -> float:
    """The t below which Student's distribution has this probability, in (0, 1)."""
    if not 0 < probability < 1:
        raise ValueError(f"a quantile needs a probability in (0, 1), not {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, high * 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return middle
