"""Blur: Gaussian, defocus, frosted glass, motion and zoom. Hendrycks and Dietterich (ICLR 2019), appendix B.

`scale` is an image's side over that of the size for which a table was made; lengths in pixels follow it.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.ndimage import correlate1d

from robustboard.bench.distortions.canvas import Draws, Pixels, drag, enlarged, levels, scaled, scaled_sigma, smooth

Exchange = Literal["duplicate", "swap"]


def gaussian_blur(images: Pixels, sigma: float, *, scale: float) -> Pixels:
    """A Gaussian blur within each channel; edges are repeated."""
    return smooth(images, sigma * scale)


def defocus_blur(images: Pixels, radius: float, alias: float, *, scale: float) -> Pixels:
    """An aperture's disk, itself blurred by a narrow Gaussian against jagged edges.

    At side 32 the disks of the first three severities are a single pixel, so that all of the blur is the Gaussian's;
    so they stay on larger images. Other disks scale by their rim, half a pixel beyond the last pixel's centre.
    """
    if radius >= 1:
        radius = max((radius + 0.5) * scale - 0.5, 1)
    alias = scaled_sigma(alias, scale)
    fringe = max(round(scale), 1) * (1 if radius <= 8 * max(scale, 1) else 2)
    reach = math.floor(radius)
    places = np.arange(-reach, reach + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    weights = np.exp(-(np.arange(-fringe, fringe + 1) ** 2) / (2 * alias**2))
    weights /= weights.sum()
    blurred = _by_runs(images, disk / disk.sum())
    for axis in (2, 3):
        blurred = correlate1d(blurred, weights, axis=axis, mode="mirror")
    return blurred


def _by_runs(images: Pixels, disk: Pixels) -> Pixels:
    """Correlation with a small kernel, a shifted copy for each of its pixels; edges are mirrored."""
    reach = len(disk) // 2
    if reach == 0:
        return images
    height, width = images.shape[2:]
    # Wider than the image, a mirror needs more than one reflection, which numpy's padding does.
    wide = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    total = np.zeros_like(images)
    for row, column in zip(*np.nonzero(disk), strict=True):
        total += disk[row, column] * wide[:, :, row : row + height, column : column + width]
    return total


def glass_blur(
    images: Pixels,
    sigma: float,
    delta: float,
    iterations: float,
    *,
    draws: Draws,
    scale: float,
    exchange: Exchange,
    share: float = 1.0,
) -> Pixels:
    """Frosted glass: a blur, pixels that trade places with near ones, a blur.

    Args:
        images: (N, C, H, W).
        sigma: of both blurs.
        delta: how far a pixel may go, in pixels; the original draws from -delta to delta - 1.
        iterations: how often every pixel has its turn.
        draws: of the offsets.
        scale: see the module.
        exchange: `"duplicate"` copies the near pixel and leaves it where it is, as CIFAR-10-C's generator does by an
            aliased assignment; `"swap"` exchanges both, which that generator means to do and MNIST-C's does.
        share: the share of turns that are taken.
    """
    sigma, reach, turns = scaled_sigma(sigma, scale), max(round(delta * scale), 1), int(iterations)
    count, _, height, width = images.shape
    # Pixel by pixel, then image, then channel: a turn moves one pixel of every image at once.
    pixels = levels(smooth(images, sigma)).transpose(2, 3, 0, 1).copy()
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    offsets = draws.integers(-reach, reach, turns, len(rows), len(columns), 2)
    taken = np.ones(offsets.shape[:-1], dtype=bool)
    if share < 1:
        taken = draws.uniform(turns, len(rows), len(columns)) < share
    everyone = np.arange(count)
    for turn in range(turns):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                moved = everyone[taken[:, turn, i, j]]
                down, right = offsets[moved, turn, i, j].T
                near = pixels[row + down, column + right, moved]
                if exchange == "swap":
                    pixels[row + down, column + right, moved] = pixels[row, column, moved]
                pixels[row, column, moved] = near
    return smooth(pixels.transpose(2, 3, 0, 1) / 255.0, sigma)


def motion_blur(images: Pixels, radius: float, sigma: float, *, draws: Draws, scale: float) -> Pixels:
    """Motion along a direction of its own for every image, within 45 degrees of the horizontal."""
    angle = 90 * draws.uniform() - 45
    return drag(images, scaled(radius, scale), scaled_sigma(sigma, scale), angle)


def zoom_blur(images: Pixels, largest: float, step: float, *, last: Literal["original", "excluded"]) -> Pixels:
    """The mean of an image and its enlargements by 1, 1 + step, ... up to `largest`.

    The originals count with floats: `arange(1, 1.06, 0.01)` ends beyond 1.05 or not as rounding has it. `"original"`
    does the same, `"excluded"` leaves the largest out always.
    """
    # numpy's rule, in floats that no compiler may contract: round(26 * 1.25) hangs on the last bit.
    increment = (1 + step) - 1
    factors = [1 + i * increment for i in range(math.ceil((largest - 1) / step))]
    if last == "excluded":
        factors = [factor for factor in factors if factor < largest - step / 2]
    total = images.copy()
    for factor in factors:
        total += enlarged(images, factor)
    return total / (len(factors) + 1)
