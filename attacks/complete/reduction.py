"""From a classifier to `Reduced`: the network as it is on one example's box, with only its unstable neurons left.

Layer by layer, every neuron's input is written as an affine function of the pixels and of the earlier unstable neurons,
and bounded by CROWN over it; the neurons whose sign that leaves open are bounded again with optimised lower lines, each
with lines of its own. So the bounds of hidden neurons are those of alpha-CROWN (Xu et al. 2021, arXiv 2011.13824).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustboard.attacks.complete.clipping import Planes
from robustboard.attacks.complete.network import ReluNetwork
from robustboard.attacks.complete.relaxation import Reduced, Rows, bound, crown_slopes, optimise
from robustboard.errors import BoundsError

_ROWS_AT_A_TIME = 256
# Clipping narrows neurons that see most of the pixels. On convolutions, whose neurons see a few, it was measured to
# cost more than half of the time again and to gain nothing.
_SEEN_TO_CLIP = 0.5


@dataclass(frozen=True)
class Problem:
    """The question about one example: are all these margins positive on the box?

    Attributes:
        network: the network on the box.
        margins: one row a target class, the margin z_y - z_j.
        targets: the class j of each row.
        below: for each neuron of the network a function of the pixels that is nowhere above its input on the box; None
            where the first layer's neurons see few of the pixels.
        above: the same from above.
    """

    network: Reduced
    margins: Rows
    targets: tuple[int, ...]
    below: Planes | None
    above: Planes | None


def reduce_to_box(
    network: ReluNetwork,
    lower: Tensor,
    upper: Tensor,
    *,
    label: int,
    targets: tuple[int, ...],
    classes: int,
    iterations: int,
    memory_bytes: int,
) -> Problem:
    """The problem of one example.

    Args:
        network: the classifier.
        lower: float64 (C * H * W,), the lower corner of a box around everything that is allowed.
        upper: the upper corner.
        label: y.
        targets: the classes j whose margins are open.
        classes: K.
        iterations: optimisation steps for each hidden neuron that CROWN leaves unstable.
        memory_bytes: what the matrices may take.

    Raises:
        BoundsError: if they would take more, or a neuron's bounds are not finite.
    """
    found = _empty(lower, upper)
    active: list[Tensor] = []
    unstable: list[Tensor] = []
    nowhere = Planes(lower.new_zeros(0, len(lower)), lower.new_zeros(0))
    beneath, over, clipped = [nowhere], [nowhere], False
    for layer in range(network.layers):
        low: list[Tensor] = []
        high: list[Tensor] = []
        kept: list[Rows] = []
        for parts in network.affine(layer, active, unstable):
            rows = Rows(*parts)
            low.append(_crown(found, rows))
            high.append(-_crown(found, rows.negated()))
            kept.append(rows[(low[-1] < 0) & (high[-1] > 0)])
            _require_room(found, kept, memory_bytes, clipped=clipped)
        below, above = torch.cat(low), torch.cat(high)
        # A bound that is not a number is neither below nor above zero: the neuron would count as inactive.
        if not bool((below.isfinite() & above.isfinite()).all()):
            raise BoundsError("Complete verification found a neuron without finite bounds.")
        rows = _joined(kept)
        open_ = ((below < 0) & (above > 0)).nonzero().flatten()
        # The first layer's inputs are functions of the pixels themselves.
        bottom = top = Planes(rows.inputs, rows.offset)
        if not layer:
            clipped = not len(open_) or float((rows.inputs != 0).double().mean()) > _SEEN_TO_CLIP
        if layer and len(open_):
            values, bottom = _optimised(found, rows, iterations)
            below[open_] = torch.maximum(below[open_], values)
            values, top = _optimised(found, rows.negated(), iterations)
            above[open_], top = torch.minimum(above[open_], -values), top.negated()
        still = (below[open_] < 0) & (above[open_] > 0)
        unstable.append(open_[still])
        active.append((below >= 0).double())
        if clipped:
            beneath.append(bottom[still])
            over.append(top[still])
        found = _grown(found, rows[still], below[open_[still]], above[open_[still]])
    mix = torch.zeros(len(targets), classes, dtype=torch.float64, device=network.device)
    mix[:, label] = 1.0
    mix[torch.arange(len(targets)), list(targets)] -= 1.0
    margins = [Rows(*parts) for parts in network.affine(network.layers, active, unstable, mix)]
    planes = (Planes.joined(beneath), Planes.joined(over)) if clipped else (None, None)
    return Problem(found, _joined(margins), targets, *planes)


def _empty(lower: Tensor, upper: Tensor) -> Reduced:
    nothing = lower.new_zeros(0)
    return Reduced(
        lower, upper, Rows(lower.new_zeros(0, len(lower)), lower.new_zeros(0, 0), nothing), (), nothing, nothing
    )


def _grown(found: Reduced, rows: Rows, low: Tensor, high: Tensor) -> Reduced:
    """`found` with one more layer."""
    before, new = len(found), len(rows)
    wider = functional.pad(found.units.hidden, (0, new))
    units = Rows(
        torch.cat([found.units.inputs, rows.inputs]),
        torch.cat([wider, functional.pad(rows.hidden, (0, new))]),
        torch.cat([found.units.offset, rows.offset]),
    )
    groups = (*found.groups, (before, before + new))
    return Reduced(found.lower, found.upper, units, groups, torch.cat([found.low, low]), torch.cat([found.high, high]))


def _joined(parts: list[Rows]) -> Rows:
    return Rows(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.offset for part in parts]),
    )


def _crown(found: Reduced, rows: Rows) -> Tensor:
    return bound(found, rows, found.ranges(len(rows)), crown_slopes(found, len(rows))).value


def _optimised(found: Reduced, rows: Rows, iterations: int) -> tuple[Tensor, Planes]:
    """The best bounds (R,), and the functions of the pixels that they are minima of."""
    values, planes = [], []
    for first in range(0, len(rows), _ROWS_AT_A_TIME):
        part = rows[slice(first, first + _ROWS_AT_A_TIME)]
        ranges, start = found.ranges(len(part)), crown_slopes(found, len(part))
        _, _, best = optimise(found, part, ranges, start, iterations=iterations, enough=0.0)
        seen = bound(found, part, ranges, best)
        values.append(seen.value)
        planes.append(Planes(seen.pixels, seen.value - (seen.pixels * seen.corner).sum(dim=1)))
    return torch.cat(values), Planes.joined(planes)


def _require_room(found: Reduced, kept: list[Rows], memory_bytes: int, *, clipped: bool) -> None:
    neurons = len(found) + sum(len(rows) for rows in kept)
    # To clip, a neuron has seven rows of pixels: its own, two functions from `Planes`, and these scaled and as signs.
    need = 8 * neurons * (neurons + (7 if clipped else 1) * len(found.lower))
    if need > memory_bytes:
        raise BoundsError(
            f"Complete verification of an example with {neurons} or more unstable neurons needs over "
            f"{need / 2**30:.1f} GiB, more than the {memory_bytes / 2**30:.1f} GiB allowed."
        )
