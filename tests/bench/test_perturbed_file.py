"""Perturbed images from a stranger: what is refused, in one sentence and without harm, what is read."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustboard.attacks.keyed import content_hash
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.arrays import as_floats, load_members
from robustboard.bench.perturbed_file import read_perturbed, write_perturbed
from robustboard.bench.protocol import Examples
from robustboard.errors import ChallengeError, DataError

N = 6
THREAT = ThreatModel("linf", Fraction(1, 10))


def examples(*, floats: bool = False) -> Examples:
    images = np.random.default_rng(0).integers(40, 200, size=(N, 1, 4, 4), dtype=np.uint8)
    stored = as_floats(images) if floats else images
    hashes = tuple(content_hash(image) for image in stored)
    return Examples(stored, np.arange(N), hashes, np.arange(N), np.arange(N), 10, tuple(map(str, range(10))))


EXAMPLES = examples()
CLEAN = EXAMPLES.floats()
ROWS = np.array([4, 1])


def good() -> dict[str, Any]:
    return {"images": CLEAN[ROWS] + np.float32(0.05), "index": ROWS}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_images_come_back_in_the_tracks_order_as_they_were_written(tmp_path):
    found = read_perturbed(save(tmp_path / "a.npz", **good()), EXAMPLES, THREAT)
    assert found.rows.tolist() == [1, 4]
    np.testing.assert_array_equal(found.images, good()["images"][::-1])
    by_hash = {"images": good()["images"], "example": np.array([EXAMPLES.hashes[row] for row in ROWS])}
    again = read_perturbed(save(tmp_path / "b.npz", **by_hash), EXAMPLES, THREAT)
    np.testing.assert_array_equal(again.images, found.images)
    fortran = read_perturbed(
        save(tmp_path / "f.npz", images=np.asfortranarray(good()["images"]), index=ROWS), EXAMPLES, THREAT
    )
    np.testing.assert_array_equal(fortran.images, found.images)


def test_what_is_written_is_read_and_has_equal_bytes_each_time(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_perturbed(tmp_path / name, [1, 4], good()["images"][::-1], EXAMPLES.hashes)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_perturbed(tmp_path / "a.npz", EXAMPLES, THREAT)
    np.testing.assert_array_equal(found.images, good()["images"][::-1])


def test_no_images_are_a_file_too(tmp_path):
    write_perturbed(tmp_path / "none.npz", [], np.empty((0, 1, 4, 4), dtype=np.float32), EXAMPLES.hashes)
    assert len(read_perturbed(tmp_path / "none.npz", EXAMPLES, THREAT)) == 0


def whole(shift: int) -> np.ndarray:
    return (EXAMPLES.images[ROWS].astype(int) + shift).astype(np.uint8)


@pytest.mark.parametrize("threat", [ThreatModel("linf", Fraction(8, 255)), ThreatModel("l2", Fraction(32, 255))])
def test_whole_numbered_images_on_the_sphere_are_inside_though_float32_division_may_not_be(tmp_path, threat):
    shift = 8
    images = whole(shift)
    found = read_perturbed(save(tmp_path / "a.npz", images=images, index=ROWS), EXAMPLES, threat)
    clean = torch.from_numpy(CLEAN[found.rows])
    assert threat.contains(torch.from_numpy(found.images), clean).all()
    np.testing.assert_allclose(found.images, as_floats(images)[::-1], atol=1e-6)
    with pytest.raises(ChallengeError, match="lie outside"):
        read_perturbed(save(tmp_path / "b.npz", images=whole(shift + 1), index=ROWS), EXAMPLES, threat)


class Bomb:
    """What unpickling must never reach."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return Path.touch, (Path("unpickled"),)


def outside() -> np.ndarray:
    images = good()["images"]
    images[0, 0, 0, 0] = np.nextafter(np.float32(CLEAN[4, 0, 0, 0]) + np.float32(THREAT.radius), np.float32(2))
    return images


def replaced(value: float) -> np.ndarray:
    images = good()["images"]
    images[1, 0, 2, 3] = value
    return images


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "pickled images": ({"images": np.array([Bomb()], dtype=object)}, "must hold float32 or uint8, not object"),
    "pickled index": ({"index": np.array([Bomb(), Bomb()], dtype=object)}, "'index' must hold whole numbers"),
    "structured": ({"images": np.zeros(2, dtype=[("a", "f4")])}, "must hold float32 or uint8"),
    "float64": ({"images": good()["images"].astype(np.float64)}, "must hold float32 or uint8, not float64"),
    "big endian": ({"images": good()["images"].astype(">f4")}, "must hold float32 or uint8"),
    "wrong size": ({"images": np.zeros((2, 1, 5, 5), np.float32)}, r"must be of shape \(2, 1, 4, 4\)"),
    "channel last": ({"images": good()["images"].transpose(0, 2, 3, 1)}, r"must be of shape \(2, 1, 4, 4\)"),
    "flat": ({"images": good()["images"].reshape(2, 16)}, r"must be of shape \(2, 1, 4, 4\)"),
    "too many rows": ({"index": np.array([1, 2, 3])}, r"must be of shape \(3, 1, 4, 4\)"),
    "not a number": ({"images": replaced(np.nan)}, "NaN or infinity"),
    "infinite": ({"images": replaced(np.inf)}, "NaN or infinity"),
    "above white": ({"images": replaced(1.01)}, r"must lie in \[0, 1\]"),
    "below black": ({"images": replaced(-0.01)}, r"must lie in \[0, 1\]"),
    "one step outside the ball": ({"images": outside()}, r"1 of 2 images lie outside the linf ball .* example 4"),
    "clean of others": ({"index": np.array([0, 2])}, "2 of 2 images lie outside"),
    "unknown index": ({"index": np.array([1, 6])}, "no example 6; the indices run from 0 to 5"),
    "negative index": ({"index": np.array([1, -1])}, "no example -1"),
    "index as floats": ({"index": np.array([1.0, 4.0])}, "'index' must hold whole numbers"),
    "index as a table": ({"index": np.array([[4, 1]])}, r"'index' must be of shape \(M,\)"),
    "twice the same": ({"index": np.array([4, 4])}, "two images for the example 4"),
    "other hash": ({"index": None, "example": np.array(["ab" * 32, "cd" * 32])}, "no example with the content hash"),
    "index against hash": ({"example": np.array([EXAMPLES.hashes[1], EXAMPLES.hashes[4]])}, "name different examples"),
    "of nothing": ({"index": None}, "does not say which examples"),
    "without images": ({"images": None}, "has no array 'images'"),
    "huge": ({"images": np.zeros((300_000, 1, 4, 4), np.float32)}, "larger than|unpacks to"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_is_refused_in_one_sentence(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    changes, words = HOSTILE[case]
    arrays = {name: value for name, value in (good() | changes).items() if value is not None}
    with pytest.raises(ChallengeError, match=words) as caught:
        read_perturbed(save(tmp_path / "a.npz", **arrays), EXAMPLES, THREAT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def packed(members: dict[str, bytes], **options: Any) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return sink.getvalue()


def plain(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, array, allow_pickle=False)
    return sink.getvalue()


def headed(text: str) -> bytes:
    """An array's header, and no array."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def promising(shape: str) -> bytes:
    """The header of an array that is not there."""
    return headed(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n")


INDEX = {"index.npy": plain(ROWS)}
DAMAGED: dict[str, tuple[bytes, str]] = {
    "not an archive": (b"hello", "cannot be read as an npz archive"),
    "empty": (b"", "cannot be read as an npz archive"),
    "cut short": (packed({"images.npy": plain(good()["images"]), **INDEX})[:-40], "cannot be read as an npz archive"),
    "zip bomb": (packed({"images.npy": b"\0" * (64 << 20), **INDEX}), "unpacks to 64 MiB"),
    "bomb in disguise": (packed({"images.npy": promising("(1000000000, 1, 4, 4)"), **INDEX}), "promises a shape"),
    "shape below zero": (packed({"images.npy": promising("(-2, 1, 4, 4)"), **INDEX}), "promises a shape|cannot be"),
    "less than promised": (
        packed({"images.npy": promising("(2, 1, 4, 4)") + b"\0" * 8, **INDEX}),
        "not have the length",
    ),
    "more than promised": (
        packed({"images.npy": plain(good()["images"]) + b"\0", **INDEX}),
        "does not have the length",
    ),
    "header of code": (
        packed({"images.npy": promising("__import__('os').system('touch unpickled')"), **INDEX}),
        "cannot be read as an npz archive",
    ),
    "no header": (packed({"images.npy": b"\0" * 64, **INDEX}), "cannot be read as an npz archive"),
    "many members": (packed({f"{place}.npy": b"" for place in range(100)} | INDEX), "has 101 members"),
    "one name twice": (
        packed({"images.npy": plain(good()["images"]), "images": plain(good()["images"] + 1), **INDEX}),
        "perhaps of one name",
    ),
    "climbing names": (packed({"../../images.npy": plain(good()["images"]), **INDEX}), "has no array 'images'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archives_are_refused_in_one_sentence(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    content, words = DAMAGED[case]
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ChallengeError, match=words) as caught:
        read_perturbed(tmp_path / "a.npz", EXAMPLES, THREAT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


HEADERS = {
    "dtype of nothing": "{'descr': (), 'fortran_order': False, 'shape': (1,), }",
    "dtype cut short": "{'descr': ('<f4',), 'fortran_order': False, 'shape': (1,), }",
    "keys of two kinds": "{1: 0, 'a': 0}",
    "a list for a key": "{[]: 1}",
    "true for a length": "{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }",
    "deeply nested": "-" * 9000 + "1",
    "beyond all integers": f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**30}), }}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_one_sentence_in_challenges_and_in_data(tmp_path, case):
    array = headed(HEADERS[case] + "\n") + b"\0" * 4
    path = tmp_path / "a.npz"
    path.write_bytes(packed({"images.npy": array, **INDEX}))
    for refused in (
        lambda: read_perturbed(path, EXAMPLES, THREAT),
        lambda: load_members(path, ("images",)),
    ):
        with pytest.raises((ChallengeError, DataError)) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ChallengeError, match="cannot be read: No such file"):
        read_perturbed(tmp_path / "none.npz", EXAMPLES, THREAT)
    with pytest.raises(ChallengeError, match="cannot be read: Is a directory"):
        read_perturbed(tmp_path, EXAMPLES, THREAT)


def test_a_track_of_floats_takes_no_whole_numbers(tmp_path):
    path = save(tmp_path / "a.npz", images=whole(1), index=ROWS)
    with pytest.raises(ChallengeError, match="uint8 cannot hold perturbations"):
        read_perturbed(path, examples(floats=True), THREAT)
