"""The nearest point of a hyperplane inside the pixel box (the projections of Croce & Hein 2020, arXiv 1907.02044).

A point travels to the hyperplane along one direction, each pixel until its wall of the box stops it: along the signs of
the normal for L-inf, along the normal itself for L2. How far it travels is where a concave piecewise-linear function
reaches its goal. Newton's method finds that in a few passes and without sorting the pixels: every step puts at least
one more pixel to its wall, and none of them ever comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustboard.attacks.threat import Norm

# Far beyond any distance in the box, and finite, since infinity times the zero of an idle pixel would be no number.
_FARTHEST = 1e30


def displacement(points: Tensor, normals: Tensor, values: Tensor, norm: Norm) -> Tensor:
    """The shortest way from each point to its hyperplane that ends inside the box [0, 1].

    Every row has one normal and P points; the linear function of row r is `values[p, r]` at point p, and it is to
    become zero. Where the box does not reach the hyperplane the way leads to the corner nearest to it, as the paper
    has it. Where the normal is zero nothing moves.

    Args:
        points: (P, R, d), in the box.
        normals: (R, d), finite, of any scale.
        values: (P, R), finite.
        norm: in which the way is shortest.

    Returns:
        (P, R, d): what is to be added to `points`.
    """
    tiny = torch.finfo(normals.dtype).tiny
    # The squares of gradients as small as 1e-23 vanish in float32, so the largest entry is made 1.
    scale = normals.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    normals, values = normals / scale, (values / scale.T).clamp(-_FARTHEST, _FARTHEST)
    sizes, signs, heading = normals.abs(), normals.sign(), values.sign().neg().unsqueeze(2)
    # The room towards the wall is 1 - t upward and t downward: 1/2 +- (1/2 - t).
    rooms = (0.5 - points).mul_(signs).mul_(heading).add_(0.5)
    if norm == "linf":
        way, stops, weights = signs, rooms, sizes
    else:
        way, stops, weights = normals, rooms / sizes.clamp(min=tiny), sizes.square()
    travel = _travel(stops, rooms * sizes, weights, values.abs())
    return torch.addcmul(points, way, heading * travel.unsqueeze(2)).clamp_(0.0, 1.0).sub_(points)


def _travel(stops: Tensor, gains: Tensor, weights: Tensor, goals: Tensor) -> Tensor:
    """The least t >= 0 with sum_i weights_i * min(t, stops_i) = goal, or one beyond all stops; shape (P, R).

    Newton's method from the left on a concave function never overshoots. Its next t depends on nothing but which
    pixels have stopped, so a row that has arrived stays where it is while others go on.

    Args:
        stops: (P, R, d), where a pixel stops.
        gains: (P, R, d), weights * stops: what it has contributed by then.
        weights: (R, d), what it contributes a unit until then, at least 0.
        goals: (P, R), at least 0.
    """
    tiny = torch.finfo(weights.dtype).tiny
    mask = torch.empty_like(stops)
    # If no pixel stopped before.
    travel = (goals / weights.sum(dim=1).clamp(min=tiny)).clamp(max=_FARTHEST)
    while True:
        # Masks of zeros and ones in float: a comparison that gives booleans is several times slower on a CPU.
        slope = torch.linalg.vecdot(torch.gt(stops, travel.unsqueeze(2), out=mask), weights)
        gained = torch.linalg.vecdot(torch.le(stops, travel.unsqueeze(2), out=mask), gains)
        farther = ((goals - gained) / slope.clamp(min=tiny)).clamp(max=_FARTHEST)
        if not bool((farther > travel).any()):
            return travel
        travel = torch.maximum(travel, farther)
