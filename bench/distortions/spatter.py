"""Spatter: drops of water or mud on the lens. Hendrycks and Dietterich's generator (additional corruptions)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.ndimage import correlate, distance_transform_edt, sobel, uniform_filter

from robustboard.bench.distortions.canvas import (
    Draws,
    Pixels,
    levels,
    require_colours,
    scaled,
    scaled_sigma,
    smooth,
    steadied,
    tint,
)
from robustboard.bench.distortions.edges import Plane, linked

Colour = tuple[float, float, float]

_WATER: Colour = (175, 238, 238)
MUD: Colour = (63, 42, 20)

# Lights each drop from its lower right; the generators of CIFAR-10-C and of ImageNet-C differ in the middle entry.
_LIGHT = np.array([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]])
_CANNY = (50, 150)
_FARTHEST = 20


def spatter(
    images: Pixels,
    mean: float,
    spread: float,
    sigma: float,
    threshold: float,
    strength: float,
    mud: float,
    *,
    draws: Draws,
    scale: float,
    liquid: Literal["table", "mud"] = "table",
    colour: Colour = MUD,
) -> Pixels:
    """Drops: where a smoothed normal layer is above the threshold.

    Args:
        images: (N, C, H, W), grey or RGB.
        mean: of the layer.
        spread: its standard deviation.
        sigma: of its smoothing, in pixels.
        threshold: above it there is liquid.
        strength: how opaque water is; for mud, the sigma in pixels that softens its rim.
        mud: 1 for mud, 0 for water.
        draws: of the layer.
        scale: an image's side over that of the size for which the table was made.
        liquid: `"mud"` throws mud whatever the table says, as MNIST-C's generator does.
        colour: of the mud, in 0..255.
    """
    require_colours(images, "spatter")
    wide = scaled_sigma(sigma, scale)
    layer = smooth(mean + spread * steadied(sigma, wide) * draws.normal(1, *images.shape[2:]), wide)
    layer[layer < threshold] = 0
    if mud or liquid == "mud":
        cover = smooth((layer > threshold).astype(np.float64), scaled_sigma(strength, scale))
        cover[cover < 0.8] = 0
        return images * (1 - cover) + tint(images, colour) * cover
    wet = np.stack([_drops(plane, scaled(_FARTHEST, scale)) for plane in layer[:, 0]])[:, None]
    return images + strength * wet * tint(images, _WATER)


def _drops(layer: Plane, farthest: float) -> Plane:
    """How wet each pixel is, 0 to 1: the layer times a relief made of the distance to the drops' edges."""
    depth = levels(layer)
    down, right = (sobel(depth, axis=axis, mode="nearest") for axis in (0, 1))
    edges = linked(down, right, np.abs(down) + np.abs(right), low=_CANNY[0], high=_CANNY[1])
    distance = np.minimum(distance_transform_edt(~edges), farthest) if edges.any() else np.full(layer.shape, farthest)
    # Cut to whole numbers; a mean that should be whole must not fall below it by the rounding of sums.
    relief = _equalised(np.floor(uniform_filter(distance, 3, mode="mirror") + 1e-9))
    lit = np.clip(correlate(relief, _LIGHT, mode="mirror"), 0, 255)
    wet: Plane = depth * np.rint(uniform_filter(lit, 3, mode="mirror"))
    return wet / wet.max() if wet.max() > 0 else wet


def _equalised(plane: Plane) -> Plane:
    """Whole levels spread over 0..255 so that each is as common as another; a single level becomes 0."""
    places = plane.astype(np.int64)
    below = np.cumsum(np.bincount(places.ravel()))
    first = below[places.min()]
    if below[-1] == first:
        return np.zeros_like(plane)
    spread: Plane = np.rint((below[places] - first) * (255 / (below[-1] - first)))
    return spread
