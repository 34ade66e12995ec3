"""Intervals and tests for shares of examples: Wilson, Tango, exact McNemar, and bootstrap ranks over shared examples.

Wilson (1927) for one share; Horowitz and Manski (2000) for the interval of [certified, robust]; McNemar (1947), exact,
and Tango (1998) for two defenses on the same examples; the percentile bootstrap for ranks, as Hall and Miller (2009)
discuss it. All of them treat the examples as a random sample of a larger test set.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtri
from scipy.stats import binomtest

Flags = npt.NDArray[np.bool_]


class Paired(NamedTuple):
    """Two defenses on the same examples: how many each alone gets right, and the two-sided exact p-value."""

    only_first: int
    only_second: int
    p_value: float


class Difference(NamedTuple):
    """The first share less the second, with its confidence limits."""

    value: float
    low: float
    high: float


def wilson(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share; `trials` may be an effective number, and none give (0, 1).

    >>> tuple(round(limit, 3) for limit in wilson(8, 10))
    (0.49, 0.943)
    """
    if trials <= 0:
        return 0.0, 1.0
    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    share = successes / trials
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # At the ends the limits are exactly 0 and 1; rounding must not say otherwise.
    low = 0.0 if successes <= 0 else max(0.0, centre - half)
    high = 1.0 if successes >= trials else min(1.0, centre + half)
    return min(low, share), max(high, share)


def mean_interval(outcomes: Flags, *, confidence: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of (N, M) outcomes whose M columns are the same N examples under different conditions.

    The columns of one example agree more than chance would have it, so N x M outcomes are worth fewer independent ones.
    Their effective number is p(1 - p) / Var(mean), the variance taken over examples (Kish's design effect), kept within
    [N, N x M]; Wilson's interval at that number stays sound where a t-interval degenerates, at means of 0 and 1.
    """
    examples, conditions = outcomes.shape
    shares = outcomes.mean(axis=1)
    mean = float(shares.mean())
    effective = float(examples)
    if examples > 1 and 0 < mean < 1:
        variance = float(shares.var(ddof=1)) / examples
        most = float(examples * conditions)
        effective = most if variance == 0 else min(max(mean * (1 - mean) / variance, effective), most)
    return wilson(mean * effective, effective, confidence=confidence)


def sandwich_interval(certified: int, robust: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Limits that hold the whole interval of [certified, robust], and so the true robust accuracy wherever it lies.

    The true robust accuracy is only partially identified: the data bound it by two shares of the same examples. The
    lower limit of the first and the upper limit of the second miss with probability at most (1 - confidence) / 2 each,
    so together they hold both ends, whatever the dependence of the two shares (Bonferroni). The limits are the exact
    ones of Clopper and Pearson: Wilson's are right on average over both sides, but one side alone can miss twice as
    often as it says (Cai, "One-sided confidence intervals in discrete distributions", 2005), and here each end has one.

    Args:
        certified: how many examples are proven.
        robust: how many are proven or survived every attack.
        trials: how many examples there are.
        confidence: of the two limits together, at least.

    Source: Horowitz and Manski, "Nonparametric analysis of randomized experiments with missing covariate and outcome
    data" (JASA 2000), section 4; Imbens and Manski (Econometrica 2004) tell it from the shorter interval that holds
    any one point.

    >>> tuple(round(limit, 3) for limit in sandwich_interval(40, 60, 100))
    (0.303, 0.697)
    """
    tail = (1 - confidence) / 2
    low = 0.0 if certified == 0 else float(betaincinv(certified, trials - certified + 1, tail))
    high = 1.0 if robust == trials else float(betaincinv(robust + 1, trials - robust, 1 - tail))
    return low, high


def paired_difference(first: Flags, second: Flags, *, confidence: float = 0.95) -> Difference:
    """The difference of two shares of the same examples, boolean (N,) each, with Tango's score interval.

    It excludes zero exactly when McNemar's test without continuity correction rejects at 1 - confidence, and stays
    honest where the two differ on few examples or on none.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample
    design" (Statistics in Medicine 1998), section 3.

    >>> difference = paired_difference(np.array([True] * 6 + [False] * 4), np.array([True] * 3 + [False] * 7))
    >>> [round(number, 3) for number in difference]
    [0.3, -0.061, 0.603]
    """
    n = len(first)
    if n == 0:
        return Difference(0.0, -1.0, 1.0)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    quantile = float(ndtri(0.5 + confidence / 2))
    low = -_largest_difference(only_second, only_first, n, quantile)
    value = (only_first - only_second) / n
    return Difference(value, low, _largest_difference(only_first, only_second, n, quantile))


def _largest_difference(only_first: int, only_second: int, n: int, quantile: float) -> float:
    """The upper limit: where the score statistic of the observed difference falls to -quantile."""
    value = (only_first - only_second) / n
    if value == 1:
        return 1.0

    def excess(difference: float) -> float:
        # Twice n times the probability that only the second holds, by maximum likelihood under this difference.
        linear = -only_first - only_second + (2 * n - only_first + only_second) * difference
        constant = -only_second * difference * (1 - difference)
        doubled = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / 2
        variance = max(doubled + n * difference * (1 - difference), 0.0)
        return n * difference - (only_first - only_second) - quantile * math.sqrt(variance)

    # Where the two never differ the statistic is zero at the value itself too; the limit is the root beyond it.
    return float(brentq(excess, value + 1e-12, 1.0, xtol=1e-14))


def mcnemar_exact(first: Flags, second: Flags) -> Paired:
    """McNemar's exact test on paired outcomes, boolean (N,) each: a binomial test on the examples where they differ.

    >>> mcnemar_exact(np.array([True] * 6 + [False]), np.array([False] * 6 + [False])).p_value
    0.03125
    """
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    differing = only_first + only_second
    p_value = 1.0 if differing == 0 else float(binomtest(only_first, differing, 0.5).pvalue)
    return Paired(only_first, only_second, p_value)


def rank_intervals(outcomes: Flags, *, seed: int, draws: int = 2000, confidence: float = 0.95) -> list[tuple[int, int]]:
    """The interval of each defense's rank when the shared examples are drawn anew.

    Args:
        outcomes: (defenses, examples), true where a defense holds.
        seed: keys the draws, together with the table itself, so the same table always gives the same intervals.
        draws: how many bootstrap samples.
        confidence: of each defense's own interval; the intervals are not simultaneous.

    Returns:
        The best and the worst rank of each defense, 1 being the best; equal shares count as the better rank at the
        low end and as the worse rank at the high end.
    """
    defenses, examples = outcomes.shape
    if examples == 0:
        return [(1, defenses)] * defenses
    # Only the pattern of a column matters, and there are far fewer patterns than examples: draw how often each occurs.
    patterns, counts = np.unique(outcomes, axis=1, return_counts=True)
    packed = np.packbits(outcomes, axis=1).tobytes()
    key = hashlib.sha256(f"{seed} {defenses} {examples} ".encode() + packed).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    samples = generator.multinomial(examples, counts / examples, size=draws)
    scores = samples @ patterns.T.astype(np.int64)
    best = np.empty((draws, defenses), dtype=np.int64)
    worst = np.empty_like(best)
    for position in range(defenses):
        own = scores[:, position, None]
        best[:, position] = 1 + (scores > own).sum(axis=1)
        worst[:, position] = (scores >= own).sum(axis=1)
    tail = (1 - confidence) / 2
    low = np.quantile(best, tail, axis=0, method="inverted_cdf")
    high = np.quantile(worst, 1 - tail, axis=0, method="inverted_cdf")
    return [(int(start), int(end)) for start, end in zip(low, high, strict=True)]
