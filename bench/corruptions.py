"""Common corruptions: what ordinary noise, blur, weather, light and compression do to a classifier.

Two sets are made here, each named after the benchmark in whose style it is:

- `cifar10-c-style`: the 15 + 4 of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
  Corruptions and Perturbations" (ICLR 2019), at the five severities of their CIFAR-10-C, for images of any size.
- `mnist-c-style`: the 15 of Mu and Gilmer, "MNIST-C" (2019), each at the one severity of that benchmark, and further
  ones of its generator (all but pessimal noise, which needs a matrix of theirs), for grey images of 28 x 28.

The published files were drawn unseeded, so what is made here is in their style and is named so, never CIFAR-10-C or
MNIST-C itself; those are read from the official files (`cifar10-c`, `mnist-c`, `bench/official.py`). Frost is drawn,
not photographed. The rules:

- **Size.** CIFAR-10-C's lengths in pixels are for images of side 32 and scale with the side, min(H, W) / 32. Below side
  16 they stop shrinking; but for gaussian_blur's sigma, a length also stops at one pixel and a Gaussian's sigma at half
  a pixel, or where they were shorter, there: a blur much narrower than the pixel grid would be no corruption at all.
  Noise that is smoothed (spatter, elastic_transform) is as strong after a wider smoothing as in the table's size.
- **Grey images.** One channel takes the same formulas; colours that are painted on it are taken by their luma.
- **Rounding.** uint8 images are corrupted in float64 on [0, 1] and cut down to uint8 as the originals are (truncated,
  not rounded). Float images stay float and are not cut; only JPEG, pixelate and glass blur, which work on bytes, round.
- **Randomness.** Every image draws from a Philox stream of its own, keyed by (seed, corruption, severity, content
  hash): no batch, order or worker changes a pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from robustboard.bench.arrays import Images
from robustboard.bench.distortions.canvas import Draws, levels
from robustboard.bench.distortions.shapes import SIDE
from robustboard.bench.distortions.tables import CIFAR_10_C, MNIST_C, Corruption, Quirks, Setting
from robustboard.errors import DataError

__all__ = ["FIRST_FIVE", "SETS", "SEVERITIES", "CorruptionSet", "Quirks", "SetName", "corrupt"]

SEVERITIES: Final = (1, 2, 3, 4, 5)

FIRST_FIVE: Final = ("gaussian_noise", "gaussian_blur", "brightness", "contrast", "jpeg_compression")
"""The corruptions of the first tracks, and of the claims that were measured with them."""

SetName = Literal["cifar10-c-style", "mnist-c-style", "cifar10-c", "mnist-c"]

# Float64 values worked on at a time, and images: fog on 28 x 28 images needs far more room than they do.
_VALUES_AT_ONCE = 2**22
_IMAGES_AT_ONCE = 128


@dataclass(frozen=True)
class CorruptionSet:
    """A set of corruptions.

    Attributes:
        name: what tracks call it.
        title: what it is, for a reader.
        corruptions: by name, the benchmark's own first.
        benchmark: how many of them the benchmark's headline counts.
        fixed: whether the benchmark has each at one severity only.
        side: the side in pixels for which the table was made.
        files: the data set to which official files belong; None for a set that is made here.
    """

    name: SetName
    title: str
    corruptions: Mapping[str, Corruption]
    benchmark: int
    fixed: bool
    side: int
    files: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All its corruptions, the benchmark's own first."""
        return tuple(self.corruptions)

    def conditions(
        self, names: Sequence[str], severities: Sequence[int] | Literal["fixed"]
    ) -> tuple[tuple[str, int], ...]:
        """The (corruption, severity) pairs of some corruptions at some severities, or at the benchmark's one.

        >>> SETS["mnist-c-style"].conditions(["fog", "stripe"], "fixed")
        (('fog', 5), ('stripe', 1))
        """
        if severities == "fixed":
            return tuple((name, self.corruptions[name].fixed) for name in names)
        return tuple((name, severity) for name in names for severity in severities)

    def allows(self, corruption: str, severity: int) -> bool:
        """Whether a corruption has that severity."""
        known = self.corruptions.get(corruption)
        return known is not None and 1 <= severity <= len(known.parameters)


_CIFAR_STYLE = CorruptionSet(
    "cifar10-c-style", "In the style of CIFAR-10-C (made here; frost is drawn)", CIFAR_10_C, 15, False, 32
)
_MNIST_STYLE = CorruptionSet("mnist-c-style", "In the style of MNIST-C (made here)", MNIST_C, 15, True, SIDE)

SETS: Mapping[str, CorruptionSet] = MappingProxyType(
    {
        "cifar10-c-style": _CIFAR_STYLE,
        "mnist-c-style": _MNIST_STYLE,
        "cifar10-c": CorruptionSet("cifar10-c", "CIFAR-10-C's own files", CIFAR_10_C, 15, False, 32, "cifar10"),
        "mnist-c": CorruptionSet(
            "mnist-c",
            "MNIST-C's own files",
            MappingProxyType(dict(list(MNIST_C.items())[:15])),
            15,
            True,
            SIDE,
            "mnist",
        ),
    }
)
"""All sets by name: two that are made here, and two whose official files are read."""


def corrupt(
    images: Images,
    *,
    corruption: str,
    severity: int,
    keys: Sequence[str],
    seed: int,
    family: str = "cifar10-c-style",
    quirks: Quirks | None = None,
) -> npt.NDArray[Any]:
    """Corrupt images.

    Args:
        images: (N, C, H, W), uint8, or float32 in [0, 1].
        corruption: one of `SETS[family].names`.
        severity: 1 to 5; 1 for a corruption that has no severity.
        keys: the content hash of every image.
        seed: the track's seed.
        family: the set, `"cifar10-c-style"` or `"mnist-c-style"`.
        quirks: how the oddities of the original generators are treated, by default as they have them.

    Returns:
        The corrupted images, of the same shape and type.

    Raises:
        DataError: for another corruption or severity, or images that it cannot take.

    >>> grey = np.full((1, 1, 8, 8), 100, dtype=np.uint8)
    >>> corrupt(grey, corruption="brightness", severity=2, keys=["00"], seed=0)[0, 0, 0, 0]
    np.uint8(125)
    """
    suite, known = _find(family, corruption, severity)
    _require_images(images, suite, corruption, known.smallest)
    quirks = quirks or Quirks()
    corrupted = np.empty_like(images)
    scale = max(min(images.shape[2:]), suite.side // 2) / suite.side
    step = max(min(_VALUES_AT_ONCE // max(images[0:1].size, 1), _IMAGES_AT_ONCE), 1)
    if len(keys) != len(images):
        raise DataError(f"There are {len(images)} images to corrupt but {len(keys)} keys.")
    for begin in range(0, len(images), step):
        part = images[begin : begin + step]
        setting = Setting(Draws(seed, corruption, severity, keys=keys[begin : begin + step]), scale, quirks)
        pixels = part / 255.0 if images.dtype == np.uint8 else part.astype(np.float64)
        changed = np.clip(known.apply(pixels, known.parameters[severity - 1], setting), 0, 1)
        if images.dtype == np.uint8 and quirks.rounding == "nearest":
            changed = np.rint(changed * 255)
        elif images.dtype == np.uint8:
            # Assigning floats to uint8 truncates, as the original generators do.
            changed = levels(changed) if known.guarded else changed * 255
        corrupted[begin : begin + step] = changed
    return corrupted


def _find(family: str, corruption: str, severity: int) -> tuple[CorruptionSet, Corruption]:
    suite = SETS.get(family)
    if suite is None or suite.files is not None:
        made = ", ".join(name for name, known in SETS.items() if known.files is None)
        raise DataError(f"The set {family!r} is not one that is made here; those are {made}.")
    known = suite.corruptions.get(corruption)
    if known is None:
        raise DataError(f"The corruption {corruption!r} is not known; known are {', '.join(suite.names)}.")
    if not suite.allows(corruption, severity):
        most = len(known.parameters)
        raise DataError(f"The severity of {corruption} must be {'1' if most == 1 else '1 to 5'}, not {severity!r}.")
    return suite, known


def _require_images(images: Images, suite: CorruptionSet, corruption: str, smallest: int) -> None:
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(f"Images to corrupt must be uint8, or float32 in [0, 1], not {images.dtype}.")
    if suite is _MNIST_STYLE and images.shape[1:] != (1, SIDE, SIDE):
        raise DataError(
            f"The set {suite.name} is for images of shape (1, {SIDE}, {SIDE}), not {images.shape[1:]}; use "
            "cifar10-c-style, which has a rule for every size."
        )
    if min(images.shape[2:]) < smallest:
        raise DataError(
            f"The corruption {corruption} needs images of at least {smallest} x {smallest} pixels, not "
            f"{images.shape[2]} x {images.shape[3]}."
        )
