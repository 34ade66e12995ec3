"""Lower bounds on a quadratic over a box: the dual of Shor's relaxation, by ascent on its multipliers.

For q(delta) = delta^T F delta + g . delta over |delta_i| <= h_i, every p > 0 gives a sound bound: the box lies in the
ellipsoid sum_i p_i (delta_i / h_i)^2 <= sum_i p_i, over which the minimum is known exactly (`trust_region`). The best
of these bounds is the dual value of Shor's semidefinite relaxation (Shor 1987, "Quadratic optimization problems"; the
diagonal S-procedure): the trust region's multiplier lambda makes lambda p_i / h_i^2 the multiplier of delta_i^2 <=
h_i^2. With delta the minimiser over the ellipsoid, (delta_i / h_i)^2 - 1 is a supergradient in p_i up to a common
factor, so that exponentiated steps along it ascend.

F has rank r, so that a step costs a QR decomposition d x r and an eigendecomposition r x r; no d x d matrix is made.
Closed-form bounds come first and settle most of the quadratics of a robust network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustboard.attacks import trust_region

# Measured: after 16 steps the bound is within 0.3 % of the semidefinite program's value, the mean over 10 drawn
# quadratics of 8 and of 20 dimensions, and 8 of a trained network's of 64.
ITERATIONS = 16
_STEP, _DECAY, _LARGEST_EXCESS = 0.5, 0.75, 3.0
_UNDERFLOW = 1e-280
_LEAST_WEIGHT = 1e-6
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class BoxBounds:
    """What is known of the minima of P quadratics around each of N centres.

    Attributes:
        lower: (P, N), not above the minimum over the box.
        upper: (P, N), the value at some point of the box.
    """

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def minimum(
    curvatures: Tensor,
    axes: Tensor,
    slopes: Tensor,
    half_widths: Tensor,
    *,
    enough: Tensor | None = None,
    iterations: int = ITERATIONS,
) -> BoxBounds:
    """Bound sum_i e_i t_i^2 + g_i t_i with t = axes^T delta over |delta| <= half_widths from below.

    No pair (P, N) depends on the others, but for one thing: a centre one of whose quadratics is seen to fall to
    `enough` keeps its closed-form bounds.

    Args:
        curvatures: e, (P, r).
        axes: (P, d, r), any columns, orthonormal or not.
        slopes: g, (P, N, r).
        half_widths: h, (N, d), not negative.
        enough: (P, N); a pair is not tightened further once its bound exceeds this, or its quadratic is seen not to.
            By default every pair gets all steps.
        iterations: the largest number of ascent steps of a pair.

    Returns:
        Float64 bounds.

    Example:
        >>> import torch
        >>> curvatures, slopes = torch.tensor([[1.0, -1.0]]), torch.tensor([[[0.0, 1.0]]])
        >>> half_widths = torch.tensor([[1.0, 2.0]])
        >>> saddle = minimum(curvatures, torch.eye(2)[None], slopes, half_widths)  # x^2 - y^2 + y
        >>> round(saddle.lower.item(), 3), round(saddle.upper.item(), 3)
        (-6.0, -6.0)
    """
    curvatures, axes, slopes, half_widths = (part.double() for part in (curvatures, axes, slopes, half_widths))
    proved = enough if enough is not None else torch.full(slopes.shape[:-1], torch.inf, dtype=torch.float64)
    hopeless = enough if enough is not None else torch.full_like(proved, -torch.inf)
    gradients = torch.einsum("pdr,pnr->pnd", axes, slopes)
    bent = curvature_multipliers(curvatures, axes)
    separable = -((gradients.abs() * half_widths).sum(-1) + bent @ half_widths.square().T) * (1 + _rounding(axes))
    lower = torch.maximum(separable, _over_ball(curvatures, axes, slopes, half_widths))
    corners = torch.einsum("pnd,pdr->pnr", -half_widths * gradients.sign(), axes)
    upper = (curvatures[:, None] * corners.square() + slopes * corners).sum(dim=-1)
    weights = bent[:, None] * half_widths.square() + gradients.abs() * half_widths / 2
    wanted = (lower <= proved) & (upper > hopeless).all(dim=0)
    todo = wanted.nonzero()
    chunk = max(1, _CHUNK_BYTES // (8 * axes[0].numel()))
    for part in torch.split(todo, chunk):
        pair, centre = part.unbind(dim=1)
        problem = _Problem(curvatures[pair], axes[pair], slopes[pair, centre], half_widths[centre])
        stops = proved[pair, centre], hopeless[pair, centre]
        found = _ascended(problem, weights[pair, centre], *stops, iterations)
        lower[pair, centre] = torch.maximum(lower[pair, centre], found.lower)
        upper[pair, centre] = torch.minimum(upper[pair, centre], found.upper)
    # Relative allowances say nothing where products underflow.
    return BoxBounds(lower - _UNDERFLOW, upper)


def curvature_multipliers(curvatures: Tensor, axes: Tensor) -> Tensor:
    """A diagonal D with axes diag(e) axes^T + D >= 0, (..., d): closed form, and the least trace for rank one.

    With the negative part -B B^T and b_i the rows of B, D = c diag(|b_i|) where c is the largest eigenvalue of
    sum_i b_i b_i^T / |b_i|.
    """
    negative = axes * (-curvatures).clamp(min=0.0).sqrt()[..., None, :]
    lengths: Tensor = torch.linalg.vector_norm(negative, dim=-1)
    units = torch.where(lengths[..., None] > 0, negative / lengths[..., None], torch.zeros_like(negative))
    largest: Tensor = torch.linalg.eigvalsh(negative.mT @ units)[..., -1:].clamp(min=0.0)
    return lengths * largest * (1 + _rounding(axes))


@torch.no_grad()
def ellipsoid_bound(
    curvatures: Tensor, axes: Tensor, slopes: Tensor, half_widths: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimum over sum_i p_i (delta_i / h_i)^2 <= sum_i p_i, which holds the box: a sound bound for any p > 0.

    Args:
        curvatures: e, (B, r).
        axes: (B, d, r).
        slopes: g, (B, r).
        half_widths: h, (B, d).
        weights: p, (B, d), positive.

    Returns:
        The bound, (B,), rounded down, and the minimiser delta, (B, d), which lies in the ellipsoid and may leave the
        box.
    """
    scale = half_widths * weights.rsqrt()
    reach = weights.sum(dim=-1).sqrt()
    basis, reduced = torch.linalg.qr(scale[..., None] * axes)
    bends, turns = torch.linalg.eigh((reduced * curvatures[:, None]) @ reduced.mT)
    tilts = torch.einsum("bks,bkr,br->bs", turns, reduced, slopes)
    found = trust_region.minimum(bends, tilts, reach)
    size = bends.abs().amax(dim=-1) * reach.square() + torch.linalg.vector_norm(tilts, dim=-1) * reach
    point = torch.einsum("bdk,bks,bs->bd", basis, turns, found.point)
    return found.bound - _rounding(axes) * size, scale * point


@dataclass(frozen=True)
class _Problem:
    """B quadratics, each with its own box."""

    curvatures: Tensor
    axes: Tensor
    slopes: Tensor
    half_widths: Tensor

    def take(self, rows: Tensor) -> _Problem:
        return _Problem(self.curvatures[rows], self.axes[rows], self.slopes[rows], self.half_widths[rows])

    def values(self, delta: Tensor) -> Tensor:
        coordinates = torch.einsum("bd,bdr->br", delta, self.axes)
        return (self.curvatures * coordinates.square() + self.slopes * coordinates).sum(dim=-1)


def _ascended(problem: _Problem, weights: Tensor, proved: Tensor, hopeless: Tensor, iterations: int) -> BoxBounds:
    """The best of the bounds that the ascent meets, and the least value at a point of the box, both (B,)."""
    lower, upper = torch.full_like(proved, -torch.inf), torch.full_like(proved, torch.inf)
    rows = torch.arange(len(proved), device=proved.device)
    weights = _normalised(weights)
    for step in range(iterations):
        if not len(rows):
            break
        now = problem.take(rows) if len(rows) < len(proved) else problem
        bound, point = ellipsoid_bound(now.curvatures, now.axes, now.slopes, now.half_widths, weights)
        excess = torch.where(now.half_widths > 0, point / now.half_widths, torch.zeros_like(point)).square() - 1
        inside = torch.minimum(point.abs(), now.half_widths) * point.sign()
        corner = torch.where(point < 0, -now.half_widths, now.half_widths)
        lower[rows] = torch.maximum(lower[rows], bound)
        upper[rows] = torch.minimum(upper[rows], torch.minimum(now.values(inside), now.values(corner)))
        weights = _normalised(weights * (_STEP / (1 + step) ** _DECAY * excess.clamp(max=_LARGEST_EXCESS)).exp())
        left = (lower[rows] <= proved[rows]) & (upper[rows] > hopeless[rows])
        rows, weights = rows[left], weights[left]
    return BoxBounds(lower, upper)


def _normalised(weights: Tensor) -> Tensor:
    """Weights of mean one; none vanishes, which would open the ellipsoid."""
    mean = weights.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, weights / mean, torch.ones_like(weights)).clamp(min=_LEAST_WEIGHT)


def _over_ball(curvatures: Tensor, axes: Tensor, slopes: Tensor, half_widths: Tensor) -> Tensor:
    """The bound of equal multipliers, (P, N): over the ball around the box, without tightening."""
    reduced = torch.linalg.qr(axes, mode="r").R
    bends, turns = torch.linalg.eigh((reduced * curvatures[:, None]) @ reduced.mT)
    tilts = torch.einsum("pks,pkr,pnr->pns", turns, reduced, slopes)
    reach = torch.linalg.vector_norm(half_widths, dim=-1) * (1 + _rounding(axes))
    size: Tensor = bends.abs().amax(dim=-1)[:, None] * reach.square() + torch.linalg.vector_norm(tilts, dim=-1) * reach
    return trust_region.minimum(bends[:, None], tilts, reach).bound - _rounding(axes) * size


def _rounding(axes: Tensor) -> float:
    """A relative allowance for the float64 rounding of sums, decompositions and their products of this size."""
    return 8 * (axes.shape[-2] + axes.shape[-1]) * torch.finfo(torch.float64).eps
