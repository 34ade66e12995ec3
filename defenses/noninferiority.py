"""Whether a change has cost robust accuracy, told from paired outcomes on the same examples.

RiFT allows robust accuracy to fall by 0.1 points (arXiv 2308.02533, sec. 4, step 3). On a validation split that is a
handful of images, far inside the sampling error, so a plain comparison of two accuracies is close to a coin toss. A
non-inferiority test asks for evidence instead: it must reject, at a stated level, that the true fall is the margin or
more. This is the score test for paired proportions (Nam 1997; Tango 1998; the references are from memory, the formula
is derived at `score_statistic`). Unlike a normal interval it knows that no differing pair at all is no proof: at level
0.05 it then asks for about 2.7 / margin examples.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor


def is_noninferior(before: Tensor, after: Tensor, *, margin: float, level: float) -> bool:
    """Whether the share of true outcomes has fallen by less than `margin`, at the one-sided `level`.

    Args:
        before: boolean (N,), the outcomes that must not be lost.
        after: boolean (N,), on the same examples.
        margin: the fall that must be ruled out, a share in (0, 1).
        level: the probability to say yes although the true fall is the margin.

    >>> import torch
    >>> kept = torch.ones(300, dtype=torch.bool)
    >>> [is_noninferior(kept[:count], kept[:count], margin=0.01, level=0.05) for count in (200, 300)]
    [False, True]
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    return score_statistic(lost, won, len(before), margin=margin) >= NormalDist().inv_cdf(1 - level)


def score_statistic(lost: int, won: int, pairs: int, *, margin: float) -> float:
    """The score statistic of H0: P(lost) - P(won) >= d, standard normal at its border and large away from it.

    At the border P(lost) = q + d and P(won) = q, and the log-likelihood lost log(q + d) + won log q +
    same log(1 - d - 2q), with same = N - lost - won, has its maximum at the larger root of
    2N q^2 + ((2N - lost + won) d - lost - won) q - won d (1 - d) = 0. There won - lost has mean -N d and variance
    N (2q + d (1 - d)).

    Args:
        lost: pairs that were true and no longer are.
        won: pairs that are true and were not.
        pairs: all pairs, N.
        margin: d, in (0, 1).

    Returns:
        (won - lost + N d) over that deviation, minus infinity without pairs.
    """
    if pairs == 0:
        return -math.inf
    quadratic, constant = 2 * pairs, -won * margin * (1 - margin)
    linear = (2 * pairs - lost + won) * margin - lost - won
    root = math.sqrt(max(0.0, linear * linear - 4 * quadratic * constant))
    nuisance = (root - linear) / (2 * quadratic)
    return (won - lost + pairs * margin) / math.sqrt(pairs * (2 * nuisance + margin * (1 - margin)))
