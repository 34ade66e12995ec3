"""The two features that a saliency map of pairs picks, without looking at all pairs.

JSMA (Papernot et al. 2016, arXiv 1511.07528, algorithm 3) changes the pair p, q of features that maximises
(a_p + a_q) (c_p + c_q) among the pairs where both sums are positive; a is the derivative of the target class, and c
the derivative of the other classes with the sign turned. All pairs of 3,072 features are 4.7 million for every image
and step, so the search here is pruned, and remains exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST = 1 << 22
"""Entries of the largest table of pair scores that is held at once: 16 MiB."""


def largest_pairs(gains: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """`best_pairs(gains, gains, free)`: where both derivatives are the same, the best pair is the two largest.

    The score is then (a_p + a_q)^2, which grows with the sum, and the sum is largest for the two largest features. No
    square is taken, so derivatives as small as float32 can hold are still told apart.

    Args:
        gains: a, (N, D).
        free: which features may be chosen, boolean (N, D); D is at least two.

    Returns:
        The features (N, 2), int64, and whether a pair was found, boolean (N,).

    >>> features, found = largest_pairs(torch.tensor([[1.0, 5.0, -2.0, 3.0]]), torch.ones(1, 4, dtype=torch.bool))
    >>> features.tolist(), found.tolist()
    ([[1, 3]], [True])
    """
    values, features = gains.masked_fill(~free, -math.inf).topk(2, dim=1)
    return features, values.sum(dim=1) > 0


def best_pairs(gains: Tensor, falls: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the pair of free features that maximises (a_p + a_q) (c_p + c_q) with both sums positive.

    A feature that another one matches or beats in both a and c can be exchanged for it without loss. So some best pair
    has one feature that no other beats (the first Pareto front), and a partner that is beaten by that one at most (the
    first front, or the front of what is left without it). Two sweeps over the features in the order of a find both
    fronts; only pairs of the few features on them are scored.

    Args:
        gains: a, (N, D).
        falls: c, (N, D).
        free: which features may be chosen, boolean (N, D).

    Returns:
        The features (N, 2), int64, and whether there is such a pair, boolean (N,).

    >>> a, c = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[-1.0, 2.0, 4.0]])
    >>> features, found = best_pairs(a, c, torch.ones(1, 3, dtype=torch.bool))
    >>> sorted(features[0].tolist()), found.tolist()
    ([0, 2], [True])
    """
    order = gains.masked_fill(~free, -math.inf).argsort(dim=1, descending=True, stable=True)
    ordered = falls.masked_fill(~free, -math.inf).gather(1, order)
    first = _front(ordered)
    second = _front(ordered.masked_fill(first, -math.inf))
    heads, is_head = _chosen(order, first)
    partners, is_partner = _chosen(order, first | second)
    rows = max(1, _LARGEST // (heads.shape[1] * partners.shape[1]))
    features, found = [], []
    for start in range(0, len(gains), rows):
        part = slice(start, start + rows)
        left, right = heads[part], partners[part]
        gain = gains[part].gather(1, left).unsqueeze(2) + gains[part].gather(1, right).unsqueeze(1)
        fall = falls[part].gather(1, left).unsqueeze(2) + falls[part].gather(1, right).unsqueeze(1)
        admissible = (gain > 0) & (fall > 0) & (left.unsqueeze(2) != right.unsqueeze(1))
        admissible &= is_head[part].unsqueeze(2) & is_partner[part].unsqueeze(1)
        best, place = (gain * fall).masked_fill(~admissible, -1.0).flatten(1).max(dim=1)
        row, column = place // right.shape[1], place % right.shape[1]
        pair = left.gather(1, row.unsqueeze(1)), right.gather(1, column.unsqueeze(1))
        features.append(torch.cat(pair, dim=1))
        found.append(best >= 0)
    if not features:
        return order.new_zeros(0, 2), torch.zeros(0, dtype=torch.bool, device=gains.device)
    return torch.cat(features), torch.cat(found)


def _front(values: Tensor) -> Tensor:
    """Which values (N, D) exceed all that stand before them in their row."""
    before = torch.full_like(values, -math.inf)
    before[:, 1:] = values.cummax(dim=1).values[:, :-1]
    return values > before


def _chosen(order: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen entries of each row of `order`, as a table (N, most in a row), and which of its entries are real."""
    counts = chosen.sum(dim=1)
    table = order.new_zeros(len(order), max(1, int(counts.amax()) if len(order) else 0))
    rows, columns = chosen.nonzero(as_tuple=True)
    table[rows, (chosen.cumsum(dim=1) - 1)[rows, columns]] = order[rows, columns]
    return table, torch.arange(table.shape[1], device=order.device) < counts.unsqueeze(1)
