"""The shapes of MNIST-C: warps about the middle, strokes over the digit, stripes and edges, on 28 x 28 grey images.

Mu and Gilmer, "MNIST-C: A Robustness Benchmark for Computer Vision" (2019), and its generator.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from robustboard.bench.distortions.canvas import Draws, Pixels, sampled
from robustboard.bench.distortions.edges import canny

SIDE = 28
_MIDDLE = (SIDE - 1) / 2
_STROKE = 2.3  # from this distance in pixels on, a stroke has ended


def shear(images: Pixels, angle: float, *, draws: Draws) -> Pixels:
    """Sheared by an angle in radians, to either side."""
    turned = angle * draws.signs(1, 1)
    return _warped(images, (1, -np.sin(turned)), (0, np.cos(turned)))


def rotate(images: Pixels, angle: float, *, draws: Draws) -> Pixels:
    """Rotated by an angle in radians, to either side."""
    turned = angle * draws.signs(1, 1)
    return _warped(images, (np.cos(turned), -np.sin(turned)), (np.sin(turned), np.cos(turned)))


def scale(images: Pixels, factor: float) -> Pixels:
    """Made smaller by a factor."""
    return _warped(images, (factor, 0), (0, factor))


def translate(images: Pixels, distance: float, *, draws: Draws) -> Pixels:
    """Moved by a distance in pixels along both axes, to either side."""
    across, down = np.moveaxis(distance * draws.signs(2, 1, 1), 1, 0)
    rows, columns = np.indices(images.shape[2:])
    return sampled(images, rows + down, columns + across, "constant")


def _warped(images: Pixels, across: tuple[Pixels | float, ...], down: tuple[Pixels | float, ...]) -> Pixels:
    """Read at a linear map of (x, y) about the middle; outside it is black."""
    y, x = np.indices(images.shape[2:]) - _MIDDLE
    shape = (len(images), *images.shape[2:])
    rows = np.broadcast_to(down[0] * x + down[1] * y + _MIDDLE, shape)
    columns = np.broadcast_to(across[0] * x + across[1] * y + _MIDDLE, shape)
    return sampled(images, rows, columns, "constant")


def line(images: Pixels, *, draws: Draws) -> Pixels:
    """A straight stroke from the left side to the right."""
    ends = draws.integers(0, 27, 2)
    left, right = draws.integers(0, 5), draws.integers(22, 27)
    strokes = [stroke(*points) for points in zip(left, ends[:, 0], right, ends[:, 1], strict=True)]
    return images + np.stack(strokes)[:, None]


def dotted_line(images: Pixels, *, draws: Draws) -> Pixels:
    """A stroke across the whole image, of which every other pair of columns is left out, the first to begin with."""
    ends = draws.integers(0, 27, 2)
    strokes = np.stack([stroke(0, first, 27, last) for first, last in ends])
    strokes[:, :, np.arange(SIDE) % 4 < 2] = 0
    return images + strokes[:, None]


def zigzag(images: Pixels, *, draws: Draws) -> Pixels:
    """A stroke that zigzags about a nearly level line."""
    begin = draws.integers(0, 27)
    end = begin + draws.integers(-5, 5)
    drawn = images.copy()
    for place, (first, last) in enumerate(zip(begin, end, strict=True)):
        corners = _zigzag_corners(float(first), float(last))
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            drawn[place] = np.clip(drawn[place] + stroke(x0, y0, x1, y1), 0, 1)
    return drawn


def _zigzag_corners(first: float, last: float) -> list[tuple[float, float]]:
    """The corners of a zigzag of teeth 4 wide and 2 high from (2, first) to (25, last), as (x, y)."""
    begin, end, half, tall = 2.0, 25.0, 2.0, 2.0
    theta = math.atan((last - first) / (end - begin))
    length = (end - begin) / math.cos(theta)
    teeth = int((length - half) // (2 * half)) + 1
    corners = [(0.0, 0.0)] + [((2 * i + 1) * half, (-1) ** i * tall) for i in range(teeth)]
    whole = 2 * half * (length // (2 * half))
    if length != whole:
        corners.append((length, corners[-1][1] / (2 * (length - whole))))
    cosine, sine = math.cos(theta), math.sin(theta)
    return [(cosine * x - sine * y + begin, sine * x + cosine * y + first) for x, y in corners]


def stroke(x0: float, y0: float, x1: float, y1: float) -> Pixels:
    """A stroke from one point to another on its right, (28, 28): log(1 - d / 2.3) + 1, d its vertical distance."""
    if x0 == x1:
        return np.zeros((SIDE, SIDE))
    rows, columns = np.indices((SIDE, SIDE))
    distance = np.abs(rows - ((y1 - y0) / (x1 - x0) * (columns - x0) + y0))
    painted: Pixels = np.clip(np.log(1 - np.clip(distance, 0, _STROKE - 1e-10) / _STROKE) + 1, 0, 1)
    painted[:, : math.floor(x0)] = 0
    painted[:, math.ceil(x1) :] = 0
    return painted


def stripe(images: Pixels) -> Pixels:
    """Black for white in the outer quarters."""
    striped = images.copy()
    for quarter in (slice(None, 7), slice(21, None)):
        striped[..., quarter] = 1 - images[..., quarter]
    return striped


def canny_edges(images: Pixels) -> Pixels:
    """Nothing but Canny's edges."""
    found = [canny(image[0], sigma=1.0, low=0.1, high=0.2) for image in images]
    return np.stack(found)[:, None].astype(np.float64)
