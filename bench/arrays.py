"""Images and labels as they are stored, and the checks that a user's own arrays must pass.

Nothing here knows a data set by name. Whoever brings arrays, from an npz file or from Python, meets one sentence when
they are not what an evaluation needs, before any model is touched.
"""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustboard.attacks.keyed import content_hash
from robustboard.errors import DataError

Images = npt.NDArray[Any]
"""(N, C, H, W), uint8 in 0..255 or float32 in [0, 1]."""

Labels = npt.NDArray[np.int64]
"""(N,), classes 0..K-1."""

UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,  # an encrypted archive
    NotImplementedError,  # a compression that Python does not know
    SyntaxError,  # a header that does not parse
    TypeError,  # a header whose parts are of other kinds
    LookupError,  # a dtype with parts missing
    ArithmeticError,  # a shape beyond all integers
    MemoryError,  # a header that promises more than there is, or is nested too deeply
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What NumPy and zipfile raise for bytes that are no archive of plain arrays."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one split.

    Attributes:
        images: (N, C, H, W), uint8, or float32 in [0, 1].
        labels: (N,), int64.
    """

    images: Images = field(repr=False)
    labels: Labels = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The content hash of every image, in the order of the arrays."""
        return tuple(content_hash(image) for image in self.images)

    @cached_property
    def digest(self) -> str:
        """One sha256 of all images with their labels, whatever their order."""
        return lines_digest(sorted(f"{key} {label}" for key, label in zip(self.hashes, self.labels, strict=True)))

    def only(self, classes: tuple[int, ...]) -> ImageSet:
        """The images of these classes, labelled 0, 1, ... in the order given."""
        kept = np.isin(self.labels, classes)
        renamed = np.zeros(int(kept.sum()), dtype=np.int64)
        for new, old in enumerate(classes):
            renamed[self.labels[kept] == old] = new
        return ImageSet(self.images[kept], renamed)


def lines_digest(lines: list[str]) -> str:
    """The sha256 of text lines, 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def as_floats(images: Images) -> npt.NDArray[np.float32]:
    """Stored images as float32 in [0, 1], shape unchanged; uint8 is divided by 255 in float32, as torchvision does.

    >>> as_floats(np.full((1, 1, 1, 1), 255, dtype=np.uint8)).item()
    1.0
    """
    floats: npt.NDArray[np.float32] = images.astype(np.float32)
    if images.dtype == np.uint8:
        floats /= np.float32(255)
    return floats


def load_members(path: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """The arrays `names` of an npz file, as far as it has them; pickled objects are never loaded.

    Raises:
        DataError: if the file is missing, damaged or no npz archive, or holds Python objects.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise DataError(f"{path} is a single array; save it with np.savez(..., images=..., labels=...).")
        with content:
            return {name: content[name] for name in names if name in content.files}
    except FileNotFoundError as error:
        raise DataError(f"The file {path} does not exist.") from error
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as an npz archive of plain arrays ({one_line(error)}); "
            "it is damaged, truncated or of another kind."
        ) from error


def one_line(error: BaseException) -> str:
    """An error's text on one line without a full stop, or its kind where it has none."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def read_npz(path: Path, *, classes: int | None) -> tuple[ImageSet | None, ImageSet]:
    """A user's own data: `images`, `labels` and optionally `train_images`, `train_labels`.

    Args:
        path: an npz file; images (N, C, H, W) or (N, H, W), uint8 or float in [0, 1]; labels (N,), integers 0..K-1.
        classes: K, where the labels alone do not tell.

    Returns:
        The training part, if there is one, and the test part.

    Raises:
        DataError: one sentence for whatever is wrong.
    """
    parts = load_members(path, ("images", "labels", "train_images", "train_labels"))
    for name in ("images", "labels"):
        if name not in parts:
            raise DataError(f"{path} has no array {name!r}; it needs 'images' and 'labels'.")
    if ("train_images" in parts) != ("train_labels" in parts):
        raise DataError(f"{path} has one of 'train_images' and 'train_labels'; give both or neither.")
    test = checked(parts["images"], parts["labels"], where=f"{path}", classes=classes)
    if "train_images" not in parts:
        return None, test
    train = checked(parts["train_images"], parts["train_labels"], where=f"{path} (train)", classes=classes)
    if train.images.shape[1:] != test.images.shape[1:] or train.images.dtype != test.images.dtype:
        raise DataError(
            f"{path}: training images are {train.images.dtype} {train.images.shape[1:]} but test images "
            f"{test.images.dtype} {test.images.shape[1:]}; both must be of one kind."
        )
    return train, test


def checked(images: npt.NDArray[Any], labels: npt.NDArray[Any], *, where: str, classes: int | None = None) -> ImageSet:
    """Arrays from outside as an `ImageSet`, or one sentence that says what is wrong.

    Args:
        images: (N, C, H, W) or (N, H, W), uint8, or float in [0, 1].
        labels: (N,), integers from 0.
        where: what to call them in an error.
        classes: K, if labels must stay below it.

    Raises:
        DataError: if they are not that.
    """
    stored = _checked_images(np.asarray(images), where)
    return ImageSet(stored, _checked_labels(np.asarray(labels), len(stored), where, classes))


def _checked_images(images: npt.NDArray[Any], where: str) -> Images:
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4:
        raise DataError(f"{where}: images must be (N, C, H, W) or (N, H, W), not of shape {images.shape}.")
    if images.size == 0:
        raise DataError(f"{where}: there are no images (shape {images.shape}).")
    if images.shape[3] in (1, 3, 4) and min(images.shape[1:3]) > 4:
        raise DataError(
            f"{where}: images of shape {images.shape} look channel-last; "
            "give (N, C, H, W), for example images.transpose(0, 3, 1, 2)."
        )
    if images.dtype == np.uint8:
        if images.max() == 1:
            raise DataError(f"{where}: uint8 images run from 0 to 255, but none exceeds 1; store them as float32.")
        return np.ascontiguousarray(images)
    if images.dtype.kind != "f":
        raise DataError(f"{where}: images must be uint8, or float in [0, 1], not {images.dtype}.")
    if not np.isfinite(images).all():
        raise DataError(f"{where}: images contain NaN or infinity.")
    low, high = float(images.min()), float(images.max())
    if low < 0:
        raise DataError(
            f"{where}: images reach down to {low:g}, so they look normalised; give pixels in [0, 1] "
            "and put the normalisation inside the model."
        )
    if high > 1:
        raise DataError(
            f"{where}: float images must lie in [0, 1] but reach {high:g}; divide by 255, or store them as uint8."
        )
    return np.ascontiguousarray(images, dtype=np.float32)


def _checked_labels(labels: npt.NDArray[Any], n: int, where: str, classes: int | None) -> Labels:
    if labels.ndim != 1:
        raise DataError(f"{where}: labels must be of shape (N,), not {labels.shape}.")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be integers 0..K-1, not {labels.dtype}.")
    if len(labels) != n:
        raise DataError(f"{where}: there are {n} images but {len(labels)} labels.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise DataError(f"{where}: labels must be integers 0..K-1, but the smallest is {low}.")
    if classes is not None and high >= classes:
        raise DataError(f"{where}: the label {high} does not fit {classes} classes (0 to {classes - 1}).")
    if high >= 2**20:
        raise DataError(f"{where}: the label {high} is too large for a class number.")
    return labels.astype(np.int64)
