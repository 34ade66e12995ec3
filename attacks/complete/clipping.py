"""Neurons' bounds where the margin is still open: what is settled already need not be bounded again.

On a sub-domain, the bound of a margin is a linear function of the pixels that is nowhere above the margin. Where it
exceeds a cut-off the margin does too, and only the rest of the box matters: a box cut by one half-space. There the
neurons' inputs have narrower bounds, by one multiplier `rate >= 0` for each: the least value over the box of
`neuron + rate * (bound - cut-off)`. Any rate is sound. This is the clipping of Clip-and-Verify (Zhou et al. 2025), and
INVPROP (Kotha et al. 2023, arXiv 2302.01404) with the linear functions kept as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustboard.attacks.complete.relaxation import Bound, Ranges, Reduced, chords

# Functions times pixels of one sub-domain: all functions of a digits network, 85 of a CIFAR one.
_WORK = 1 << 18
# The same for sub-domains that are worked on at once: 4 MiB a buffer.
_AT_ONCE = 1 << 19
# Rates that are tried for each function; the first is often near the best one.
_RATES = 3
# What is found moves outward by this part of the width over the ball: more than float64 rounding, even at the largest
# rates, which are of the order of the width over the tolerance.
_SLACK = 1e-7


@dataclass(frozen=True)
class Planes:
    """One affine function of the pixels for each of n neurons.

    Attributes:
        inputs: (n, d).
        offset: (n,).
    """

    inputs: Tensor
    offset: Tensor

    def __getitem__(self, chosen: Tensor) -> Planes:
        return Planes(self.inputs[chosen], self.offset[chosen])

    def negated(self) -> Planes:
        """The same functions with the opposite sign."""
        return Planes(-self.inputs, -self.offset)

    @staticmethod
    def joined(parts: list[Planes]) -> Planes:
        """All functions of all parts, in order."""
        return Planes(torch.cat([part.inputs for part in parts]), torch.cat([part.offset for part in parts]))


class Clipper:
    """Narrows the neurons' ranges in sub-domains of one box.

    Args:
        network: the network on the box.
        below: functions that are nowhere on the box above the neurons' inputs.
        above: functions that are nowhere below them.
    """

    def __init__(self, network: Reduced, below: Planes, above: Planes) -> None:
        middle, self.radius = (network.upper + network.lower) / 2, (network.upper - network.lower) / 2
        # From here on the box is [-1, 1]^d, and upper bounds are lower bounds of negated functions.
        both = Planes.joined([below, above.negated()])
        self.rows, self.offset = both.inputs * self.radius, both.inputs @ middle + both.offset
        self.signs, self.least = self.rows.sign(), self.offset - self.rows.abs().sum(dim=1)
        self.slack = _SLACK * (network.high - network.low).repeat(2)
        self.most = min(len(self.rows), max(1, _WORK // max(1, len(middle))))

    def __call__(self, ranges: Ranges, seen: Bound, cutoff: float) -> Ranges:
        """The ranges that hold wherever the margin may be at most the cut-off; `low > high` where it is nowhere.

        Args:
            ranges: B sub-domains.
            seen: the bounds of their margins.
            cutoff: larger margins are of no interest.
        """
        plane = seen.pixels * self.radius
        centre = seen.value + plane.abs().sum(dim=1) - cutoff
        # The least value is concave in the rate. Its tangents at zero and far out meet above the maximum.
        rise = centre[:, None] - plane @ self.signs.T
        fall = (seen.value - cutoff).clamp(max=-1e-9)[:, None]
        far = self.offset - plane.sign() @ self.rows.T
        first = ((far - self.least) / (rise - fall)).clamp(min=0.0)
        hope = torch.where(rise > 0, far + fall * first, -torch.inf)

        bounds = torch.cat([ranges.low, -ranges.high], dim=1)
        gain = _gain(ranges, seen, bounds, hope)
        count = min(self.most, int((gain > 0).sum(dim=1).max()) if gain.numel() else 0)
        if not count:
            return ranges
        where = gain.topk(count, dim=1).indices
        at_once = max(1, _AT_ONCE // (count * max(1, len(self.radius))))
        for begin in range(0, len(plane), at_once):
            part = slice(begin, begin + at_once)
            chosen = where[part]
            slopes = rise[part].gather(1, chosen), fall[part]
            found = self._raised(
                chosen, plane[part], centre[part], slopes, far[part].gather(1, chosen), first[part].gather(1, chosen)
            )
            bounds[part].scatter_reduce_(1, chosen, found, "amax")
        low, high = bounds.chunk(2, dim=1)
        return Ranges(low, -high)

    def _raised(
        self, chosen: Tensor, plane: Tensor, centre: Tensor, slopes: tuple[Tensor, Tensor], far: Tensor, rate: Tensor
    ) -> Tensor:
        """The best bounds (B, k) of the `chosen` functions (B, k): where two tangents meet is the next rate.

        Args:
            chosen: positions in `rows`.
            plane: (B, d), the bound of the margin less the cut-off.
            centre: (B,), its value in the centre of the box.
            slopes: of the tangents at rate zero (B, k) and far out (B, 1).
            far: (B, k), the second tangent's value at rate zero.
            rate: (B, k), where those two meet.
        """
        rows, offset = self.rows[chosen], self.offset[chosen]
        left = best = self.least[chosen]
        right, (rise, fall) = far, slopes
        for last in (*[False] * (_RATES - 1), True):
            mixed = torch.addcmul(rows, rate[:, :, None], plane[:, None])
            value = offset + rate * centre[:, None] - torch.linalg.vector_norm(mixed, ord=1, dim=2)
            best = torch.fmax(best, value)
            if last:
                break
            slope = centre[:, None] - (mixed.sign_() @ plane[:, :, None])[:, :, 0]
            tangent, rising = value - slope * rate, slope > 0
            left, rise = torch.where(rising, tangent, left), torch.where(rising, slope, rise)
            right, fall = torch.where(rising, right, tangent), torch.where(rising, fall, slope)
            rate = ((right - left) / (rise - fall)).clamp(min=0.0).nan_to_num(0.0, posinf=0.0)
        return (best - self.slack[chosen]).nan_to_num(-torch.inf, posinf=-torch.inf)


def _gain(ranges: Ranges, seen: Bound, bounds: Tensor, hope: Tensor) -> Tensor:
    """What could at most be won by each function (B, 2n), in units of the margin; 0 for nothing.

    That is the part of the way to a known sign, times what the relaxation loses at the neuron. A function that may show
    that the sub-domain is empty comes first.
    """
    loss = (seen.weight.abs() * chords(ranges) * -ranges.low).masked_fill(~ranges.free, 0.0)
    way = ((hope.clamp(max=0.0) - bounds) / bounds).abs().masked_fill(hope <= bounds, 0.0)
    gain = (way * loss.repeat(1, 2)).nan_to_num(0.0, posinf=0.0)
    return gain.masked_fill(hope > torch.cat([ranges.high, -ranges.low], dim=1), torch.inf)
