"""Perturbed images in an npz file that anybody may have written, read with nothing taken on the file's word.

What the file promises (members, sizes, kinds, shapes) is checked before memory is taken for it, nothing is unpickled,
and every image must be an allowed perturbation of its example, to the last bit.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.arrays import UNREADABLE, as_floats, one_line
from robustboard.bench.protocol import Examples
from robustboard.bench.verdicts import Flags, Rows
from robustboard.errors import ChallengeError
from robustboard.files import replace_file

Floats = npt.NDArray[np.float32]

_MEMBERS: Final = ("images", "index", "example")
_MOST_MEMBERS: Final = 64
_SLACK: Final = 1 << 20
_CHUNK: Final = 256


@dataclass(frozen=True, eq=False)
class Perturbed:
    """Perturbed images of some of a track's examples.

    Attributes:
        rows: (M,), ascending: which examples, in the track's order.
        images: (M, C, H, W), float32, each inside its example's ball.
        sha256: of the file.
    """

    rows: Rows
    images: Floats
    sha256: str

    def __len__(self) -> int:
        return len(self.rows)


def write_perturbed(path: Path, rows: Sequence[int] | Rows, images: Floats, hashes: Sequence[str]) -> None:
    """Write images (M, C, H, W) with the row and the content hash of the example that each belongs to.

    Raises:
        OutputError: if the file cannot be written.
    """
    index = np.asarray(rows, dtype=np.int64)
    example = np.array([hashes[row] for row in index], dtype="<U64")
    replace_file(path, lambda file: np.savez_compressed(file, index=index, example=example, images=images))


def read_perturbed(path: Path, examples: Examples, threat: ThreatModel) -> Perturbed:
    """Read perturbed images of the track's examples.

    The file has `images` (M, C, H, W), float32 in [0, 1] or uint8, and says which examples they belong to by `index`
    (M,), the row of the outcome table, or by `example` (M,), the content hash; where it has both they must agree. A
    uint8 image counts as inside when its whole-numbered pixels are; division by 255 in float32 may leave the ball by
    a rounding, which is then taken back inward.

    Raises:
        ChallengeError: one sentence for whatever is wrong.
    """
    content = _content(path, _largest(examples))
    try:
        arrays = _arrays(path, content, _largest(examples))
    except UNREADABLE as error:
        raise ChallengeError(
            f"{path} cannot be read as an npz archive of plain arrays ({one_line(error)}); it is damaged, truncated or "
            "of another kind."
        ) from error
    if "images" not in arrays:
        raise ChallengeError(f"{path} has no array 'images'; save it with np.savez(..., images=..., index=...).")
    rows = _rows(path, arrays, examples)
    images = _inside(path, _shaped(path, arrays["images"], len(rows), examples), rows, examples, threat)
    order = np.argsort(rows)
    return Perturbed(rows[order], np.ascontiguousarray(images[order]), hashlib.sha256(content).hexdigest())


def _largest(examples: Examples) -> int:
    """More bytes than any array of an image for each example needs."""
    return _SLACK + len(examples) * (4 * math.prod(examples.images.shape[1:]) + 512)


def _content(path: Path, largest: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(2 * largest + 1)
    except OSError as error:
        raise ChallengeError(f"The file {path} cannot be read: {error.strerror or error}.") from error
    if len(content) > 2 * largest:
        raise ChallengeError(
            f"{path} is larger than {2 * largest >> 20} MiB, more than one image for each example needs."
        )
    return content


def _arrays(path: Path, content: bytes, largest: int) -> dict[str, npt.NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(members) > _MOST_MEMBERS or len(set(names)) < len(names):
            raise ChallengeError(
                f"{path} has {len(members)} members, some perhaps of one name; give images and index, each once."
            )
        for member, name in zip(members, names, strict=True):
            if name not in _MEMBERS:
                continue
            if member.file_size > largest:
                raise ChallengeError(
                    f"{path}: the array {name!r} unpacks to {member.file_size >> 20} MiB, more than one image for each "
                    "example needs."
                )
            with archive.open(member) as file:
                arrays[name] = _array(path, name, file, largest)
    return arrays


def _array(path: Path, name: str, file: IO[bytes], largest: int) -> npt.NDArray[Any]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ChallengeError(f"{path}: the array {name!r} has a header of an unknown version; save plain arrays.")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    kinds = {"images": "float32 or uint8", "index": "whole numbers", "example": "text"}
    fits = {
        "images": dtype in (np.dtype(np.float32), np.dtype(np.uint8)),
        "index": dtype.kind in "iu",
        "example": dtype.kind == "U",
    }
    if dtype.hasobject or not fits[name]:
        raise ChallengeError(f"{path}: the array {name!r} must hold {kinds[name]}, not {dtype}.")
    size = math.prod(shape) * dtype.itemsize
    if size > largest or any(side < 0 for side in shape):
        raise ChallengeError(f"{path}: the array {name!r} promises a shape of {shape}, which no challenge needs.")
    content = file.read(size + 1)
    if len(content) != size:
        raise ChallengeError(f"{path}: the array {name!r} does not have the length that its header promises.")
    return np.frombuffer(content, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _rows(path: Path, arrays: dict[str, npt.NDArray[Any]], examples: Examples) -> Rows:
    """Which examples the file is about."""
    named = [name for name in ("index", "example") if name in arrays]
    if not named:
        raise ChallengeError(f"{path} does not say which examples its images belong to; add 'index' or 'example'.")
    for name in named:
        if arrays[name].ndim != 1:
            raise ChallengeError(f"{path}: the array {name!r} must be of shape (M,), not {arrays[name].shape}.")
    found = [_by_index(path, arrays["index"], examples)] if "index" in arrays else []
    if "example" in arrays:
        found.append(_by_hash(path, arrays["example"], examples))
    if len(found) == 2 and not np.array_equal(found[0], found[1]):
        raise ChallengeError(f"{path}: 'index' and 'example' name different examples; give one of them.")
    rows = found[0]
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise ChallengeError(
            f"{path} has two images for the example {int(values[counts > 1][0])}; give one for each example."
        )
    return rows


def _by_index(path: Path, index: npt.NDArray[Any], examples: Examples) -> Rows:
    outside = index[(index < 0) | (index >= len(examples))]
    if len(outside):
        raise ChallengeError(
            f"{path}: there is no example {int(outside[0])}; the indices run from 0 to {len(examples) - 1}."
        )
    return index.astype(np.int64)


def _by_hash(path: Path, hashes: npt.NDArray[Any], examples: Examples) -> Rows:
    places = {key: row for row, key in enumerate(examples.hashes)}
    for key in hashes.tolist():
        if key not in places:
            raise ChallengeError(f"{path}: the track judges no example with the content hash {key[:64]!r}.")
    return np.array([places[key] for key in hashes.tolist()], dtype=np.int64)


def _shaped(path: Path, images: npt.NDArray[Any], count: int, examples: Examples) -> npt.NDArray[Any]:
    wanted = (count, *examples.images.shape[1:])
    if images.shape != wanted:
        raise ChallengeError(f"{path}: images must be of shape {wanted}, not {images.shape}.")
    if images.dtype == np.uint8 and examples.images.dtype != np.uint8:
        raise ChallengeError(f"{path}: the track's images are float32, so uint8 cannot hold perturbations of them.")
    return images


def _inside(
    path: Path, images: npt.NDArray[Any], rows: Rows, examples: Examples, threat: ThreatModel
) -> npt.NDArray[np.float32]:
    """The images as float32, each found to be allowed."""
    floats = as_floats(images)
    if not np.isfinite(floats).all():
        raise ChallengeError(f"{path}: images contain NaN or infinity.")
    if floats.size and (float(floats.min()) < 0 or float(floats.max()) > 1):
        raise ChallengeError(
            f"{path}: pixels must lie in [0, 1], but these reach from {float(floats.min()):g} to "
            f"{float(floats.max()):g}."
        )
    allowed = np.zeros(len(rows), dtype=bool)
    farthest = 0.0
    for begin in range(0, len(rows), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        stored = examples.images[rows[part]]
        clean = torch.from_numpy(as_floats(stored))
        if images.dtype == np.uint8:
            whole = _whole_inside(images[part], stored, threat)
            # Only a rounding is taken back: an image that is outside stays outside.
            projected = threat.project(torch.from_numpy(floats[part]), clean).numpy()
            floats[part][whole] = projected[whole]
        found = torch.from_numpy(floats[part])
        allowed[part] = threat.contains(found, clean).numpy()
        farthest = max(farthest, float(threat.distance(found, clean).max()))
    if not allowed.all():
        outside = rows[~allowed]
        named = ", ".join(str(row) for row in outside[:5]) + (", ..." if len(outside) > 5 else "")
        raise ChallengeError(
            f"{path}: {len(outside)} of {len(rows)} images lie outside the {threat.norm} ball of radius {threat.text} "
            f"(the farthest at {farthest:.9g}, allowed is {threat.radius:.9g}): those of the "
            f"example{'s' if len(outside) > 1 else ''} {named}."
        )
    return floats


def _whole_inside(images: npt.NDArray[Any], stored: npt.NDArray[Any], threat: ThreatModel) -> Flags:
    """Which uint8 images are in the ball, in whole-number arithmetic."""
    delta = np.abs(images.astype(np.int64) - stored.astype(np.int64)).reshape(len(images), -1)
    levels = threat.eps * 255
    if threat.norm == "linf":
        return np.array([Fraction(int(most)) <= levels for most in delta.max(axis=1)], dtype=bool)
    return np.array([Fraction(int(total)) <= levels**2 for total in (delta**2).sum(axis=1)], dtype=bool)
