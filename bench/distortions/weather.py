"""Weather: snow, frost, fog and a change of light. Hendrycks and Dietterich (ICLR 2019), appendix B.

The originals lay photographs of frosted panes over an image. They are not ours to give away, so our frost is drawn: the
labels of the sets say so. Everything else follows the generators' formulas.
"""

from __future__ import annotations

import numpy as np

from robustboard.bench.distortions.canvas import (
    Draws,
    Pixels,
    drag,
    enlarged,
    levels,
    luma,
    require_colours,
    scaled,
    scaled_sigma,
    smooth,
)

# How far apart ice crystals stand, in pixels of a 32-pixel image, and what share of the texture each spacing makes up.
_CRYSTALS = ((0.7, 0.25), (1.5, 0.35), (4.0, 0.4))
_ICE = (0.86, 0.95, 1.0)


def snow(
    images: Pixels,
    mean: float,
    spread: float,
    flake: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
    *,
    draws: Draws,
    scale: float,
) -> Pixels:
    """Streaks of snow over a whitened image.

    Args:
        images: (N, C, H, W), grey or RGB.
        mean: of the normal layer that flakes are cut from.
        spread: its standard deviation.
        flake: how much the layer is enlarged.
        threshold: what lies below it is no flake.
        radius: of the motion, in pixels.
        sigma: of the motion, in pixels.
        keep: the share of the image that is not whitened.
        draws: of the layer and of the motion's direction, between 45 and 135 degrees downwards.
        scale: an image's side over that of the size for which the table was made.
    """
    require_colours(images, "snow")
    height, width = images.shape[2:]
    layer = enlarged(mean + spread * draws.normal(1, height, width), scaled(flake, scale))
    layer[layer < threshold] = 0
    layer = levels(layer) / 255  # the original's layer passes through a file of bytes
    layer = drag(layer, scaled(radius, scale), scaled_sigma(sigma, scale), -45 - 90 * draws.uniform())
    whitened = keep * images + (1 - keep) * np.maximum(images, luma(images) * 1.5 + 0.5)
    return whitened + layer + layer[:, :, ::-1, ::-1]


def frost(images: Pixels, keep: float, ice: float, *, draws: Draws, scale: float) -> Pixels:
    """Ice on the pane: the image dimmed to `keep`, plus `ice` times a drawn texture."""
    require_colours(images, "frost")
    return keep * images + ice * _pane(images, draws, scale)


def _pane(images: Pixels, draws: Draws, scale: float) -> Pixels:
    """A texture of bluish ridges at three spacings, thicker towards one side, (N, C, H, W) in [0, 1]."""
    height, width = images.shape[2:]
    texture = np.zeros((len(images), 1, height, width))
    for spacing, weight in _CRYSTALS:
        hills = smooth(draws.normal(1, height, width), scaled_sigma(spacing, scale), mode="reflect")
        hills /= np.abs(hills).max(axis=(2, 3), keepdims=True)
        texture += weight * (1 - np.abs(hills)) ** 3
    angle = 2 * np.pi * draws.uniform(1, 1, 1)
    down, right = np.meshgrid(np.linspace(-0.5, 0.5, height), np.linspace(-0.5, 0.5, width), indexing="ij")
    slope = 1 + 0.6 * (np.sin(angle) * down + np.cos(angle) * right)
    pane = np.clip(texture * slope, 0, 1)
    return pane if images.shape[1] == 1 else pane * np.array(_ICE).reshape(1, 3, 1, 1)


def fog(images: Pixels, amount: float, decay: float, *, draws: Draws, maps: int = 1) -> Pixels:
    """A fractal haze, after which the brightest value is what it was.

    Args:
        images: (N, C, H, W).
        amount: how much haze.
        decay: by what the fractal's roughness falls from each level to the next.
        draws: of the fractal.
        maps: the fractal's side in image sides (rounded up to a power of two); its corner is used.
    """
    height, width = images.shape[2:]
    side = maps * 2 ** (max(height, width) - 1).bit_length()
    haze = plasma(draws, side, decay)[:, None, :height, :width]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    hazy: Pixels = (images + amount * haze) * brightest / (brightest + amount)
    return hazy


def plasma(draws: Draws, side: int, decay: float) -> Pixels:
    """Plasma fractals by the diamond-square algorithm on a torus, (N, side, side) in [0, 1]; side a power of two.

    As in the originals the roughness enters squared: it scales both the draw and the draw's range.
    """
    step, rough = side, 100.0
    heights = np.zeros((len(draws), side, side))
    while step >= 2:
        half = step // 2

        def wobbled(total: Pixels, height: float = rough**2) -> Pixels:
            return total / 4 + height * (2 * draws.uniform(*total.shape[1:]) - 1)

        corners = heights[:, ::step, ::step]
        right = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = wobbled(right + np.roll(right, -1, axis=2))
        middles = heights[:, half::step, half::step]
        beside = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        heights[:, ::step, half::step] = wobbled(beside)
        under = middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, ::step] = wobbled(under)
        step, rough = half, rough / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    highest: Pixels = heights.max(axis=(1, 2), keepdims=True)
    return heights / highest


def brightness(images: Pixels, amount: float) -> Pixels:
    """`amount` added to V of HSV: hue and saturation stay, so the channels keep their ratios; black becomes grey."""
    value = images.max(axis=1, keepdims=True)
    ratios = np.divide(images, value, out=np.ones_like(images), where=value > 0)
    lit: Pixels = ratios * np.clip(value + amount, 0, 1)
    return lit
