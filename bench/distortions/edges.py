"""Canny's edge detector, for the corruptions that draw edges. J. Canny (IEEE PAMI, 1986)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, label, sobel

Plane = npt.NDArray[np.float64]
"""One channel of one image, (H, W)."""

Mask = npt.NDArray[np.bool_]

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


def canny(plane: Plane, *, sigma: float, low: float, high: float) -> Mask:
    """The edges of a plane that is smoothed first, as skimage.feature.canny has them; the outermost pixels are none.

    Args:
        plane: (H, W), in [0, 1].
        sigma: of the Gaussian; what it would read outside the plane is left out of its mean.
        low: the gradient (Sobel's sums, not divided) that continues an edge.
        high: the gradient that begins one.
    """
    inside = gaussian_filter(np.ones_like(plane), sigma, mode="constant")
    smoothed = gaussian_filter(plane, sigma, mode="constant") / (inside + np.finfo(float).eps)
    down, right = sobel(smoothed, axis=0), sobel(smoothed, axis=1)
    return linked(down, right, np.hypot(down, right), low=low, high=high)


def linked(down: Plane, right: Plane, strength: Plane, *, low: float, high: float) -> Mask:
    """Ridges of the gradient's strength, followed from where it reaches `high` as long as it stays at `low`.

    A pixel is on a ridge if no neighbour across it is stronger; neighbours are interpolated along the gradient. Both
    sides of a symmetric step are equally strong and both count, whatever the rounding of sums says.
    """
    ridge = np.zeros(strength.shape, dtype=bool)
    if min(strength.shape) > 2:
        ahead, behind = (_across(down, right, strength, sign) for sign in (1, -1))
        middle = strength[1:-1, 1:-1]
        rounded = middle * (1 + 1e-9)
        ridge[1:-1, 1:-1] = (middle >= low) & (rounded >= ahead) & (rounded >= behind)
    ridge &= strength > 0
    groups, _ = label(ridge, structure=_EIGHT_NEIGHBOURS)
    begun = np.unique(groups[ridge & (strength >= high)])
    found: Mask = np.isin(groups, begun[begun > 0])
    return found


def _across(down: Plane, right: Plane, strength: Plane, sign: int) -> Plane:
    """The strength one step along (or against) the gradient of every inner pixel, between the two nearest pixels."""
    y, x = down[1:-1, 1:-1], right[1:-1, 1:-1]
    steep = np.abs(y) > np.abs(x)
    major, minor = np.where(steep, np.abs(y), np.abs(x)), np.where(steep, np.abs(x), np.abs(y))
    slant = np.divide(minor, major, out=np.zeros_like(major), where=major > 0)
    rows, columns = np.indices(strength.shape)[:, 1:-1, 1:-1]
    dy, dx = sign * np.sign(y).astype(int), sign * np.sign(x).astype(int)
    straight = strength[rows + np.where(steep, dy, 0), columns + np.where(steep, 0, dx)]
    diagonal = strength[rows + dy, columns + dx]
    between: Plane = straight * (1 - slant) + diagonal * slant
    return between
