"""Intervals and tests against statsmodels and scipy, and their coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binom, binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from robustboard.leaderboard.statistics import (
    mcnemar_exact,
    mean_interval,
    paired_difference,
    rank_intervals,
    sandwich_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 7), (505, 1000), (9999, 10000)]
)
def test_wilson_equals_statsmodels_and_scipy(successes: int, trials: int) -> None:
    ours = wilson(successes, trials)
    assert ours == pytest.approx(proportion_confint(successes, trials, method="wilson"), abs=1e-12)
    theirs = binomtest(successes, trials).proportion_ci(method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert wilson(successes, trials, confidence=0.8) == pytest.approx(
        proportion_confint(successes, trials, alpha=0.2, method="wilson"), abs=1e-12
    )


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_share_within_0_and_1(case: tuple[int, int]) -> None:
    successes, trials = case
    low, high = wilson(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == trials)


def test_wilson_knows_nothing_without_trials() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_equals_statsmodels(pairs: list[tuple[bool, bool]]) -> None:
    first, second = np.array(pairs).T
    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    ours = mcnemar_exact(first, second)
    expected = 1.0 if ours.only_first + ours.only_second == 0 else mcnemar(table, exact=True).pvalue
    assert ours.p_value == pytest.approx(expected, abs=1e-9)
    assert mcnemar_exact(second, first) == (ours.only_second, ours.only_first, ours.p_value)


def test_a_mean_over_identical_conditions_is_worth_one_condition() -> None:
    flags = np.arange(200)[:, None] < np.full(6, 130)
    assert mean_interval(flags) == pytest.approx(wilson(130, 200), abs=2e-4)


def test_independent_conditions_narrow_the_interval_of_a_mean() -> None:
    flags = np.random.default_rng(0).random((200, 9)) < 0.6
    low, high = mean_interval(flags)
    one_low, one_high = wilson(120, 200)
    assert (high - low) == pytest.approx((one_high - one_low) / 3, rel=0.2)


@pytest.mark.parametrize("value", [True, False])
def test_a_mean_at_the_end_keeps_an_honest_interval(value: bool) -> None:
    assert mean_interval(np.full((50, 10), value)) == wilson(50 * value, 50)


@pytest.mark.parametrize(("mean", "spread"), [(0.5, 4.0), (0.9, 2.0), (0.97, 1.0)])
def test_the_interval_of_a_mean_covers_in_simulation(mean: float, spread: float) -> None:
    rng = np.random.default_rng(1)
    hits, runs = 0, 400
    for _ in range(runs):
        chance = rng.beta(mean * spread, (1 - mean) * spread, size=(150, 1))
        low, high = mean_interval(rng.random((150, 10)) < chance)
        hits += low <= mean <= high
    # 95 % of 400 runs is 380, with a standard deviation of 4.4.
    assert hits >= 366


def test_clear_differences_give_certain_ranks() -> None:
    grid = np.arange(500)
    flags = np.stack([grid < 450, grid < 100, grid < 300])
    assert rank_intervals(flags, seed=0) == [(1, 1), (3, 3), (2, 2)]


def test_identical_defenses_share_their_rank_interval() -> None:
    flags = np.random.default_rng(0).random(300) < 0.5
    assert rank_intervals(np.stack([flags, flags, flags]), seed=0) == [(1, 3)] * 3


def test_rank_intervals_repeat_and_do_not_depend_on_the_order_of_examples() -> None:
    flags = np.random.default_rng(3).random((5, 400)) < np.array([[0.6], [0.58], [0.5], [0.52], [0.1]])
    intervals = rank_intervals(flags, seed=0)
    assert rank_intervals(flags, seed=0) == intervals
    assert all(1 <= low <= high <= 5 for low, high in intervals)
    assert intervals[4] == (5, 5)


def test_rank_intervals_cover_the_true_rank_in_simulation() -> None:
    chances = np.array([0.62, 0.60, 0.50, 0.40])
    rng = np.random.default_rng(5)
    hits = np.zeros(4)
    for run in range(120):
        flags = rng.random((4, 300)) < chances[:, None]
        for place, (low, high) in enumerate(rank_intervals(flags, seed=run, draws=300)):
            hits[place] += low <= place + 1 <= high
    assert (hits >= 120 * 0.9).all()


def test_without_shared_examples_every_rank_is_possible() -> None:
    assert rank_intervals(np.empty((3, 0), dtype=bool), seed=0) == [(1, 3)] * 3


@pytest.mark.parametrize(("share", "n"), [(0.02, 400), (0.3, 60), (0.5, 200), (0.85, 360), (0.97, 1000)])
def test_wilson_covers_nearly_as_often_as_it_says(share: float, n: int) -> None:
    """The exact coverage, a sum over all outcomes: near 95 %, as Brown, Cai and DasGupta (2001) found."""
    successes = np.arange(n + 1)
    limits = np.array([wilson(int(count), n) for count in successes])
    covered = (limits[:, 0] <= share) & (share <= limits[:, 1])
    assert 0.93 <= binom.pmf(successes, n, share)[covered].sum() <= 0.98


@pytest.mark.parametrize(("certified", "robust"), [(0.1, 0.6), (0.45, 0.5), (0.3, 0.9), (0.5, 0.5)])
@pytest.mark.parametrize("n", [60, 360])
def test_the_sandwich_interval_covers_both_ends_in_simulation(certified: float, robust: float, n: int) -> None:
    """With Wilson's limits the third case covered in 1848 of the 2000 runs with n = 60."""
    rng = np.random.default_rng(n)
    runs = 2000
    draws = rng.multinomial(n, [certified, robust - certified, 1 - robust], size=runs)
    hits = 0
    for proven, undecided, _ in draws:
        low, high = sandwich_interval(int(proven), int(proven + undecided), n)
        hits += low <= certified and robust <= high
    # At least 95 % of 2000 runs is 1900, with a standard deviation of 9.7.
    assert hits >= 1900 - 3 * 9.7


@given(st.floats(0.001, 0.999), st.integers(1, 300))
def test_each_end_of_the_sandwich_misses_at_most_half_of_five_percent(share: float, n: int) -> None:
    """The exact probability, a sum over all outcomes; no approximation is left to hide behind."""
    limits = np.array([sandwich_interval(count, count, n) for count in range(n + 1)])
    chance = binom.pmf(np.arange(n + 1), n, share)
    assert chance[limits[:, 0] > share].sum() <= 0.025 + 1e-9
    assert chance[limits[:, 1] < share].sum() <= 0.025 + 1e-9


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_the_sandwich_interval_is_the_outer_two_of_four_exact_limits(case: tuple[int, int, int]) -> None:
    certified, robust, n = min(case[:2]), max(case[:2]), case[2]
    theirs = [binomtest(count, n).proportion_ci(method="exact") for count in (certified, robust)]
    assert sandwich_interval(certified, robust, n) == pytest.approx((theirs[0].low, theirs[1].high), abs=1e-9)
    lower, upper = proportion_confint(np.array([certified, robust]), n, method="beta")
    assert sandwich_interval(certified, robust, n) == pytest.approx((lower[0], upper[1]), abs=1e-9)


def _pair(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


def _score_statistic(difference: float, only_first: int, only_second: int, n: int) -> float:
    """Tango's statistic with its nuisance parameter found by search, not by formula."""
    rest = n - only_first - only_second

    def unlikely(second: float) -> float:
        cells = np.array([second + difference, second, 1 - 2 * second - difference])
        return -float(xlogy([only_first, only_second, rest], np.clip(cells, 0, 1)).sum())

    ends = (max(0.0, -difference), (1 - difference) / 2)
    second = minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    variance = n * (2 * second + difference * (1 - difference))
    return (only_first - only_second - n * difference) / math.sqrt(variance)


@pytest.mark.parametrize("cells", [(20, 8, 3, 9), (0, 1, 1, 8), (40, 15, 0, 5), (100, 30, 25, 45), (5, 2, 9, 4)])
def test_the_limits_of_a_paired_difference_solve_the_score_equation(cells: tuple[int, int, int, int]) -> None:
    found = paired_difference(*_pair(*cells))
    n, z = sum(cells), float(norm.ppf(0.975))
    assert found.value == pytest.approx((cells[1] - cells[2]) / n)
    assert _score_statistic(found.low, cells[1], cells[2], n) == pytest.approx(z, abs=2e-3)
    assert _score_statistic(found.high, cells[1], cells[2], n) == pytest.approx(-z, abs=2e-3)


counts = st.integers(0, 80)


@given(counts, counts, counts, counts)
def test_a_paired_difference_agrees_with_mcnemars_test(
    both: int, only_first: int, only_second: int, neither: int
) -> None:
    first, second = _pair(both, only_first, only_second, neither)
    low, high = paired_difference(first, second)[1:]
    swapped = paired_difference(second, first)
    assert (low, high) == pytest.approx((-swapped.high, -swapped.low), abs=1e-9)
    assert -1 <= low <= (only_first - only_second) / max(len(first), 1) <= high <= 1
    if only_first + only_second:
        table = [[both, only_first], [only_second, neither]]
        p_value = mcnemar(table, exact=False, correction=False).pvalue
        if abs(p_value - 0.05) > 1e-6:
            assert (low > 0 or high < 0) == (p_value < 0.05)


def test_equal_outcomes_leave_a_difference_as_large_as_n_allows() -> None:
    flags = np.arange(50) < 20
    z2 = float(norm.ppf(0.975)) ** 2
    assert paired_difference(flags, flags) == pytest.approx((0, -z2 / (50 + z2), z2 / (50 + z2)))
    assert paired_difference(flags[:0], flags[:0]) == (0, -1, 1)


@pytest.mark.parametrize("chances", [(0.5, 0.1, 0.05, 0.35), (0.8, 0.03, 0.01, 0.16), (0.2, 0.3, 0.3, 0.2)])
@pytest.mark.parametrize("n", [60, 360])
def test_a_paired_difference_covers_in_simulation(chances: tuple[float, ...], n: int) -> None:
    rng = np.random.default_rng(2)
    truth = chances[1] - chances[2]
    hits, runs = 0, 1000
    for cells in rng.multinomial(n, chances, size=runs):
        _, low, high = paired_difference(*_pair(*cells))
        hits += low <= truth <= high
    # 95 % of 1000 runs is 950, with a standard deviation of 6.9.
    assert hits >= 950 - 4 * 6.9


def test_mcnemar_rejects_equal_defenses_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(4)
    rejected = sum(mcnemar_exact(rng.random(120) < 0.7, rng.random(120) < 0.7).p_value < 0.05 for _ in range(1000))
    # The exact test is conservative: at most 50 of 1000, and four standard deviations.
    assert rejected <= 50 + 4 * 6.9
