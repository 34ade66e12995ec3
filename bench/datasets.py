"""The data sets by name, and where each is looked for.

`digits` and `breast-cancer` come with scikit-learn. The others are found in the folders of `ROBUSTBOARD_DATA`, in the
layouts of torchvision or of the official archives, or are downloaded by torchvision. What is found is held against its
published checksum, or against the digest of its pixels where packagings differ. A split of our own making is by content
hash, so that it does not depend on any order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustboard.attacks.keyed import content_hash
from robustboard.bench.arrays import ImageSet, checked, one_line, read_npz
from robustboard.bench.catalog import DIGITS, Known, known_datasets
from robustboard.bench.sources import Reader, Split
from robustboard.errors import DataError

ARRAYS = "arrays"
"""The name of data that the caller brings; a track knows it by the hash of its images."""


@dataclass(frozen=True)
class NpzSource:
    """The user's own arrays.

    Attributes:
        npz: a file with `images`, `labels` and optionally `train_images`, `train_labels`.
        classes: K, where the largest label does not tell.
    """

    npz: Path
    classes: int | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set; its training part is read when it is first asked for.

    Attributes:
        name: its id, such as `mnist`, or `arrays` for the caller's own.
        test: the images that tracks choose from.
        classes: the number of classes K.
        class_names: what the classes are called.
    """

    name: str
    test: ImageSet
    classes: int
    class_names: tuple[str, ...]
    read_train: Callable[[], ImageSet | None] = field(repr=False)

    @cached_property
    def train(self) -> ImageSet | None:
        """The images to train on, or None where there are none."""
        return self.read_train()


_SUBSETS = {"mnist-3v8": ("mnist", (3, 8)), "cifar10-q75-plane-horse": ("cifar10-q75", (0, 7))}
_EMBEDDED = ("digits", "breast-cancer")


def names() -> tuple[str, ...]:
    """The ids of all known data sets.

    >>> "mnist" in names()
    True
    """
    return tuple(sorted((*_EMBEDDED, *known_datasets(), *_SUBSETS)))


def data_folders(extra: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The folders that are searched: `extra`, then those of `ROBUSTBOARD_DATA`, then the download cache."""
    listed = os.environ.get("ROBUSTBOARD_DATA", "").split(os.pathsep)
    return (*extra, *(Path(folder).expanduser() for folder in listed if folder), cache_folder())


def cache_folder() -> Path:
    """Where downloads go: `$XDG_CACHE_HOME/robustboard`, by default `~/.cache/robustboard`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "robustboard"


def load_dataset(
    source: str | NpzSource, *, data_dirs: Sequence[Path] | None = None, download: bool = False
) -> Dataset:
    """Find and read a data set.

    Args:
        source: a name out of `names()`, or the user's own npz file.
        data_dirs: the folders to search, by default `data_folders()`.
        download: whether to download what is in none of them, into the last of them.

    Raises:
        DataError: if it is nowhere (the sentence says where it was looked for and how to get it), or is damaged.

    >>> data = load_dataset("digits")
    >>> data.test.images.shape, len(data.train), data.classes
    ((360, 1, 8, 8), 1437, 10)
    """
    if isinstance(source, NpzSource):
        train, test = read_npz(source.npz, classes=source.classes)
        return _own(train, test, source.classes)
    if source in _EMBEDDED:
        return _digits() if source == "digits" else _breast_cancer()
    if source in _SUBSETS:
        base_name, kept = _SUBSETS[source]
        base = load_dataset(base_name, data_dirs=data_dirs, download=download)
        class_names = tuple(base.class_names[label] for label in kept)
        return Dataset(source, base.test.only(kept), len(kept), class_names, partial(_train_subset, base, kept))
    known = known_datasets().get(source)
    if known is None:
        raise DataError(f"The data set {source!r} is not known; known are {', '.join(names())}, or {{npz = path}}.")
    path, reader = _locate(source, known, data_folders() if data_dirs is None else tuple(data_dirs), download)
    read = partial(_read_known, source, known, path, reader)
    return Dataset(source, read("test"), len(known.class_names), known.class_names, partial(read, "train"))


def from_arrays(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    *,
    classes: int | None = None,
    train: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None,
) -> Dataset:
    """The caller's own arrays as a data set; shapes and types as in `robustboard.bench.arrays.checked`.

    Raises:
        DataError: if they are not images and labels.
    """
    kept = None if train is None else checked(*train, where="the training data", classes=classes)
    return _own(kept, checked(images, labels, where="the data", classes=classes), classes)


def _own(train: ImageSet | None, test: ImageSet, classes: int | None) -> Dataset:
    largest = max(int(part.labels.max()) for part in (train, test) if part is not None)
    count = largest + 1 if classes is None else classes
    if count < 2:
        raise DataError("All labels are 0, but a classifier needs two classes; name more with dataset.classes.")
    return Dataset(ARRAYS, test, count, tuple(str(label) for label in range(count)), partial(_same, train))


def _same(train: ImageSet | None) -> ImageSet | None:
    return train


def _train_subset(base: Dataset, kept: tuple[int, ...]) -> ImageSet | None:
    return None if base.train is None else base.train.only(kept)


def _read_known(name: str, known: Known, path: Path, reader: Reader, split: Split) -> ImageSet:
    part = reader(path, split)
    expected = known.digests.get(split)
    if expected is not None and part.digest != expected:
        raise DataError(
            f"{path} is not {name}: the digest of its {split} images and labels is {part.digest[:12]}..., "
            f"not {expected[:12]}...; replace it by an unchanged copy."
        )
    if int(part.labels.max()) >= len(known.class_names):
        raise DataError(f"{path} is not {name}: it has the label {int(part.labels.max())}.")
    return part


def _locate(name: str, known: Known, folders: tuple[Path, ...], download: bool) -> tuple[Path, Reader]:
    failure = ""
    found = _search(known, (*folders, *known.system))
    if found is None and download and known.download is not None and folders:
        try:
            folders[-1].mkdir(parents=True, exist_ok=True)
            known.download(folders[-1])
        except (OSError, RuntimeError) as error:
            # torchvision's text is many lines long; the last is the reason.
            failure = f"; the download failed ({one_line(error)[-120:]})"
        found = _search(known, folders[-1:])
    if found is not None:
        return found
    looked = ", ".join(dict.fromkeys(pattern.replace("ubyte.gz", "ubyte") for pattern, _ in known.layouts))
    places = ", ".join(str(folder) for folder in (*folders, *known.system)) or "no folder"
    fetch = (
        "run once with --download where there is a network"
        if known.download
        else "copy the file into one of these folders"
    )
    raise DataError(
        f"The data set {name} was not found: looked for {looked} in {places}{failure}; to get it, {fetch}, set "
        f"ROBUSTBOARD_DATA to a folder that holds it, or pass --data-dir (or your own arrays: dataset = {{npz = ...}})."
    )


def _search(known: Known, folders: Sequence[Path]) -> tuple[Path, Reader] | None:
    for folder in folders:
        for pattern, reader in known.layouts:
            if (folder / pattern).exists():
                return folder / pattern, reader
    return None


def _digits() -> Dataset:
    """scikit-learn's 8x8 digits, 0..16 spread over 0..255; the 360 of smallest content hash are the test images."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = np.rint(bundled.images[:, None] * 255 / 16).astype(np.uint8)
    order = sorted(range(len(images)), key=lambda i: content_hash(images[i]))
    whole = checked(images, bundled.target, where="digits")
    test, train = (ImageSet(whole.images[part], whole.labels[part]) for part in (order[:360], order[360:]))
    return Dataset("digits", test, 10, DIGITS, partial(_same, train))


def _breast_cancer() -> Dataset:
    """scikit-learn's Wisconsin table as images (1, 1, 30): a fifth by hash of the raw row is the test part.

    Each column is scaled to [0, 1] by the training rows; what lies outside in the test part is clipped.
    """
    from sklearn.datasets import load_breast_cancer

    bundled = load_breast_cancer()
    rows = np.asarray(bundled.data, dtype="<f8")
    order = sorted(range(len(rows)), key=lambda i: content_hash(rows[i].view(np.uint8)))
    size = len(rows) // 5
    low, high = rows[order[size:]].min(axis=0), rows[order[size:]].max(axis=0)
    scaled = np.clip((rows - low) / (high - low), 0, 1).reshape(-1, 1, 1, 30)
    whole = checked(scaled, bundled.target, where="breast-cancer")
    test, train = (ImageSet(whole.images[part], whole.labels[part]) for part in (order[:size], order[size:]))
    return Dataset("breast-cancer", test, 2, tuple(bundled.target_names.tolist()), partial(_same, train))
