"""The severity tables of CIFAR-10-C and MNIST-C, and how each entry is applied.

CIFAR-10-C: Hendrycks and Dietterich (ICLR 2019), from their generator `make_cifar_c.py`. MNIST-C: Mu and Gilmer (2019),
from their generator `corruptions.py`, which takes most of its numbers from ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from robustboard.bench.distortions import blur, digital, noise, shapes, weather
from robustboard.bench.distortions.canvas import Draws, Pixels
from robustboard.bench.distortions.spatter import spatter


@dataclass(frozen=True)
class Quirks:
    """Where the generators do something that they may not have meant; by default it is done as they do.

    Attributes:
        rounding: of uint8 results; the originals truncate, so that most images come out half a level darker.
        glass: whether glass blur copies pixels (CIFAR-10-C, by an aliased assignment) or swaps them (MNIST-C).
        zoom: whether zoom blur's largest factor is left out always, or as floating-point rounding has it.
        spatter: whether MNIST-C's spatter is mud always, or as its table says.
    """

    rounding: Literal["truncate", "nearest"] = "truncate"
    glass: Literal["original", "duplicate", "swap"] = "original"
    zoom: Literal["original", "excluded"] = "original"
    spatter: Literal["original", "table"] = "original"


@dataclass(frozen=True)
class Setting:
    """What a distortion is applied with: the images' draws, their side over the table's, and the quirks."""

    draws: Draws
    scale: float
    quirks: Quirks


Apply = Callable[[Pixels, tuple[float, ...], Setting], Pixels]


@dataclass(frozen=True)
class Corruption:
    """One corruption of one table.

    Attributes:
        parameters: those of severity 1, 2, ...; what has no severity has a single entry.
        apply: (images, parameters, setting) -> images, which need not be clipped.
        fixed: the severity that MNIST-C's generator has by default.
        smallest: the smallest side of an image that it can work on.
        guarded: whether whole levels are kept from the rounding of sums when a result is cut to bytes; the first
            corruptions of the board were released without.
    """

    parameters: tuple[tuple[float, ...], ...]
    apply: Apply
    fixed: int = 1
    smallest: int = 8
    guarded: bool = True


def _each(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


def _glass(quirks: Quirks, original: blur.Exchange) -> blur.Exchange:
    return original if quirks.glass == "original" else quirks.glass


CIFAR_10_C: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": Corruption(
            _each(0.04, 0.06, 0.08, 0.09, 0.10),
            lambda images, c, at: noise.gaussian_noise(images, *c, draws=at.draws),
            smallest=1,
            guarded=False,
        ),
        "shot_noise": Corruption(
            _each(500, 250, 100, 75, 50), lambda images, c, at: noise.shot_noise(images, *c, draws=at.draws)
        ),
        "impulse_noise": Corruption(
            _each(0.01, 0.02, 0.03, 0.05, 0.07), lambda images, c, at: noise.impulse_noise(images, *c, draws=at.draws)
        ),
        "defocus_blur": Corruption(
            ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            lambda images, c, at: blur.defocus_blur(images, *c, scale=at.scale),
        ),
        "glass_blur": Corruption(
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            lambda images, c, at: blur.glass_blur(
                images, *c, draws=at.draws, scale=at.scale, exchange=_glass(at.quirks, "duplicate")
            ),
        ),
        "motion_blur": Corruption(
            ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            lambda images, c, at: blur.motion_blur(images, *c, draws=at.draws, scale=at.scale),
        ),
        "zoom_blur": Corruption(
            ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
            lambda images, c, at: blur.zoom_blur(images, *c, last=at.quirks.zoom),
        ),
        "snow": Corruption(
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            lambda images, c, at: weather.snow(images, *c, draws=at.draws, scale=at.scale),
        ),
        "frost": Corruption(
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
            lambda images, c, at: weather.frost(images, *c, draws=at.draws, scale=at.scale),
        ),
        "fog": Corruption(
            ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            lambda images, c, at: weather.fog(images, *c, draws=at.draws),
        ),
        "brightness": Corruption(
            _each(0.05, 0.1, 0.15, 0.2, 0.3),
            lambda images, c, at: weather.brightness(images, *c),
            smallest=1,
            guarded=False,
        ),
        "contrast": Corruption(
            _each(0.75, 0.5, 0.4, 0.3, 0.15),
            lambda images, c, at: digital.contrast(images, *c),
            smallest=1,
            guarded=False,
        ),
        "elastic_transform": Corruption(
            ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
            lambda images, c, at: digital.elastic_transform(
                images, *c, draws=at.draws, border=("mirror", "reflect"), reference=32
            ),
        ),
        "pixelate": Corruption(
            _each(0.95, 0.9, 0.85, 0.75, 0.65), lambda images, c, at: digital.pixelate(images, *c, scale=at.scale)
        ),
        "jpeg_compression": Corruption(
            _each(80, 65, 58, 50, 40),
            lambda images, c, at: digital.jpeg_compression(images, *c),
            smallest=1,
            guarded=False,
        ),
        "speckle_noise": Corruption(
            _each(0.06, 0.1, 0.12, 0.16, 0.2), lambda images, c, at: noise.speckle_noise(images, *c, draws=at.draws)
        ),
        "gaussian_blur": Corruption(
            _each(0.4, 0.6, 0.7, 0.8, 1.0),
            lambda images, c, at: blur.gaussian_blur(images, *c, scale=at.scale),
            smallest=1,
            guarded=False,
        ),
        "spatter": Corruption(
            (
                (0.62, 0.1, 0.7, 0.7, 0.5, 0),
                (0.65, 0.1, 0.8, 0.7, 0.5, 0),
                (0.65, 0.3, 1, 0.69, 0.5, 0),
                (0.65, 0.1, 0.7, 0.69, 0.6, 1),
                (0.65, 0.1, 0.5, 0.68, 0.6, 1),
            ),
            lambda images, c, at: spatter(images, *c, draws=at.draws, scale=at.scale),
        ),
        "saturate": Corruption(
            ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
            lambda images, c, at: digital.saturate(images, *c, of="saturation"),
        ),
    }
)
"""The fifteen of the benchmark in the paper's order, then the four further ones."""

# MNIST-C's mud has one grey level, that of the red channel.
_GREY_MUD = (63, 63, 63)

MNIST_C: Mapping[str, Corruption] = MappingProxyType(
    {
        "shot_noise": Corruption(
            _each(60, 25, 12, 5, 3), lambda images, c, at: noise.shot_noise(images, *c, draws=at.draws), fixed=5
        ),
        "impulse_noise": Corruption(
            _each(0.03, 0.06, 0.09, 0.17, 0.27),
            lambda images, c, at: noise.impulse_noise(images, *c, draws=at.draws),
            fixed=4,
        ),
        "glass_blur": Corruption(
            ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            lambda images, c, at: blur.glass_blur(
                images, *c, draws=at.draws, scale=at.scale, exchange=_glass(at.quirks, "swap"), share=0.5
            ),
        ),
        "motion_blur": Corruption(
            ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            lambda images, c, at: blur.motion_blur(images, *c, draws=at.draws, scale=at.scale),
        ),
        "shear": Corruption(
            _each(0.2, 0.4, 0.6, 0.8, 1.0), lambda images, c, at: shapes.shear(images, *c, draws=at.draws), fixed=2
        ),
        "scale": Corruption(
            _each(1 / 0.9, 1 / 0.8, 1 / 0.7, 1 / 0.6, 1 / 0.5), lambda images, c, at: shapes.scale(images, *c), fixed=3
        ),
        "rotate": Corruption(
            _each(0.2, 0.4, 0.6, 0.8, 1.0), lambda images, c, at: shapes.rotate(images, *c, draws=at.draws), fixed=2
        ),
        "brightness": Corruption(
            _each(0.1, 0.2, 0.3, 0.4, 0.5), lambda images, c, at: weather.brightness(images, *c), fixed=5
        ),
        "translate": Corruption(
            _each(1, 2, 3, 4, 5), lambda images, c, at: shapes.translate(images, *c, draws=at.draws), fixed=3
        ),
        "stripe": Corruption(((),), lambda images, c, at: shapes.stripe(images)),
        "fog": Corruption(
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            # The original cuts its 28 pixels out of a fractal of 256.
            lambda images, c, at: weather.fog(images, *c, draws=at.draws, maps=8),
            fixed=5,
        ),
        "spatter": Corruption(
            (
                (0.65, 0.3, 4, 0.69, 0.6, 0),
                (0.65, 0.3, 3, 0.68, 0.6, 0),
                (0.65, 0.3, 2, 0.68, 0.5, 0),
                (0.65, 0.3, 1, 0.65, 1.5, 1),
                (0.67, 0.4, 1, 0.65, 1.5, 1),
            ),
            lambda images, c, at: spatter(
                images,
                *c,
                draws=at.draws,
                scale=at.scale,
                liquid="mud" if at.quirks.spatter == "original" else "table",
                colour=_GREY_MUD,
            ),
            fixed=4,
        ),
        "dotted_line": Corruption(((),), lambda images, c, at: shapes.dotted_line(images, draws=at.draws)),
        "zigzag": Corruption(((),), lambda images, c, at: shapes.zigzag(images, draws=at.draws)),
        "canny_edges": Corruption(((),), lambda images, c, at: shapes.canny_edges(images)),
        "gaussian_noise": Corruption(
            _each(0.08, 0.12, 0.18, 0.26, 0.38),
            lambda images, c, at: noise.gaussian_noise(images, *c, draws=at.draws),
            fixed=5,
        ),
        "speckle_noise": Corruption(
            _each(0.15, 0.2, 0.35, 0.45, 0.6),
            lambda images, c, at: noise.speckle_noise(images, *c, draws=at.draws),
            fixed=5,
        ),
        "gaussian_blur": Corruption(
            _each(1, 2, 3, 4, 6), lambda images, c, at: blur.gaussian_blur(images, *c, scale=at.scale), fixed=2
        ),
        "defocus_blur": Corruption(
            ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            lambda images, c, at: blur.defocus_blur(images, *c, scale=at.scale),
        ),
        "zoom_blur": Corruption(
            ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
            lambda images, c, at: blur.zoom_blur(images, *c, last=at.quirks.zoom),
            fixed=5,
        ),
        "snow": Corruption(
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
            lambda images, c, at: weather.snow(images, *c, draws=at.draws, scale=at.scale),
            fixed=5,
        ),
        "frost": Corruption(
            ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
            lambda images, c, at: weather.frost(images, *c, draws=at.draws, scale=at.scale),
            fixed=5,
        ),
        "contrast": Corruption(
            _each(0.4, 0.3, 0.2, 0.1, 0.05), lambda images, c, at: digital.contrast(images, *c), fixed=4
        ),
        "saturate": Corruption(
            ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
            lambda images, c, at: digital.saturate(images, *c, of="hsv"),
            fixed=5,
        ),
        "jpeg_compression": Corruption(
            _each(25, 18, 15, 10, 7), lambda images, c, at: digital.jpeg_compression(images, *c), fixed=5
        ),
        "pixelate": Corruption(
            _each(0.6, 0.5, 0.4, 0.3, 0.25), lambda images, c, at: digital.pixelate(images, *c, scale=at.scale), fixed=3
        ),
        "elastic_transform": Corruption(
            ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
            lambda images, c, at: digital.elastic_transform(
                images, *c, draws=at.draws, border=("constant", "constant"), reference=28
            ),
        ),
        "quantize": Corruption(_each(5, 4, 3, 2, 1), lambda images, c, at: digital.quantize(images, *c), fixed=5),
        "line": Corruption(((),), lambda images, c, at: shapes.line(images, draws=at.draws)),
        "inverse": Corruption(((),), lambda images, c, at: digital.inverse(images)),
    }
)
"""The fifteen of the benchmark in its order, then the others of the generator but pessimal noise, which needs data."""
