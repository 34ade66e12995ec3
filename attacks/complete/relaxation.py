"""Linear bounds on an affine-and-ReLU network over a box, with split neurons, batch by batch: beta-CROWN.

CROWN: Zhang et al. 2018 (arXiv 1811.00866). Optimised lower lines, alpha: Xu et al. 2021 (arXiv 2011.13824).
Multipliers of split constraints, beta: Wang et al. 2021 (arXiv 2103.06624). Any alpha in [0, 1] and any beta >= 0 give
a sound bound, so what the optimiser does can only make a bound looser than it might be.

The network is in the form of `Reduced`: only neurons that are unstable over the whole ball are left in it, everything
else is folded into matrices. The bound is then a few matrix products, and so is its gradient, which is written out
here: the gradient of a backward pass is a forward pass through the same relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Adam's usual constants, and step lengths that shrink by the same factor each time.
_MEAN, _SQUARE, _TINY = 0.9, 0.999, 1e-12
ALPHA_STEP = 0.25
BETA_STEP = 0.1
DECAY = 0.95

# Functions whose bounds are high enough leave a batch once a quarter of it can leave: copying costs time too.
_WORTH_DROPPING = 0.75


@dataclass(frozen=True)
class Rows:
    """R affine functions `inputs x + hidden y + offset` of the pixels x and of the unstable neurons' outputs y.

    Attributes:
        inputs: (R, d).
        hidden: (R, n).
        offset: (R,).
    """

    inputs: Tensor
    hidden: Tensor
    offset: Tensor

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, chosen: Tensor | slice) -> Rows:
        return Rows(self.inputs[chosen], self.hidden[chosen], self.offset[chosen])

    def negated(self) -> Rows:
        """The same functions with the opposite sign."""
        return Rows(-self.inputs, -self.hidden, -self.offset)

    def to(self, dtype: torch.dtype) -> Rows:
        """The same functions, rounded."""
        return Rows(self.inputs.to(dtype), self.hidden.to(dtype), self.offset.to(dtype))


@dataclass(frozen=True)
class Reduced:
    """A network on one box of inputs: `z = P x + Q y + r`, `y = relu(z)`, for its n unstable neurons in order.

    Attributes:
        lower: (d,), the box's lower corner.
        upper: (d,).
        units: the n neurons' inputs as affine functions; `units.hidden` is block lower triangular with zero diagonal
            blocks, since a neuron depends on earlier layers only.
        groups: the first and last position (exclusive) of each layer's neurons.
        low: (n,), lower bounds on z, all negative.
        high: (n,), upper bounds on z, all positive.
    """

    lower: Tensor
    upper: Tensor
    units: Rows
    groups: tuple[tuple[int, int], ...]
    low: Tensor
    high: Tensor

    def __len__(self) -> int:
        return len(self.low)

    def to(self, dtype: torch.dtype) -> Reduced:
        """The same network, rounded: good enough to search with, not to prove with."""
        sides = self.lower.to(dtype), self.upper.to(dtype)
        return Reduced(*sides, self.units.to(dtype), self.groups, self.low.to(dtype), self.high.to(dtype))

    def ranges(self, count: int) -> Ranges:
        """The whole box, `count` times."""
        return Ranges(self.low.expand(count, -1), self.high.expand(count, -1))

    def evaluate(self, rows: Rows, points: Tensor) -> Tensor:
        """The values (N, R) of `rows` at points (N, d) of the box: the network itself, no relaxation."""
        values = points @ self.units.inputs.T + self.units.offset
        outputs = torch.zeros_like(values)
        for first, last in self.groups:
            values[:, first:last] += outputs[:, :first] @ self.units.hidden[first:last, :first].T
            outputs[:, first:last] = values[:, first:last].relu()
        return points @ rows.inputs.T + outputs @ rows.hidden.T + rows.offset


@dataclass(frozen=True)
class Ranges:
    """What is known of the neurons' inputs in each of B sub-domains.

    Attributes:
        low: (B, n), lower bounds; a neuron with `low >= 0` is active, and splitting it that way sets `low` to 0.
        high: (B, n), upper bounds; another neuron with `high <= 0` is inactive.
    """

    low: Tensor
    high: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> Ranges:
        return Ranges(self.low[chosen], self.high[chosen])

    def to(self, dtype: torch.dtype) -> Ranges:
        """The same sub-domains, rounded."""
        return Ranges(self.low.to(dtype), self.high.to(dtype))

    @property
    def free(self) -> Tensor:
        """(B, n): the neurons whose sign is open."""
        return (self.low < 0) & (self.high > 0)

    def split(self, neuron: Tensor, side: int) -> Ranges:
        """The sub-domains where `neuron` (B,) is active, for side +1, or inactive, for side -1."""
        place = neuron[:, None]
        if side > 0:
            return Ranges(self.low.scatter(1, place, self.low.gather(1, place).clamp(min=0.0)), self.high)
        return Ranges(self.low, self.high.scatter(1, place, self.high.gather(1, place).clamp(max=0.0)))


@dataclass
class Multipliers:
    """The free numbers of a bound, for each of B functions.

    Attributes:
        alpha: (B, n) in [0, 1], the slope of an unstable neuron's lower line.
        beta: (B, n), not negative, the multiplier of a split's constraint.
    """

    alpha: Tensor
    beta: Tensor

    def __getitem__(self, chosen: Tensor) -> Multipliers:
        return Multipliers(self.alpha[chosen], self.beta[chosen])

    def to(self, dtype: torch.dtype) -> Multipliers:
        """The same numbers, rounded; still within their limits."""
        return Multipliers(self.alpha.to(dtype), self.beta.to(dtype))


@dataclass(frozen=True)
class Bound:
    """Lower bounds and what they rest on, for B functions.

    Attributes:
        value: (B,), no point of the sub-domain has less.
        pixels: (B, d), the coefficients of the final linear function of the pixels, which is below the bounded one
            throughout the sub-domain and has `value` as its minimum over the box.
        corner: (B, d), the corner of the box where that is.
        weight: (B, n), the coefficient on each neuron's output when the pass reached it.
        inputs: (B, n), the relaxation's own idea of each neuron's input at that corner.
    """

    value: Tensor
    pixels: Tensor
    corner: Tensor
    weight: Tensor
    inputs: Tensor

    def __getitem__(self, chosen: Tensor) -> Bound:
        pixels, corner = self.pixels[chosen], self.corner[chosen]
        return Bound(self.value[chosen], pixels, corner, self.weight[chosen], self.inputs[chosen])


def chords(ranges: Ranges) -> Tensor:
    """The slopes (B, n) of the upper lines, from (low, 0) to (high, high); 1 or 0 where the sign is known."""
    on = (ranges.low >= 0).to(ranges.low.dtype)
    return torch.where(ranges.free, ranges.high / (ranges.high - ranges.low), on)


def crown_slopes(network: Reduced, count: int) -> Multipliers:
    """CROWN's adaptive choice: a lower line of slope 1 where the neuron is more often positive, else 0."""
    alpha = (network.high >= -network.low).to(network.low.dtype).expand(count, -1).clone()
    return Multipliers(alpha, torch.zeros_like(alpha))


def bound(network: Reduced, rows: Rows, ranges: Ranges, multipliers: Multipliers) -> Bound:
    """Bound B functions from below, each over its own sub-domain.

    Args:
        network: the network on its box.
        rows: B functions.
        ranges: B sub-domains.
        multipliers: any within their limits.
    """
    lines = _Lines.of(ranges)
    below = lines.below(multipliers)
    value, pixels, weight = _backward(lines, network, rows, below, multipliers)
    corner = _corner(network, pixels)
    return Bound(value, pixels, corner, weight, _forward(lines, network, corner, weight, below))


def lowest(network: Reduced, rows: Rows, ranges: Ranges, multipliers: Multipliers) -> tuple[Tensor, Tensor]:
    """The values (B,) and corners (B, d) of `bound` alone, for half the work."""
    lines = _Lines.of(ranges)
    value, pixels, _ = _backward(lines, network, rows, lines.below(multipliers), multipliers)
    return value, _corner(network, pixels)


def optimise(
    network: Reduced,
    rows: Rows,
    ranges: Ranges,
    multipliers: Multipliers,
    *,
    iterations: int,
    enough: float = float("inf"),
) -> tuple[Tensor, Tensor, Multipliers]:
    """Raise the bounds by Adam on alpha and beta, and give each function the best that was seen.

    Args:
        network: the network on its box.
        rows: B functions.
        ranges: as for `bound`.
        multipliers: where to begin.
        iterations: the work budget, in passes.
        enough: a function whose bound is above this is not worked on any more.

    Returns:
        The best bounds (B,), the corners of the box where their linear functions are least (B, d), their multipliers.
    """
    now = Multipliers(multipliers.alpha.clone(), multipliers.beta.clone())
    kept, adam = Multipliers(now.alpha.clone(), now.beta.clone()), _Adam.of(now)
    value = rows.offset.new_full((len(rows),), -torch.inf)
    corner = network.lower.repeat(len(rows), 1)
    at_work = torch.arange(len(rows), device=rows.offset.device)
    lines, part = _Lines.of(ranges), rows
    for step in range(iterations + 1):
        below = lines.below(now)
        found, pixels, weight = _backward(lines, network, part, below, now)
        corners = _corner(network, pixels)
        better = found > value[at_work]
        winners = at_work[better]
        value[winners], corner[winners] = found[better], corners[better]
        kept.alpha[winners], kept.beta[winners] = now.alpha[better], now.beta[better]
        open_ = value[at_work] <= enough
        if step == iterations or not bool(open_.any()):
            break
        if int(open_.sum()) <= _WORTH_DROPPING * len(open_):
            at_work, part, now, adam = at_work[open_], part[open_], now[open_], adam[open_]
            lines, corners, weight, below = lines[open_], corners[open_], weight[open_], below[open_]
        # The gradient of the backward pass is a forward pass through the same relaxation.
        inputs = _forward(lines, network, corners, weight, below)
        adam.step(now, (weight.clamp(min=0.0) * inputs * lines.free, -lines.side * inputs), step + 1)
    return value, corner, kept


@dataclass
class _Adam:
    """Adam's averages for alpha and beta, one row a function."""

    mean: tuple[Tensor, Tensor]
    square: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, start: Multipliers) -> _Adam:
        def zeros() -> tuple[Tensor, Tensor]:
            return torch.zeros_like(start.alpha), torch.zeros_like(start.beta)

        return cls(zeros(), zeros())

    def __getitem__(self, chosen: Tensor) -> _Adam:
        mean, square = self.mean, self.square
        return _Adam((mean[0][chosen], mean[1][chosen]), (square[0][chosen], square[1][chosen]))

    def step(self, now: Multipliers, slopes: tuple[Tensor, Tensor], count: int) -> None:
        """Move the multipliers uphill, and back within their limits."""
        shrunk = DECAY ** (count - 1)
        for place, (values, length) in enumerate(((now.alpha, ALPHA_STEP), (now.beta, BETA_STEP))):
            mean, square, slope = self.mean[place], self.square[place], slopes[place]
            mean.lerp_(slope, 1 - _MEAN)
            square.mul_(_SQUARE).addcmul_(slope, slope, value=1 - _SQUARE)
            scale = (square / (1 - _SQUARE**count)).sqrt_().add_(_TINY)
            values.add_((mean / scale).mul_(length * shrunk / (1 - _MEAN**count)))
        now.alpha.clamp_(0.0, 1.0)
        now.beta.clamp_(min=0.0)


@dataclass(frozen=True)
class _Lines:
    """The two lines around each neuron of each sub-domain, (B, n): slopes, and the upper line's value at zero."""

    free: Tensor
    fixed: Tensor
    slope: Tensor
    rise: Tensor
    side: Tensor

    def __getitem__(self, chosen: Tensor) -> _Lines:
        return _Lines(self.free[chosen], self.fixed[chosen], self.slope[chosen], self.rise[chosen], self.side[chosen])

    def below(self, now: Multipliers) -> Tensor:
        """The slopes (B, n) of the lower lines."""
        return torch.where(self.free, now.alpha, self.fixed)

    @classmethod
    def of(cls, ranges: Ranges) -> _Lines:
        free = ranges.free
        on = (ranges.low >= 0).to(ranges.low.dtype)
        slope = chords(ranges)
        return cls(
            free,
            on,
            slope,
            torch.where(free, -slope * ranges.low, 0.0),
            torch.where(free, 0.0, 2 * on - 1),
        )


def _backward(lines: _Lines, network: Reduced, rows: Rows, below: Tensor, now: Multipliers) -> tuple[Tensor, ...]:
    """The bounds (B,), the coefficients (B, d) of their linear functions and the weights (B, n) on the way there.

    `below` (B, n) are the lower lines' slopes.
    """
    units = network.units
    push = lines.side * now.beta
    weight = rows.hidden.clone()
    carried = torch.empty_like(weight)
    for first, last in reversed(network.groups):
        part = slice(first, last)
        positive = weight[:, part].clamp(min=0.0)
        negative = weight[:, part] - positive
        carried[:, part] = positive * below[:, part] + negative * lines.slope[:, part] - push[:, part]
        if first:
            weight[:, :first].addmm_(carried[:, part], units.hidden[part, :first])
    pixels = torch.addmm(rows.inputs, carried, units.inputs)
    middle, radius = (network.upper + network.lower) / 2, (network.upper - network.lower) / 2
    value = rows.offset + carried @ units.offset + (weight.clamp(max=0.0) * lines.rise).sum(dim=1)
    return value + pixels @ middle - pixels.abs() @ radius, pixels, weight


def _corner(network: Reduced, pixels: Tensor) -> Tensor:
    """Where in the box linear functions with these coefficients (B, d) are least."""
    return (network.upper + network.lower) / 2 - pixels.sign() * (network.upper - network.lower) / 2


def _forward(lines: _Lines, network: Reduced, corner: Tensor, weight: Tensor, below: Tensor) -> Tensor:
    """The relaxation's own idea of each neuron's input (B, n) at the corners (B, d)."""
    units = network.units
    inputs = torch.addmm(units.offset, corner, units.inputs.T)
    outputs = torch.empty_like(inputs)
    for first, last in network.groups:
        part = slice(first, last)
        if first:
            inputs[:, part].addmm_(outputs[:, :first], units.hidden[part, :first].T)
        outputs[:, part] = torch.where(
            weight[:, part] > 0,
            below[:, part] * inputs[:, part],
            lines.slope[:, part] * inputs[:, part] + lines.rise[:, part],
        )
    return inputs
