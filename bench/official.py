"""The corrupted images that the benchmarks' authors published, read from their own files where the user has them.

- `cifar10-c` (Zenodo 2535967): `CIFAR-10-C/<corruption>.npy`, (50000, 32, 32, 3) uint8, five blocks of the 10,000 test
  images in the official order, one a severity, and `labels.npy`.
- `mnist-c` (Zenodo 3239543): `mnist_c/<corruption>/test_images.npy`, (10000, 28, 28, 1) uint8, and `test_labels.npy`;
  `identity` holds the clean images, so that every image is found by its content, in whatever order the data set is.

Arrays are memory-mapped and never unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from robustboard.attacks.keyed import content_hash
from robustboard.bench.arrays import UNREADABLE, Images, one_line
from robustboard.bench.corrupted import Pictures, made
from robustboard.bench.corruptions import SETS, CorruptionSet
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.verdicts import Rows
from robustboard.errors import DataError

_FOLDERS = {"cifar10-c": ("CIFAR-10-C", "cifar10-c"), "mnist-c": ("mnist_c", "mnist-c")}
_LOOKED_FOR = {"cifar10-c": "labels.npy", "mnist-c": "identity/test_images.npy"}
_SHAPES = {"cifar10-c": (32, 32, 3), "mnist-c": (28, 28, 1)}
_BLOCKS = {"cifar10-c": 5, "mnist-c": 1}


def corrupted_images(track: Track, examples: Examples, data_dirs: Sequence[Path]) -> Pictures:
    """What gives the corrupted images of a track: its set is made here, or read from the official files.

    Args:
        track: the track.
        examples: what it judges.
        data_dirs: the folders to look in.

    Raises:
        DataError: if the official files are nowhere, one that the track needs is damaged, or they are not of the
            track's images.
    """
    suite = SETS[track.corruptions.set]
    if suite.files is None:
        return made(track, examples)
    if track.dataset != suite.files:
        raise DataError(
            f"The set {suite.name} holds corrupted images of {suite.files}, but {track.id} is a track on "
            f"{track.dataset}; use one that is made here, such as cifar10-c-style."
        )
    folder = _find(suite, data_dirs)
    files = OfficialFiles(suite, folder)
    files.match(examples)
    files.check(track.corruptions.names)
    return files


def _find(suite: CorruptionSet, data_dirs: Sequence[Path]) -> Path:
    wanted = _LOOKED_FOR[suite.name]
    for folder in data_dirs:
        for name in _FOLDERS[suite.name]:
            if (folder / name / wanted).is_file():
                return folder / name
    places, expected = ", ".join(str(folder) for folder in data_dirs), f"{_FOLDERS[suite.name][0]}/{wanted}"
    raise DataError(
        f"The official files of {suite.name} were not found: looked for {expected} in {places or 'no folder'}; "
        f"unpack the archive into one of these, pass --data-dir, or use the set {suite.name}-style, which is made here."
    )


@dataclass
class OfficialFiles:
    """One folder of official files; calling it gives corrupted images.

    Attributes:
        suite: which set it is.
        folder: where it lies.
    """

    suite: CorruptionSet
    folder: Path
    _count: int = field(init=False)
    _places: npt.NDArray[np.int64] = field(init=False)
    _digest: Any = field(init=False, default_factory=hashlib.sha256)

    def match(self, examples: Examples) -> None:
        """Find each example's place in the files.

        Raises:
            DataError: if an image is not there, or has another label there.
        """
        by_content = self.suite.name == "mnist-c"
        labels = self._labels("identity/test_labels.npy" if by_content else "labels.npy")
        self._count = len(labels)
        if by_content:
            clean = self._array("identity/test_images.npy").transpose(0, 3, 1, 2)
            places = {content_hash(image): place for place, image in enumerate(clean)}
            missing = [key for key in examples.hashes if key not in places]
            if missing:
                raise DataError(
                    f"{self.folder}: {len(missing)} of {len(examples)} images are not in identity/test_images.npy, "
                    "so these are not the corrupted images of this data set."
                )
            self._places = np.array([places[key] for key in examples.hashes], dtype=np.int64)
        else:
            # There are no clean images to compare with: the data set's files are in the official order.
            self._places = examples.order
        if self._places.max() >= len(labels) or (labels[self._places] != examples.labels).any():
            raise DataError(f"{self.folder}: the labels are not those of the judged images in their official order.")

    def check(self, corruptions: Sequence[str]) -> None:
        """Refuse files that cannot be read or do not fit, before any work.

        Raises:
            DataError: naming the first of them.
        """
        for corruption in corruptions:
            self._array(self._name(corruption))

    def __call__(self, corruption: str, severity: int, rows: Rows) -> Images:
        """The corrupted images of `rows`, (len(rows), C, H, W) uint8."""
        images = self._array(self._name(corruption))
        each, block = len(images) // _BLOCKS[self.suite.name], severity - 1
        places = self._places[rows] + (each * block if self.suite.name == "cifar10-c" else 0)
        taken: Images = np.ascontiguousarray(images[places].transpose(0, 3, 1, 2))
        self._digest.update(taken.tobytes())
        return taken

    @property
    def note(self) -> str:
        """What to say in the record: which pixels were judged."""
        return (
            f"Corrupted images: the official files of {self.suite.name}; sha256 of those that were read, in the order "
            f"of reading: {self._digest.hexdigest()}."
        )

    def _name(self, corruption: str) -> str:
        return f"{corruption}.npy" if self.suite.name == "cifar10-c" else f"{corruption}/test_images.npy"

    def _array(self, name: str) -> npt.NDArray[np.uint8]:
        array = self._load(name)
        shape = _SHAPES[self.suite.name]
        if array.dtype != np.uint8 or array.shape != (self._count, *shape):
            raise DataError(
                f"{self.folder / name} must hold uint8 images of shape {(self._count, *shape)}, one for each label, "
                f"not {array.dtype} {array.shape}."
            )
        return array

    def _labels(self, name: str) -> npt.NDArray[np.int64]:
        labels = self._load(name)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(f"{self.folder / name} must hold one whole number an image.")
        if len(labels) == 0 or len(labels) % (blocks := _BLOCKS[self.suite.name]):
            raise DataError(f"{self.folder / name} must hold a multiple of {blocks} labels, not {len(labels)}.")
        return labels.astype(np.int64)

    def _load(self, name: str) -> npt.NDArray[Any]:
        try:
            loaded = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                loaded.close()
                raise DataError(
                    f"{self.folder / name} is an archive, not a single array; unpack the official one again."
                )
        except FileNotFoundError as error:
            raise DataError(f"{self.folder} has no file {name}; unpack the official archive again.") from error
        except UNREADABLE as error:
            raise DataError(f"{self.folder / name} cannot be read ({one_line(error)}); it is damaged.") from error
        found: npt.NDArray[Any] = loaded
        return found
