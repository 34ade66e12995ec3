"""Common corruptions in the manner of CIFAR-10-C: what ordinary noise, blur, light and compression do to a classifier.

The five of this first stage follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), with the severity table of their CIFAR-10-C generator. Their published files
were drawn unseeded, so what is made here is in their style and is named so, never CIFAR-10-C itself. The rules:

- **Size.** Lengths in pixels (a blur's sigma) are for images of side 32 and scale with the side, min(H, W) / 32. Below
  side 16 they stop shrinking: a blur much narrower than the pixel grid would be no corruption at all.
- **Grey images.** One channel takes the same formulas; brightness raises V of HSV, which on grey is adding.
- **Rounding.** uint8 images are corrupted in float64 on [0, 1] and cut down to uint8 as the originals are (truncated,
  not rounded). Float images stay float and are not cut; only JPEG, which knows bytes alone, rounds them.
- **Randomness.** Every image draws from a Philox stream of its own, keyed by (seed, corruption, severity, content
  hash): no batch, order or worker changes a pixel.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from scipy.special import ndtri

from robustboard.attacks.keyed import derive_seed
from robustboard.bench.arrays import Images
from robustboard.errors import DataError

Pixels = npt.NDArray[np.float64]
"""One image, (C, H, W), in [0, 1]."""

SEVERITIES = (1, 2, 3, 4, 5)


class Draws:
    """The random numbers of one image; the raw Philox words are the same in every numpy version."""

    def __init__(self, *words: str | int) -> None:
        self._bits = np.random.Philox(key=derive_seed(*words))

    def uniform(self, shape: tuple[int, ...]) -> Pixels:
        """Draws from the open interval (0, 1)."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        drawn: Pixels = ((raw >> np.uint64(11)).astype(np.float64) + 0.5).reshape(shape) * 2.0**-53
        return drawn

    def normal(self, shape: tuple[int, ...]) -> Pixels:
        """Standard normal draws, by inversion."""
        drawn: Pixels = ndtri(self.uniform(shape))
        return drawn


def gaussian_noise(image: Pixels, sigma: float, draws: Draws) -> Pixels:
    """Independent normal noise on every channel and pixel."""
    noisy: Pixels = image + sigma * draws.normal(image.shape)
    return noisy


def gaussian_blur(image: Pixels, sigma: float, draws: Draws) -> Pixels:
    """A Gaussian blur within each channel, sigma in pixels of a 32-pixel image; edges are replicated."""
    del draws
    width = sigma * spatial_scale(image)
    rows = gaussian_filter1d(image, width, axis=1, mode="nearest")
    blurred: Pixels = gaussian_filter1d(rows, width, axis=2, mode="nearest")
    return blurred


def contrast(image: Pixels, factor: float, draws: Draws) -> Pixels:
    """Every pixel drawn towards the mean of its channel."""
    del draws
    means = image.mean(axis=(1, 2), keepdims=True)
    drawn: Pixels = (image - means) * factor + means
    return drawn


def brightness(image: Pixels, amount: float, draws: Draws) -> Pixels:
    """`amount` added to V of HSV: hue and saturation stay, so the channels keep their ratios; black becomes grey."""
    del draws
    value = image.max(axis=0, keepdims=True)
    ratios = np.divide(image, value, out=np.ones_like(image), where=value > 0)
    lit: Pixels = ratios * np.clip(value + amount, 0, 1)
    return lit


def jpeg_compression(image: Pixels, quality: float, draws: Draws) -> Pixels:
    """Encoded and decoded by Pillow at this quality, with its default chroma subsampling."""
    del draws
    channels = len(image)
    if channels not in (1, 3):
        raise DataError(f"The corruption jpeg_compression needs images of 1 or 3 channels, not {channels}.")
    raster = np.rint(image * 255).astype(np.uint8)
    picture = Image.fromarray(raster[0] if channels == 1 else np.ascontiguousarray(raster.transpose(1, 2, 0)))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(quality))
    with Image.open(stream) as decoded:
        coded = np.asarray(decoded, dtype=np.float64) / 255
    return coded[None] if channels == 1 else coded.transpose(2, 0, 1)


def spatial_scale(image: Pixels) -> float:
    """By what a length in pixels of a 32-pixel image is multiplied for this one."""
    _, height, width = image.shape
    side: int = max(min(height, width), 16)
    return side / 32


@dataclass(frozen=True)
class Corruption:
    """One corruption.

    Attributes:
        parameters: the parameter at severity 1 to 5, from the generator of CIFAR-10-C.
        apply: (image, parameter, draws) -> image, which need not be clipped.
    """

    parameters: tuple[float, ...]
    apply: Callable[[Pixels, float, Draws], Pixels]


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": Corruption((0.04, 0.06, 0.08, 0.09, 0.10), gaussian_noise),
        "gaussian_blur": Corruption((0.4, 0.6, 0.7, 0.8, 1.0), gaussian_blur),
        "brightness": Corruption((0.05, 0.1, 0.15, 0.2, 0.3), brightness),
        "contrast": Corruption((0.75, 0.5, 0.4, 0.3, 0.15), contrast),
        "jpeg_compression": Corruption((80, 65, 58, 50, 40), jpeg_compression),
    }
)

NAMES = tuple(CORRUPTIONS)


def corrupt(images: Images, *, corruption: str, severity: int, keys: Sequence[str], seed: int) -> npt.NDArray[Any]:
    """Corrupt images.

    Args:
        images: (N, C, H, W), uint8, or float32 in [0, 1].
        corruption: one of `NAMES`.
        severity: 1 to 5.
        keys: the content hash of every image.
        seed: the track's seed.

    Returns:
        The corrupted images, of the same shape and type.

    Raises:
        DataError: for another corruption or severity, or images that it cannot take.

    >>> grey = np.full((1, 1, 8, 8), 100, dtype=np.uint8)
    >>> corrupt(grey, corruption="brightness", severity=2, keys=["00"], seed=0)[0, 0, 0, 0]
    np.uint8(125)
    """
    known = CORRUPTIONS.get(corruption)
    if known is None:
        raise DataError(f"The corruption {corruption!r} is not known; known are {', '.join(NAMES)}.")
    if severity not in SEVERITIES:
        raise DataError(f"The severity must be 1 to 5, not {severity!r}.")
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(f"Images to corrupt must be uint8, or float32 in [0, 1], not {images.dtype}.")
    parameter = known.parameters[severity - 1]
    corrupted = np.empty_like(images)
    for place, (image, key) in enumerate(zip(images, keys, strict=True)):
        draws = Draws(seed, corruption, severity, key)
        pixels = image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)
        clipped = np.clip(known.apply(pixels, parameter, draws), 0, 1)
        # Assigning floats to uint8 truncates, as the original generator does.
        corrupted[place] = clipped * 255 if image.dtype == np.uint8 else clipped
    return corrupted
