"""Means over seeds, paired differences with their interval, and the correction for many comparisons.

Student's t is computed here from its closed form, so that no statistics package is needed for one quantile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["LEVEL", "Paired", "Summary", "holm", "paired", "summary", "t_cdf", "t_quantile"]

LEVEL = 0.95


class Summary(NamedTuple):
    """Values of several seeds."""

    n: int
    mean: float | None
    std: float | None  # of a sample, divided by n - 1; None for n < 2


class Paired(NamedTuple):
    """The difference of two series that share their seeds."""

    n: int
    mean: float
    low: float | None  # None for n < 2
    high: float | None
    p: float | None  # two-sided, of the mean being 0

    @property
    def resolved(self) -> bool:
        """The interval does not contain 0; one of width 0 only if the sign test says so too."""
        if self.low is None or self.high is None or self.p is None or self.low <= 0 <= self.high:
            return False
        return self.low < self.high or self.p < 1 - LEVEL


def summary(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation.

    >>> summary([1.0, 2.0, 4.0])
    Summary(n=3, mean=2.3333333333333335, std=1.5275252316519468)
    """
    n = len(values)
    if n == 0:
        return Summary(0, None, None)
    mean = math.fsum(values) / n
    return Summary(n, mean, _std(values, mean) if n > 1 else None)


def _std(values: Sequence[float], mean: float) -> float:
    """Sample standard deviation; 0 where the values differ by no more than their own rounding."""
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return std if std > 4 * math.ulp(max(map(abs, values), default=0.0)) else 0.0


def paired(a: Mapping[Any, float], b: Mapping[Any, float], level: float = LEVEL) -> Paired | None:
    """The mean of a less b over the seeds that both have, with the interval and the p value of a paired t-test.

    The same seed has the same data, split and order of rows in both, so what seeds change in both alike drops out.
    Differences that are the same for every seed have an interval of width 0, which scores of few rows give by chance:
    there p is that of the sign test, which needs 6 seeds to be below 0.05. None when no seed is in both.
    """
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        return None
    each = [a[seed] - b[seed] for seed in seeds]
    n, mean = len(each), math.fsum(each) / len(each)
    if n == 1:
        return Paired(1, mean, None, None, None)
    # a and b round before they are subtracted, so differences as small as that are none
    scale = 4 * math.ulp(max(max(abs(a[seed]), abs(b[seed])) for seed in seeds))
    error = _std(each, mean) / math.sqrt(n)
    if error <= scale:
        mean = 0.0 if abs(mean) <= scale else mean
        return Paired(n, mean, mean, mean, 2 * 0.5**n if mean else 1.0)
    half = t_quantile(0.5 + level / 2, n - 1) * error
    p = min(1.0, 2 * t_cdf(-abs(mean) / error, n - 1))
    return Paired(n, mean, mean - half, mean + half, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values: those at most alpha are rejected together with a family-wise error of at most alpha.

    None (a comparison without a test) stays None and does not count.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, None, 0.06]
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, (len(known) - rank) * p))
        adjusted[place] = least
    return adjusted


# ---- Student's t -----------------------------------------------------------------------------------------------------


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with this many degrees of freedom."""
    whole = freedom + t * t
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / whole, t * t / whole)
    return tail if t < 0 else 1 - tail


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability.

    >>> round(t_quantile(0.975, 2), 3)
    4.303
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"no quantile {probability} with {freedom} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    wanted = 1 - probability  # of the upper tail, where the cdf keeps its digits
    low, high = 0.0, 1.0
    while t_cdf(-high, freedom) > wanted:
        low, high = high, 2 * high
    while (middle := 0.5 * (low + high)) not in (low, high):
        low, high = (middle, high) if t_cdf(-middle, freedom) > wanted else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """The regularised incomplete beta function at x, by its continued fraction (Abramowitz and Stegun 26.5.8).

    `y` is 1 - x, given apart because it may have digits that the difference would lose.
    """
    if x <= 0.0 or y <= 0.0:
        return float(y <= 0.0)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - _incomplete_beta(b, a, y, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 500):  # Lentz's method
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + term * d) or tiny)
            c = (1 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
