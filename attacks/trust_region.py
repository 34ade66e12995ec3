"""The exact minimum of a quadratic over an L2 ball, batched: the trust-region subproblem.

With F = V diag(e) V^T, minimising t^T F t + g.t over |t|_2 <= radius falls apart into the coordinates of V, and strong
duality holds although F may have negative curvatures (the S-lemma; Moré and Sorensen 1983, "Computing a trust region
step"; Pólik and Terlaky 2007, "A survey of the S-lemma"):

    min_t = max over lambda >= max(0, -min e) of  -lambda radius^2 - sum_i g_i^2 / (4 (e_i + lambda)).

The optimal multiplier is where t(lambda) = -g / (2 (e + lambda)) reaches the sphere. Newton's method on the concave
function 1 / |t(lambda)| finds it from the left without ever passing it, and whatever multiplier it ends with, the dual
there is a lower bound. In the hard case t(lambda) stays inside the ball even at lambda = -min e; the missing length
then lies along the axis of the smallest curvature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# A fixed number, so that no answer depends on its batch; measured: 10 reach float64's
# precision on random problems of up to 1000 axes, nearly hard cases among them.
_NEWTON_STEPS = 12
_LEAST_SLOPE = 1e-200


@dataclass(frozen=True)
class TrustRegion:
    """The minimum of each quadratic of a batch, from both sides.

    Attributes:
        value: (...), the quadratic at `point`, float64; not below the minimum.
        point: (..., r), a minimiser inside the ball, float64.
        bound: (...), the dual value, rounded down; not above the minimum.
    """

    value: Tensor
    point: Tensor
    bound: Tensor


@torch.no_grad()
def minimum(curvatures: Tensor, slopes: Tensor, radius: Tensor | float) -> TrustRegion:
    """Minimise sum_i e_i t_i^2 + g_i t_i over |t|_2 <= radius.

    The arithmetic is float64's. `bound` and `value` differ by float error alone, some 1e-15 of the quadratic's terms on
    the sphere.

    Args:
        curvatures: e, (..., r), of either sign.
        slopes: g, (..., r); broadcast against `curvatures`.
        radius: of the ball, not negative; a number, or a tensor that broadcasts to (...).

    Example:
        >>> import torch
        >>> found = minimum(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0]), radius=2.0)  # a hard case
        >>> [round(float(number), 6) for number in (found.value, found.bound, found.point.norm())]
        [-4.083333, -4.083333, 2.0]
    """
    shape = np.broadcast_shapes(curvatures.shape, slopes.shape)
    curvatures, slopes = curvatures.double().expand(shape), slopes.double().expand(shape)
    radius = torch.as_tensor(radius, dtype=torch.float64, device=slopes.device).expand(slopes.shape[:-1])[..., None]
    # In units of the radius and of the largest term all numbers are at most 1, so no square overflows or vanishes.
    bent, tilted = curvatures * radius.square(), slopes * radius
    scale = torch.maximum(bent.abs(), tilted.abs()).amax(dim=-1, keepdim=True)
    unit = torch.where(scale > 0, scale, torch.ones_like(scale))
    bent, tilted = bent / unit, tilted / unit
    # A slope so small would need a multiplier among the denormal numbers, and moves the minimum by less than rounding.
    tilted = torch.where(tilted.abs() < _LEAST_SLOPE, torch.zeros_like(tilted), tilted)
    floor = (-bent.amin(dim=-1, keepdim=True)).clamp(min=0.0)
    shifted = bent + floor
    excess = _multiplier(shifted, tilted)
    point = _stationary(shifted, tilted, excess)
    terms = tilted * point / 2
    dual = terms.sum(-1, keepdim=True) - floor - excess
    # All terms of the dual are negative: each, and their sum, is wrong by some units in the last place.
    rounding = (slopes.shape[-1] + 16) * torch.finfo(torch.float64).eps
    dual = torch.where(scale > 0, dual * (1 + rounding) - rounding, torch.zeros_like(dual))
    point = _along_flattest(point, bent) * radius
    value = (curvatures * point.square() + slopes * point).sum(-1)
    return TrustRegion(value, point, (dual * unit).squeeze(-1))


def _multiplier(shifted: Tensor, tilted: Tensor) -> Tensor:
    """The multiplier beyond its least value, (..., 1): where t enters the unit ball, or zero if it is always inside."""
    # Here one coordinate of t is 1 and none is larger.
    excess = (tilted.abs() / 2 - shifted).amax(dim=-1, keepdim=True).clamp(min=0.0)
    for _ in range(_NEWTON_STEPS):
        point = _stationary(shifted, tilted, excess)
        length = torch.linalg.vector_norm(point, dim=-1, keepdim=True)
        rate = torch.where(point == 0, point, point.square() / (shifted + excess)).sum(-1, keepdim=True)
        step = length.square() * (length - 1).clamp(min=0.0) / rate
        excess = excess + torch.where(rate > 0, step, torch.zeros_like(step))
    return excess


def _stationary(shifted: Tensor, tilted: Tensor, excess: Tensor) -> Tensor:
    """t(lambda) in units of the radius; an axis without a slope stays at zero even where it has no curvature."""
    return torch.where(tilted == 0, torch.zeros_like(tilted), -tilted / (2 * (shifted + excess)))


def _along_flattest(point: Tensor, bent: Tensor) -> Tensor:
    """The point moved to the unit sphere along the axis of the least curvature, where that is negative."""
    least, axis = bent.min(dim=-1, keepdim=True)
    own = point.gather(-1, axis)
    rest = (point.square().sum(-1, keepdim=True) - own.square()).clamp(min=0.0)
    reach = (1 - rest).clamp(min=0.0).sqrt()
    moved = torch.where(own < 0, -reach, reach)
    moved = torch.where((least < 0) & (reach > own.abs()), moved, own)
    point = point.scatter(-1, axis, moved)
    length: Tensor = torch.linalg.vector_norm(point, dim=-1, keepdim=True)
    return point / length.clamp(min=1.0)
