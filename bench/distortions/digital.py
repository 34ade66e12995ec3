"""Digital: contrast, saturation, elastic deformation, pixels, JPEG and few grey levels.

Hendrycks and Dietterich (ICLR 2019), appendix B; `quantize` and `inverse` are Mu and Gilmer's, "MNIST-C" (2019).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from robustboard.bench.distortions.canvas import (
    BT_601,
    BT_709,
    Border,
    Draws,
    Pixels,
    luma,
    require_colours,
    sampled,
    smooth,
    steadied,
)

Picture = Image.Image


def contrast(images: Pixels, factor: float) -> Pixels:
    """Every pixel drawn towards the mean of its channel."""
    count, channels, height, width = images.shape
    means = images.reshape(count * channels, height * width).mean(axis=1).reshape(count, channels, 1, 1)
    drawn: Pixels = (images - means) * factor + means
    return drawn


def saturate(images: Pixels, factor: float, addend: float, *, of: Literal["saturation", "hsv"]) -> Pixels:
    """S of HSV times `factor` plus `addend`; `of="hsv"` does the same to all three, as MNIST-C's generator does.

    A grey image is taken as red = green = blue, and comes back as its luma.
    """
    require_colours(images, "saturate")
    red, green, blue = np.broadcast_to(images, (len(images), 3, *images.shape[2:])).transpose(1, 0, 2, 3)
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(spread > 0, spread, 1)
    sector = np.select([value == red, value == green], [(green - blue) / safe, 2 + (blue - red) / safe])
    sector = np.where((value != red) & (value != green), 4 + (red - green) / safe, sector)
    hue = np.where(spread > 0, sector / 6 % 1, 0)
    saturation = np.clip(spread / np.where(value > 0, value, 1) * factor + addend, 0, 1)
    if of == "hsv":
        hue, value = np.clip(hue * factor + addend, 0, 1), np.clip(value * factor + addend, 0, 1)
    # Each channel falls from V by S V at the hues opposite to it.
    channels = []
    for offset in (5, 3, 1):
        turn = (offset + 6 * hue) % 6
        channels.append(value * (1 - saturation * np.clip(np.minimum(turn, 4 - turn), 0, 1)))
    coloured = np.stack(channels, axis=1)
    return coloured if images.shape[1] == 3 else luma(coloured, BT_709 if of == "hsv" else BT_601)


def elastic_transform(
    images: Pixels,
    strength: float,
    sigma: float,
    slant: float,
    *,
    draws: Draws,
    border: tuple[Border, Border],
    reference: int,
) -> Pixels:
    """A random affine map, then a smooth random displacement of every pixel; all lengths in image sides.

    Args:
        images: (N, C, H, W).
        strength: of the displacement.
        sigma: of its smoothing.
        slant: how far each of three points of the affine map may go.
        draws: of both.
        border: what lies outside for the affine map, and for the displacement.
        reference: the side in pixels for which the table was made.
    """
    count, _, height, width = images.shape
    side = min(height, width)
    rows, columns = (np.broadcast_to(grid, (count, height, width)) for grid in np.indices((height, width)))
    moved = slant * side * (2 * draws.uniform(3, 2) - 1)
    bent = sampled(images, *_affine(moved, rows, columns), border[0])
    if strength == 0:
        return bent
    rough = 2 * draws.uniform(2, height, width) - 1
    reach = strength * side * steadied(sigma * reference, sigma * side)
    displacements = reach * smooth(rough, sigma * side, mode="reflect", truncate=3.0)
    return sampled(bent, rows + displacements[:, 1], columns + displacements[:, 0], border[1])


def _affine(moved: Pixels, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> tuple[Pixels, Pixels]:
    """Where each pixel comes from when three points around the middle go by `moved`, (N, 3, 2) as (x, y)."""
    height, width = rows.shape[1:]
    middle, reach = np.array([width // 2, height // 2], dtype=np.float64), max(min(height, width) // 3, 1)
    points = middle + reach * np.array([[1.0, 1], [1, -1], [-1, -1]])
    targets = points + moved
    # The points differ by (0, 2 reach) and by (2 reach, 2 reach), so the map's columns are differences of targets.
    second = (targets[:, 0] - targets[:, 1]) / (2 * reach)
    first = (targets[:, 0] - targets[:, 2]) / (2 * reach) - second
    shift = targets[:, 0] - first * points[0, 0] - second * points[0, 1]
    determinant = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    across, along = columns - shift[:, 0, None, None], rows - shift[:, 1, None, None]
    a, b, c, d, divisor = (
        part[:, None, None] for part in (first[:, 0], first[:, 1], second[:, 0], second[:, 1], determinant)
    )
    return (a * along - b * across) / divisor, (d * across - c * along) / divisor


def pixelate(images: Pixels, factor: float, *, scale: float) -> Pixels:
    """Made smaller and large again by Pillow with its box filter, which works on bytes.

    The blocks, 1 / factor pixels wide, grow with images that are larger than the table's, and never shrink.
    """
    factor /= max(scale, 1)

    def coarse(picture: Picture) -> Picture:
        size = (max(int(picture.width * factor), 1), max(int(picture.height * factor), 1))
        return picture.resize(size, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)

    return _through_pillow(images, "pixelate", coarse)


def jpeg_compression(images: Pixels, quality: float) -> Pixels:
    """Encoded and decoded by Pillow at this quality, with its default chroma subsampling."""

    def coded(picture: Picture) -> Picture:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(quality))
        decoded = Image.open(stream)
        decoded.load()
        return decoded

    return _through_pillow(images, "jpeg_compression", coded)


def _through_pillow(images: Pixels, corruption: str, change: Callable[[Picture], Picture]) -> Pixels:
    """Apply what Pillow does to one picture of bytes to each image of a batch."""
    require_colours(images, corruption)
    changed = np.empty_like(images)
    for place, raster in enumerate(np.rint(images * 255).astype(np.uint8)):
        grey = len(raster) == 1
        picture = Image.fromarray(raster[0] if grey else np.ascontiguousarray(raster.transpose(1, 2, 0)))
        pixels = np.asarray(change(picture), dtype=np.float64) / 255
        changed[place] = pixels[None] if grey else pixels.transpose(2, 0, 1)
    return changed


def quantize(images: Pixels, bits: float) -> Pixels:
    """Rounded to 2^bits evenly spaced levels."""
    steps = 2**bits - 1
    return np.rint(images * steps) / steps


def inverse(images: Pixels) -> Pixels:
    """Black for white."""
    return 1 - images
