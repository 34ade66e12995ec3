"""Intervals and tests against statsmodels and scipy, and their coverage in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from robustboard.leaderboard.statistics import mcnemar_exact, mean_interval, rank_intervals, wilson


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
