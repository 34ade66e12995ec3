"""Readers of the formats in which the known data sets come: IDX, npz, CIFAR's batches, JPEG collections, folders.

Every reader takes a file or folder that is there and gives one split, `"train"` or `"test"`, as (images, labels). What
is damaged, or is another file under the right name (an HTML page saved as an archive), ends in one sentence.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from robustboard.bench.arrays import Images, ImageSet, checked, load_members, one_line
from robustboard.errors import DataError

Split = Literal["train", "test"]
Reader = Callable[[Path, Split], ImageSet]

CIFAR_MD5: Mapping[str, str] = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
"""The checksums that the authors' page and torchvision give."""

TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def read_split_npz(path: Path, split: Split) -> ImageSet:
    """One split of a grey data set in an npz file, `train_images` and so on, or Keras' `x_train` and so on."""
    ours, keras = (f"{split}_images", f"{split}_labels"), (f"x_{split}", f"y_{split}")
    parts = load_members(path, ours + keras)
    for images, labels in (ours, keras):
        if images in parts and labels in parts:
            return checked(parts[images], parts[labels], where=str(path))
    raise DataError(f"{path} has neither the arrays {' and '.join(ours)} nor {' and '.join(keras)}.")


def read_idx(folder: Path, split: Split) -> ImageSet:
    """One split of MNIST's four IDX files, each plain or gzipped (http://yann.lecun.com/exdb/mnist)."""
    stem = "t10k" if split == "test" else "train"
    images = _idx_array(folder, f"{stem}-images-idx3-ubyte", dimensions=3)
    labels = _idx_array(folder, f"{stem}-labels-idx1-ubyte", dimensions=1)
    return checked(images, labels, where=str(folder))


def _idx_array(folder: Path, name: str, *, dimensions: int) -> npt.NDArray[np.uint8]:
    plain, zipped = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else zipped
    try:
        raw = path.read_bytes()
        if path == zipped:
            raw = gzip.decompress(raw)
    except FileNotFoundError as error:
        raise DataError(f"{folder} has neither {name} nor {name}.gz.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}); it is damaged or of another kind.") from error
    header = np.frombuffer(raw[: 4 + 4 * dimensions], dtype=np.uint8)
    if len(header) < 4 + 4 * dimensions or header[:4].tolist() != [0, 0, 8, dimensions]:
        raise DataError(f"{path} is not an IDX file of {dimensions}-dimensional bytes.")
    shape = tuple(int(size) for size in header[4:].view(">u4"))
    if len(raw) - len(header) != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} is truncated: it promises {shape} bytes and holds {len(raw) - len(header)}.")
    return np.frombuffer(raw, dtype=np.uint8, offset=len(header)).reshape(shape)


def read_jpeg_npz(path: Path, split: Split) -> ImageSet:
    """One split of colour images kept as JPEG files: image i is `{split}_jpeg[offsets[i]:offsets[i + 1]]`."""
    names = (f"{split}_jpeg", f"{split}_offsets", f"{split}_labels")
    parts = load_members(path, names)
    missing = [name for name in names if name not in parts]
    if missing:
        raise DataError(f"{path} has no array {missing[0]!r}; it needs {', '.join(names)}.")
    stream, offsets, labels = (parts[name] for name in names)
    if (
        offsets.ndim != 1
        or len(offsets) != len(labels) + 1
        or offsets[-1] != len(stream)
        or (np.diff(offsets) < 0).any()
    ):
        raise DataError(f"{path}: {names[1]} does not divide {names[0]} into {len(labels)} files.")
    ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    images = np.stack([decode(stream[start:end].tobytes(), where=str(path)) for start, end in ends])
    return checked(images, labels, where=str(path))


def decode(content: bytes, *, where: str) -> npt.NDArray[np.uint8]:
    """One image file as (3, H, W), uint8; grey files get three equal channels.

    Raises:
        DataError: if it is not an image.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise DataError(f"{where} holds an image that cannot be decoded ({one_line(error)}).") from error


def read_cifar(path: Path, split: Split, *, checksums: Mapping[str, str] = CIFAR_MD5) -> ImageSet:
    """One split of CIFAR-10 or -100, from the official archive or the folder that it unpacks to.

    The batches are pickles, so none is opened unless its checksum is the published one.

    Args:
        path: `cifar-10-python.tar.gz` or `cifar-10-batches-py`, or CIFAR-100's counterparts.
        split: which part.
        checksums: the md5 of every file, by name.
    """
    hundred = "100" in path.name
    folder = "cifar-100-python" if hundred else "cifar-10-batches-py"
    names = (
        (split,) if hundred else ("test_batch",) if split == "test" else tuple(f"data_batch_{i}" for i in range(1, 6))
    )
    if path.is_dir():
        contents = {name: _file_bytes(path / name) for name in names}
    else:
        archive = _file_bytes(path)
        require_md5(archive, checksums[path.name], where=str(path))
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            contents = {name: _tar_bytes(tar, f"{folder}/{name}", path) for name in names}
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    for name, content in contents.items():
        require_md5(content, checksums[name], where=f"{path}/{name}")
        batch = pickle.loads(content, encoding="latin1")
        images.append(np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels += batch["fine_labels" if hundred else "labels"]
    return checked(np.concatenate(images), np.array(labels), where=str(path))


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}).") from error


def _tar_bytes(tar: tarfile.TarFile, name: str, where: Path) -> bytes:
    try:
        member = tar.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise DataError(f"{where} has no file {name}.")
    return member.read()


def require_md5(content: bytes, expected: str, *, where: str) -> None:
    """Refuse a file whose content is not the published one.

    Raises:
        DataError: naming the file and what it looks like.
    """
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        hint = "an HTML page" if content[:512].lstrip()[:1] == b"<" else "damaged, truncated or another file"
        raise DataError(
            f"{where} is not the published file but {hint} (md5 {found}, not {expected}); delete it and fetch it again."
        )


def read_tiny_imagenet(
    path: Path, split: Split, *, md5: str = TINY_MD5, classes: int = 200, per_class: tuple[int, int] = (500, 50)
) -> ImageSet:
    """One split of Tiny ImageNet, from the official zip or the folder that it unpacks to.

    The labels of the official test images were never published, so the official validation images are the test split.
    Class i is the i-th WordNet id in sorted order, as `torchvision.datasets.ImageFolder` numbers them.

    Args:
        path: `tiny-imagenet-200.zip` or `tiny-imagenet-200`.
        split: which part.
        md5: the checksum of the zip.
        classes: how many there are.
        per_class: images of each class in the training and the test split.
    """
    if path.is_dir():
        return _tiny_split(lambda name: _file_bytes(path / name), path, split, classes, per_class)
    require_md5(_file_bytes(path), md5, where=str(path))
    with zipfile.ZipFile(path) as archive:
        return _tiny_split(lambda name: _zip_bytes(archive, name, path), path, split, classes, per_class)


def _zip_bytes(archive: zipfile.ZipFile, name: str, where: Path) -> bytes:
    try:
        return archive.read(f"tiny-imagenet-200/{name}")
    except KeyError as error:
        raise DataError(f"{where} has no file {name}.") from error


def _tiny_split(
    read: Callable[[str], bytes], where: Path, split: Split, classes: int, per_class: tuple[int, int]
) -> ImageSet:
    names = sorted(read("wnids.txt").decode().split())
    if len(names) != classes:
        raise DataError(f"{where}: wnids.txt names {len(names)} classes, not {classes}.")
    files: list[tuple[str, int]] = []
    if split == "train":
        for label, name in enumerate(names):
            boxes = read(f"train/{name}/{name}_boxes.txt").decode().splitlines()
            files += [(f"train/{name}/images/{line.split()[0]}", label) for line in boxes if line.strip()]
    else:
        numbers = {name: label for label, name in enumerate(names)}
        for line in read("val/val_annotations.txt").decode().splitlines():
            file, name = line.split()[:2]
            if name not in numbers:
                raise DataError(f"{where}: val_annotations.txt names the class {name}, which wnids.txt does not.")
            files.append((f"val/images/{file}", numbers[name]))
    expected = classes * per_class[split == "test"]
    if len(files) != expected:
        raise DataError(f"{where}: the {split} split lists {len(files)} images, not {expected}.")
    images: Images = np.stack([decode(read(name), where=f"{where}/{name}") for name, _ in files])
    labels: npt.NDArray[Any] = np.array([label for _, label in files])
    return checked(images, labels, where=str(where))
