"""The proposals of Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): stripes for L-inf, bumps for L2.

The squares are the same for all examples; what they are filled with is the same for all in L-inf, and has signs of the
example's own in L2. Only the pixels inside the squares are read, written and put back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from types import EllipsisType

import torch
from torch import Tensor

from robustboard.attacks import keyed
from robustboard.attacks.threat import ThreatModel

_Area = tuple[EllipsisType, slice, slice]

_P_INIT = 0.8
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# A draw belongs to its query, however many are asked for, so tables are drawn whole, so many queries at a time.
TABLE = 500
# The L2 attack starts from at least five by five bumps.
LEAST_SIDE = 5
# Sums of squares in float32 are kept this far from the sphere, relatively, and so never count as outside it.
_L2_SLACK = 1e-5
_TINY = 1e-12


class Moves(ABC):
    """The current point of each example, and the proposals of one norm, which are written into it.

    Attributes:
        points: (N, C, H, W).
    """

    points: Tensor

    def __init__(self, threat: ThreatModel, images: Tensor, keys: Sequence[str], seed: int) -> None:
        self._threat, self._images, self._keys, self._seed = threat, images, keys, seed
        self._channels, self._height, self._width = images.shape[1:]

    @abstractmethod
    def deal(self, first: int) -> None:
        """Draw what the next queries need, from `first` on."""

    @abstractmethod
    def propose(self, place: int) -> None:
        """Write the proposal of the query at this place of the table into `points`."""

    @abstractmethod
    def settle(self, better: Tensor) -> None:
        """Take the proposal back where it is not `better`, bool (N, 1, 1, 1)."""

    @abstractmethod
    def keep(self, left: Tensor) -> None:
        """Drop all examples but those at the positions `left`, int64."""

    def _draw(self, first: int, columns: int) -> Tensor:
        """U[0, 1) of (seed, query) for the table's queries, (TABLE, columns), float64."""
        source = keyed.generator(self._seed, "square", "queries", first)
        return torch.rand(TABLE, columns, dtype=torch.float64, generator=source)

    def _areas(self, draws: Tensor, sides: Sequence[int]) -> list[_Area]:
        """Where squares of these sides lie, from draws (TABLE, 2).

        Every position inside the image is as likely as any other. The reference rounds down draws from [0, h - s), so
        that its squares never reach the last row and column (below the full size); the paper's do.
        """
        areas: list[_Area] = []
        for (down, right), side in zip(draws.tolist(), sides, strict=True):
            top, left = int(down * (self._height - side + 1)), int(right * (self._width - side + 1))
            areas.append((..., slice(top, top + side), slice(left, left + side)))
        return areas


class _Stripes(Moves):
    """L-inf: every pixel lies on its upper or lower bound; a square sets each of its channels to one of the two."""

    def __init__(self, threat: ThreatModel, images: Tensor, keys: Sequence[str], seed: int) -> None:
        super().__init__(threat, images, keys, seed)
        project = threat.projector(images)
        self._lower, self._upper = project(torch.zeros_like(images)), project(torch.ones_like(images))
        columns = keyed.uniform(keys, (self._channels, 1, self._width), seed, "square").to(images.device)
        self.points = torch.where(columns < 0, self._lower, self._upper)

    def deal(self, first: int) -> None:
        draws = self._draw(first, 2 + self._channels)
        sides = [_linf_side(first + place, self._height, self._width) for place in range(TABLE)]
        self._places = self._areas(draws[:, :2], sides)
        self._rising = (draws[:, 2:] < 0.5).view(TABLE, 1, -1, 1, 1).to(self.points.device)

    def propose(self, place: int) -> None:
        area = self._places[place]
        self._window = self.points[area]
        self._before = self._window.clone()
        torch.where(self._rising[place], self._upper[area], self._lower[area], out=self._window)

    def settle(self, better: Tensor) -> None:
        torch.where(better, self._window, self._before, out=self._window)

    def keep(self, left: Tensor) -> None:
        self.points, self._lower, self._upper = self.points[left], self._lower[left], self._upper[left]


class _Bumps(Moves):
    """L2: a square takes over the budget of another one, in the shape of two opposite bumps.

    The squared norm of each perturbation is carried along. A proposal spends all of the radius: what its two squares
    held and what clipping to the pixel box had left over. The rest of the image therefore stays as it is.
    """

    def __init__(self, threat: ThreatModel, images: Tensor, keys: Sequence[str], seed: int) -> None:
        super().__init__(threat, images, keys, seed)
        self._radius = threat.radius * (1 - _L2_SLACK)
        self._bumps: dict[int, tuple[Tensor, Tensor]] = {}
        self._flips = images.new_empty(0, len(images), self._channels, 1, 1)
        self._spent = images.new_zeros(len(images), 1, 1, 1)
        self.points = self._start()

    def _start(self) -> Tensor:
        """Bumps side by side over the whole image, each channel of each with a sign of its own."""
        side = min(self._height, self._width) // LEAST_SIDE
        down, across = self._height // side, self._width // side
        turned = torch.rand(down, across, 1, 1, generator=keyed.generator(self._seed, "square", "start")) < 0.5
        signs = _signs(keyed.uniform(self._keys, (self._channels, down, across), self._seed, "square"))
        upright, lying = _bumps(side)
        pattern = torch.where(turned, lying, upright).transpose(1, 2).reshape(down * side, across * side)
        spread = signs.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
        top, left = (self._height - down * side) // 2, (self._width - across * side) // 2
        delta = torch.zeros_like(self._images)
        # Each bump is of unit length.
        share = self._radius / math.sqrt(self._channels * down * across)
        delta[..., top : top + down * side, left : left + across * side] = (share * spread * pattern).to(delta.device)
        return (self._images + delta).clamp_(0.0, 1.0)

    def deal(self, first: int) -> None:
        draws = self._draw(first, 5)
        sides = [_l2_side(first + place, self._height, self._width) for place in range(TABLE)]
        self._places, self._others = self._areas(draws[:, :2], sides), self._areas(draws[:, 2:4], sides)
        device = self.points.device
        for side in set(sides) - self._bumps.keys():
            upright, lying = _bumps(side)
            self._bumps[side] = upright.to(device), lying.to(device)
        turned = (draws[:, 4] < 0.5).tolist()
        self._shapes = [self._bumps[side][turn] for side, turn in zip(sides, turned, strict=True)]
        own = keyed.uniform(self._keys, (TABLE, self._channels, 1, 1), self._seed, "square", "signs", first)
        self._flips = _signs(own).transpose(0, 1).contiguous().to(device)
        # Measured anew now and then, so that roundings do not add up.
        self._spent = _energy(self.points - self._images).sum(dim=1, keepdim=True)

    def propose(self, place: int) -> None:
        here, there = self._places[place], self._others[place]
        target, clean = self.points[here], self._images[here]
        source, source_clean = self.points[there], self._images[there]
        # The squares may overlap, so the first is cleared before the second is read; `settle` goes the other way.
        before, old = target.clone(), target - clean
        target.copy_(clean)
        source_before, moved = source.clone(), source - source_clean
        source.copy_(source_clean)

        held = _energy(old)
        freed = held + _energy(moved)
        unspent = (self._radius**2 - self._spent).clamp_(min=0.0)
        fresh = self._flips[place] * self._shapes[place] + old / held.sqrt().clamp_(min=_TINY)
        length = (unspent / self._channels + freed).sqrt_()
        fresh *= length / _energy(fresh).sqrt_().clamp_(min=_TINY)
        torch.add(clean, fresh, out=target).clamp_(0.0, 1.0)
        self._now_spent = self._spent + (_energy(target - clean) - freed).sum(dim=1, keepdim=True)
        self._undo = ((source, source_before), (target, before))

    def settle(self, better: Tensor) -> None:
        for window, before in self._undo:
            torch.where(better, window, before, out=window)
        self._spent = torch.where(better, self._now_spent, self._spent)

    def keep(self, left: Tensor) -> None:
        self._keys = [self._keys[place] for place in left.tolist()]
        self.points, self._images = self.points[left], self._images[left]
        self._flips, self._spent = self._flips[:, left], self._spent[left]


MOVES: dict[str, type[Moves]] = {"linf": _Stripes, "l2": _Bumps}


def _share(query: int) -> float:
    """p, the share of the pixels that a square covers."""
    return _P_INIT / 2.0 ** bisect_left(_HALVED_AFTER, query)


def _linf_side(query: int, height: int, width: int) -> int:
    side = max(round(math.sqrt(_share(query) * height * width)), 1)
    return min(side, height, width)


def _l2_side(query: int, height: int, width: int) -> int:
    """Odd, for a bump has a middle, unless the image is in the way."""
    side = max(round(math.sqrt(_share(query) * height * width)), 3)
    return min(side + 1 - side % 2, height, width)


def _energy(delta: Tensor) -> Tensor:
    """The squared L2 norm of each channel, (N, C, 1, 1)."""
    return delta.square().sum(dim=(2, 3), keepdim=True)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0, -1.0, 1.0)


def _bumps(side: int) -> tuple[Tensor, Tensor]:
    """Two opposite bumps that fill a square, one above the other and one beside the other; each of unit L2 norm."""
    pair = torch.cat([_bump(side // 2, side), -_bump(side - side // 2, side)])
    upright = pair / torch.linalg.vector_norm(pair)
    return upright, upright.T.contiguous()


def _bump(height: int, width: int) -> Tensor:
    """The paper's eta: from the middle outward the rings fall off like the tails of the sum of 1 / k^2."""
    down, across = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    rings = torch.maximum(down[:, None], across[None, :])
    terms = 1.0 / torch.arange(1, max(height, width) // 2 + 2) ** 2
    heights = terms.flip(0).cumsum(0).flip(0)[rings]
    bump: Tensor = heights / torch.linalg.vector_norm(heights)
    return bump
