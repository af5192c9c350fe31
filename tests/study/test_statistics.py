"""Statistics over seeds, against published tables and against scipy."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedloom.study.statistics import holm, paired, summary, t_cdf, t_quantile

# Two-sided 95 % and 99 %: any table of Student's t.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 9: (2.262, 3.250),
         29: (2.045, 2.756), 120: (1.980, 2.617)}  # fmt: skip


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_tables(freedom: int) -> None:
    assert round(t_quantile(0.975, freedom), 3) == TABLE[freedom][0]
    assert round(t_quantile(0.995, freedom), 3) == TABLE[freedom][1]


@given(st.floats(-50, 50), st.integers(1, 400))
@example(5.960464477539063e-08, 5)  # near the middle, where 1 - x loses the digits of t
@example(-1e-300, 3)
def test_the_distribution_is_that_of_scipy(t: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-8, abs=1e-12)


@given(st.floats(1e-6, 1 - 1e-6), st.integers(1, 400))
def test_quantiles_are_those_of_scipy(probability: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 2), (1.0, 2), (0.9, 0)])
def test_there_is_no_quantile_outside(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        t_quantile(probability, freedom)


def test_a_summary_divides_by_n_minus_1_and_says_n() -> None:
    assert summary([]) == (0, None, None)
    assert summary([0.25]) == (1, 0.25, None)
    n, mean, std = summary([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (n, mean) == (8, 5.0)
    assert std == pytest.approx(math.sqrt(32 / 7))
    assert summary([0.1, 0.1, 0.1]).std == 0.0  # and not the rounding of their mean


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=8))
def test_paired_differences_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    each = [x - y for x, y in pairs]
    if max(each) - min(each) < 1e-6:
        return
    found = paired(dict(enumerate(x for x, _ in pairs)), dict(enumerate(y for _, y in pairs)))
    test = stats.ttest_rel([x for x, _ in pairs], [y for _, y in pairs])
    low, high = test.confidence_interval(0.95)
    assert found is not None and found.n == len(pairs)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, test.pvalue), rel=1e-6, abs=1e-9)
    assert found.resolved == (not low <= 0 <= high)


def test_only_seeds_that_both_have_are_compared() -> None:
    found = paired({0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 2: 0.6, 7: 0.0})
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.2))
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_interval_and_resolves_nothing() -> None:
    found = paired({0: 0.9}, {0: 0.1})
    assert found == (1, 0.8, None, None, None)
    assert found is not None and not found.resolved


def test_differences_without_spread() -> None:
    same = paired({0: 0.3, 1: 0.3, 2: 0.3}, {0: 0.3, 1: 0.3, 2: 0.3})
    assert same == (3, 0.0, 0.0, 0.0, 1.0)
    assert same is not None and not same.resolved
    # 0.4 - 0.3 and 0.3 - 0.2 differ in their last digits only
    apart = paired({0: 0.4, 1: 0.3}, {0: 0.3, 1: 0.2})
    assert apart is not None and apart.low == apart.high == apart.mean == pytest.approx(0.1)
    # the same in both by chance is not rare where scores come of few rows: a sign test, 2 x 0.5^n
    assert apart.p == pytest.approx(0.5) and not apart.resolved
    six = paired(dict.fromkeys(range(6), 0.4), dict.fromkeys(range(6), 0.3))
    assert six is not None and six.p == pytest.approx(2 / 64) and six.resolved


def test_a_small_spread_around_0_is_not_resolved_and_a_large_difference_is() -> None:
    noise = paired({0: 0.51, 1: 0.49, 2: 0.50}, {0: 0.50, 1: 0.50, 2: 0.50})
    assert noise is not None and noise.p == pytest.approx(1.0) and not noise.resolved
    clear = paired({0: 0.80, 1: 0.82, 2: 0.81}, {0: 0.10, 1: 0.11, 2: 0.12})
    assert clear is not None and clear.resolved and clear.p is not None and clear.p < 0.001
    # a width by hand: differences 0.1, 0.2, 0.3 have std 0.1, hence half a width of 4.303 x 0.1 / sqrt(3)
    hand = paired({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert hand is not None and hand.high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


def test_holm_is_as_published() -> None:
    # Holm 1979 in any textbook: sorted p times (m, m - 1, ...), never decreasing, at most 1
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([None, 0.03, None]) == [None, 0.03, None]
    assert holm([]) == []
