"""What every distortion draws with: a batch of images, random streams by image, and a few geometric operations.

A batch is worked on as a whole for speed, and yet no image may depend on its neighbours: operations here are element by
element, line by line or image by image, never a matrix product, whose sums a library may order by the batch's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.special import ndtri, pdtr

from robustboard.attacks.keyed import derive_seed
from robustboard.errors import DataError

Pixels = npt.NDArray[np.float64]
"""Images, (N, C, H, W), in [0, 1]."""

Whole = npt.NDArray[np.int64]

_WHOLE = 1e-9

Border = Literal["mirror", "reflect", "constant"]
"""What lies outside an image: mirrored about the edge pixel, reflected about its outer side, or zero."""

Weights = tuple[float, float, float]
BT_601: Weights = (0.299, 0.587, 0.114)
BT_709: Weights = (0.2125, 0.7154, 0.0721)
"""How bright red, green and blue look, by two standards: OpenCV has the first, scikit-image the second."""


class Draws:
    """The random numbers of a batch, one stream an image; raw Philox words are the same in every numpy version.

    Args:
        words: what the draws are for, such as a seed, a corruption and a severity.
        keys: the content hash of every image.
    """

    def __init__(self, *words: str | int, keys: Sequence[str]) -> None:
        self._streams = [np.random.Philox(key=derive_seed(*words, key)) for key in keys]

    def __len__(self) -> int:
        return len(self._streams)

    def uniform(self, *shape: int) -> Pixels:
        """Draws from the open interval (0, 1), (N, *shape)."""
        count = math.prod(shape)
        raw = np.stack([stream.random_raw(count) for stream in self._streams])
        drawn: Pixels = ((raw >> np.uint64(11)).astype(np.float64) + 0.5).reshape(-1, *shape) * 2.0**-53
        return drawn

    def normal(self, *shape: int) -> Pixels:
        """Standard normal draws, by inversion, (N, *shape)."""
        drawn: Pixels = ndtri(self.uniform(*shape))
        return drawn

    def integers(self, low: int, high: int, *shape: int) -> Whole:
        """Whole numbers from `low` to `high - 1`, (N, *shape)."""
        return low + np.floor(self.uniform(*shape) * (high - low)).astype(np.int64)

    def signs(self, *shape: int) -> Pixels:
        """-1 or 1, (N, *shape)."""
        return np.where(self.uniform(*shape) < 0.5, -1.0, 1.0)

    def poisson(self, mean: Pixels) -> Pixels:
        """A Poisson draw of each mean, by inversion; mean (N, ...)."""
        drawn = np.zeros_like(mean)
        share = self.uniform(*mean.shape[1:])
        rising = mean > 0
        drawn[rising] = _poisson_quantile(share[rising], mean[rising])
        return drawn


def _poisson_quantile(share: Pixels, mean: Pixels) -> Pixels:
    """The smallest whole k with P(X <= k) >= share: a normal guess with the skew's correction, then single steps."""
    normal = ndtri(share)
    count = np.maximum(np.floor(mean + np.sqrt(mean) * normal + (normal**2 - 1) / 6), 0)
    below = np.arange(len(share))
    while len(below):
        below = below[pdtr(count[below], mean[below]) < share[below]]
        count[below] += 1
    above = np.flatnonzero(count > 0)
    while len(above):
        above = above[pdtr(count[above] - 1, mean[above]) >= share[above]]
        count[above] -= 1
        above = above[count[above] > 0]
    quantile: Pixels = count
    return quantile


def scaled(length: float, scale: float, *, least: float = 1.0) -> float:
    """A length of the reference size on images of `scale` times its side.

    It shrinks no further than to `least` pixels, or than itself where it was shorter: a blur much narrower than the
    pixel grid would be no corruption at all.

    >>> [scaled(6.0, 0.5), scaled(1.5, 0.5), scaled(0.4, 0.5), scaled(2.0, 7.0)]
    [3.0, 1.0, 0.4, 14.0]
    """
    return max(length * scale, min(length, least))


def scaled_sigma(sigma: float, scale: float) -> float:
    """A Gaussian's sigma, which shrinks to half a pixel at the least."""
    return scaled(sigma, scale, least=0.5)


def steadied(reference: float, sigma: float) -> float:
    """By what to multiply white noise so that it is as strong after smoothing with `sigma` as with `reference`.

    >>> steadied(2.0, 2.0), round(steadied(2.0, 8.0), 2)
    (1.0, 4.0)
    """
    return _kept(reference) / _kept(sigma)


def _kept(sigma: float) -> float:
    """The sum of a Gaussian kernel's squares: the share of white noise's deviation that is left after two axes."""
    if sigma == 0:
        return 1.0
    reach = math.ceil(4 * sigma)
    weights = [math.exp(-((step / sigma) ** 2) / 2) for step in range(-reach, reach + 1)]
    return sum(weight**2 for weight in weights) / sum(weights) ** 2


def levels(images: Pixels) -> Pixels:
    """Whole levels 0..255 of images that are clipped and cut, not rounded, as floats.

    What should be a whole level must not fall below it by the rounding of a sum, which differs between machines.

    >>> levels(np.array([-1.0, 0.5, 3 * (0.1 + 0.2) / 0.9])).tolist()
    [0.0, 127.0, 255.0]
    """
    cut: Pixels = np.floor(np.clip(images, 0, 1) * 255 + _WHOLE)
    return cut


def require_colours(images: Pixels, corruption: str) -> None:
    """Refuse what is neither grey nor RGB.

    Raises:
        DataError: for any other number of channels.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise DataError(f"The corruption {corruption} needs images of 1 or 3 channels, not {channels}.")


def luma(images: Pixels, weights: Weights = BT_601) -> Pixels:
    """Brightness as the eye weighs it, (N, 1, H, W); grey images are their own."""
    if images.shape[1] == 1:
        return images
    red, green, blue = weights
    return red * images[:, 0:1] + green * images[:, 1:2] + blue * images[:, 2:3]


def tint(images: Pixels, colour: tuple[float, float, float]) -> Pixels:
    """A colour in 0..255 to paint on `images` with, (1, C, 1, 1): grey images take its brightness."""
    paint = np.array(colour, dtype=np.float64).reshape(1, 3, 1, 1) / 255
    return paint if images.shape[1] == 3 else luma(paint)


def smooth(images: Pixels, sigma: float, *, mode: str = "nearest", truncate: float = 4.0) -> Pixels:
    """A Gaussian blur within each channel, sigma in pixels, cut at `truncate` sigmas."""
    rows = gaussian_filter1d(images, sigma, axis=2, mode=mode, truncate=truncate)
    blurred: Pixels = gaussian_filter1d(rows, sigma, axis=3, mode=mode, truncate=truncate)
    return blurred


def shifted(images: Pixels, down: Whole, right: Whole) -> Pixels:
    """Each image read `down` rows and `right` columns further, (N,) each; its edges are repeated."""
    count, channels, height, width = images.shape
    rows = np.clip(np.arange(height) + down[:, None], 0, height - 1)
    columns = np.clip(np.arange(width) + right[:, None], 0, width - 1)
    read: Pixels = images[
        np.arange(count)[:, None, None, None],
        np.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    return read


def drag(images: Pixels, radius: float, sigma: float, angle: Pixels) -> Pixels:
    """Motion blur: each image averaged along a ray, with one-sided Gaussian weights as ImageMagick has them.

    Args:
        images: (N, C, H, W).
        radius: in pixels; 2 ceil(radius) + 1 points are averaged, as far as they lie within an image's side.
        sigma: of the weights, in pixels.
        angle: of each ray, in degrees, (N,).
    """
    steps = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(steps) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    height, width = images.shape[2:]
    total = np.zeros_like(images)
    for step, weight in enumerate(weights):
        down, right = -np.ceil(step * sine - 0.5), -np.ceil(step * cosine - 0.5)
        inside = (np.abs(down) < height) & (np.abs(right) < width)
        if not inside.any():
            break
        part = shifted(images, down.astype(np.int64), right.astype(np.int64))
        total += weight * inside[:, None, None, None] * part
    return total


def enlarged(images: Pixels, factor: float) -> Pixels:
    """The middle of each image, enlarged linearly so that it fills the image."""
    for axis in (2, 3):
        side = images.shape[axis]
        kept = math.ceil(side / factor)
        grown = round(kept * factor)
        trimmed = (grown - side) // 2
        # Corner pixels stay corner pixels, as in scipy.ndimage.zoom.
        places = (np.arange(side) + trimmed) * ((kept - 1) / max(grown - 1, 1))
        low = np.minimum(np.floor(places).astype(np.int64), kept - 1)
        high = np.minimum(low + 1, kept - 1)
        first = (side - kept) // 2
        part = (places - low).reshape((-1, 1) if axis == 2 else (1, -1))
        images = images.take(first + low, axis=axis) * (1 - part) + images.take(first + high, axis=axis) * part
    return images


def sampled(images: Pixels, rows: Pixels, columns: Pixels, border: Border) -> Pixels:
    """Images read between their pixels, bilinearly, at coordinates (N, H, W) in pixels."""
    top, left = np.floor(rows), np.floor(columns)
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    above, over = top.astype(np.int64), left.astype(np.int64)
    return (
        _pixels(images, above, over, border) * (1 - down) * (1 - right)
        + _pixels(images, above, over + 1, border) * (1 - down) * right
        + _pixels(images, above + 1, over, border) * down * (1 - right)
        + _pixels(images, above + 1, over + 1, border) * down * right
    )


def _pixels(images: Pixels, rows: Whole, columns: Whole, border: Border) -> Pixels:
    count, channels, height, width = images.shape
    row, column = _folded(rows, height, border), _folded(columns, width, border)
    read: Pixels = images[
        np.arange(count)[:, None, None, None],
        np.arange(channels)[None, :, None, None],
        row[:, None],
        column[:, None],
    ]
    if border == "constant":
        read = read * ((row == rows) & (column == columns))[:, None]
    return read


def _folded(places: Whole, side: int, border: Border) -> Whole:
    if border == "constant" or side == 1:
        return np.clip(places, 0, side - 1)
    period = 2 * side - 2 if border == "mirror" else 2 * side
    within = places % period
    mirrored = period - within if border == "mirror" else period - 1 - within
    return np.where(within < side, within, mirrored)
