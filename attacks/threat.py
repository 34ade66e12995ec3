"""The threat model: which perturbed images an adversary may present, to the last bit.

A perturbation of an image `x` is allowed when it stays in the L-inf or L2 ball of radius `eps` around `x` and in the
pixel box [0, 1]. Everything that constructs perturbed images rounds inward, so that an example found is inside the ball
in exact arithmetic; everything that bounds the ball rounds outward, so that a certificate covers all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from robustboard.errors import TrackError

Norm = Literal["linf", "l2"]

# No image in the pixel box is farther from another: that would take 10^12 pixels.
_LARGEST_L2 = 10**6
_LONGEST_TEXT = 200
_LARGEST_EXPONENT = 99


@dataclass(frozen=True)
class ThreatModel:
    """An eps-ball of one norm, intersected with the pixel box [0, 1].

    Attributes:
        norm: `"linf"` or `"l2"` (over all channels and pixels of one image).
        eps: the radius in pixel units of [0, 1], an exact fraction.

    Raises:
        TrackError: for another norm, or a radius that is not a positive fraction (at most 1 for L-inf) of a size
            that float32 can hold.

    >>> ThreatModel.parse("linf", "8/255").eps
    Fraction(8, 255)
    """

    norm: Norm
    eps: Fraction

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise TrackError(f"The norm {self.norm!r} is not one of linf and l2.")
        if type(self.eps) is not Fraction:
            raise TrackError(f"The radius eps must be an exact Fraction(8, 255), not {self.eps!r}.")
        if self.eps <= 0:
            raise TrackError(f"The radius eps must be a positive fraction such as 8/255, not {self.eps}.")
        if self.norm == "linf" and self.eps > 1:
            raise TrackError(f"The radius eps is in pixel units of [0, 1], such as 8/255, so {self.eps} is too large.")
        if self.eps > _LARGEST_L2:
            raise TrackError(f"The radius eps is too large: no images are farther apart than {_LARGEST_L2}.")
        if self.radius == 0:
            raise TrackError("The radius eps is too small: rounded to float32 it is 0.")

    @classmethod
    def parse(cls, norm: object, eps: object) -> ThreatModel:
        """Read a threat model from text such as `("linf", "8/255")`; decimals such as "1.785/255" are exact too.

        Raises:
            TrackError: if eps is not such a text (a binary float would not be exact, so it is refused).
        """
        if isinstance(eps, bool) or not isinstance(eps, str | int | Fraction):
            raise TrackError(f'The radius eps must be an exact fraction in quotes, such as "8/255", not {eps!r}.')
        try:
            text = str(eps)
            if len(text) > _LONGEST_TEXT:
                raise ValueError("too long")
            above, slash, below = text.partition("/")
            # Each side is a number of its own: Fraction("1/2") below the line would read "1/1/2" as two.
            if "/" in below:
                raise ValueError("two division signs")
            value = _exact(above) / (_exact(below) if slash else 1)
        except (ValueError, ZeroDivisionError) as error:
            raise TrackError(f'The radius eps must be a fraction such as "8/255", not {_shown(eps)}.') from error
        return cls(cast("Norm", norm), value)

    @property
    def radius(self) -> float:
        """The largest float32 that does not exceed eps."""
        nearest = torch.tensor(float(self.eps), dtype=torch.float32)
        if Fraction(nearest.item()) > self.eps:
            nearest = torch.nextafter(nearest, torch.tensor(0.0))
        return float(nearest.item())

    @property
    def text(self) -> str:
        """The radius as the field writes it.

        >>> [ThreatModel.parse("linf", eps).text for eps in ("8/255", "0.1", "5/255", "1.785/255", "1/700")]
        ['8/255', '1/10', '5/255', '1.785/255', '1/700']
        """
        levels = self.eps * 255
        if levels.denominator == 1 and self.eps.denominator > 5:
            return f"{levels}/255"
        decimal = f"{float(levels):g}"
        if self.eps.denominator > 100 and Fraction(decimal) == levels:
            return f"{decimal}/255"
        return str(self.eps)

    def scaled(self, factor: Fraction | int) -> ThreatModel:
        """The same norm with `factor` times the radius."""
        return ThreatModel(self.norm, self.eps * factor)

    def project(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """Allowed images near `perturbed`, rounded inward; shapes (N, C, H, W), float32.

        For L-inf these are the nearest ones. For L2 the image is clipped to the pixel box and then drawn straight
        towards the clean image, which keeps the whole radius in use at the pixels that are still free to move.
        """
        return self.projector(images)(perturbed)

    def projector(self, images: Tensor) -> Projector:
        """`project` around fixed images, for loops: the set-up is done once."""
        exact = images.double()
        if self.norm == "linf":
            lower, upper = (exact - self.radius).float(), (exact + self.radius).float()
            lower = torch.where(lower.double() < exact - self.radius, _next(lower, math.inf), lower).clamp(min=0.0)
            upper = torch.where(upper.double() > exact + self.radius, _next(upper, -math.inf), upper).clamp(max=1.0)
            return _ToBox(lower, upper)
        # Rounding a pixel of [0, 1] to float32 moves it by at most 2^-25, and all of them by at most this. What was
        # outside is drawn in further than that, so that it counts as inside from then on.
        rounding = math.sqrt(images[:1].numel()) * 2.0**-25
        return _ToBall(exact, self.radius - rounding, max(self.radius - 3 * rounding, 0.0))

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """A random start inside the ball.

        Args:
            images: (N, C, H, W).
            noise: the same shape; uniform on [-1, 1] for L-inf. For L2 a standard normal direction, which is scaled to
                the sphere (in hundreds of dimensions nearly all of a ball lies next to it).
        """
        if self.norm == "linf":
            return self.project(images + self.radius * noise, images)
        lengths = _norm(noise).float().clamp(min=1e-12).view(-1, *[1] * (images.dim() - 1))
        return self.project(images + self.radius * noise / lengths, images)

    def contains(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """Whether each perturbed image is allowed, a boolean (N,): no tolerance, NaN is outside.

        The arithmetic is float64's: for L-inf that decides exactly, for L2 up to a relative error of about 1e-16.
        """
        in_box = ((perturbed >= 0) & (perturbed <= 1)).flatten(1).all(dim=1)
        return in_box & (self.distance(perturbed, images) <= self.radius)

    def distance(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """The norm of each perturbation in float64, shape (N,)."""
        delta = perturbed.double() - images.double()
        return delta.flatten(1).abs().amax(dim=1) if self.norm == "linf" else _norm(delta)

    def outer_box(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 (lower, upper), each (N, C, H, W): a box around everything that is allowed, rounded outward.

        For L2 this is the box around the ball, which only box methods such as IBP may use.
        """
        reach = float(self.eps)
        reach = reach if Fraction(reach) >= self.eps else math.nextafter(reach, math.inf)
        # One step outward in float64 covers the rounding of the sum itself, one in float32 that of the conversion.
        lower = _next(images.double() - reach, -math.inf)
        upper = _next(images.double() + reach, math.inf)
        low, high = lower.float(), upper.float()
        low = torch.where(low.double() > lower, _next(low, -math.inf), low)
        high = torch.where(high.double() < upper, _next(high, math.inf), high)
        return low.clamp(min=0.0), high.clamp(max=1.0)


class Projector(Protocol):
    """`ThreatModel.project` around fixed images."""

    def __call__(self, perturbed: Tensor) -> Tensor:
        """Allowed images near `perturbed`, (N, C, H, W)."""

    def of(self, rows: Tensor) -> Projector:
        """The same around some of the images, by their positions or a mask."""


@dataclass(frozen=True)
class _ToBox:
    lower: Tensor
    upper: Tensor

    def __call__(self, perturbed: Tensor) -> Tensor:
        return perturbed.clamp(self.lower, self.upper)

    def of(self, rows: Tensor) -> _ToBox:
        return _ToBox(self.lower[rows], self.upper[rows])


@dataclass(frozen=True)
class _ToBall:
    """Into the pixel box and then the L2 ball: norms up to `keep` stay, longer ones become `target`."""

    exact: Tensor
    keep: float
    target: float

    def __call__(self, perturbed: Tensor) -> Tensor:
        column = (-1, *[1] * (self.exact.dim() - 1))
        inside = perturbed.clamp(0.0, 1.0)
        delta = inside.double() - self.exact
        norms = _norm(delta)
        share = (self.target / norms.clamp(min=1e-300)).view(column)
        return torch.where((norms <= self.keep).view(column), inside, (self.exact + delta * share).float())

    def of(self, rows: Tensor) -> _ToBall:
        return _ToBall(self.exact[rows], self.keep, self.target)


def _shown(eps: str | int | Fraction) -> str:
    if isinstance(eps, str):
        return repr(eps) if len(eps) <= _LONGEST_TEXT else f"a text of {len(eps)} characters"
    return "a number of so many digits"


def _exact(text: str) -> Fraction:
    """A decimal or whole number; one with a huge exponent would fill the memory with its digits."""
    _, has_exponent, exponent = text.lower().partition("e")
    if has_exponent and abs(int(exponent)) > _LARGEST_EXPONENT:
        raise ValueError("the exponent is too large")
    return Fraction(text.strip())


def _norm(delta: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(delta.double().flatten(1), dim=1)
    return norms


def _next(values: Tensor, towards: float) -> Tensor:
    return torch.nextafter(values, torch.full_like(values, towards))
