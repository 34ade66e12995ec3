"""The official folders: found, matched with the judged images, and refused in one sentence where they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustboard.bench.arrays import ImageSet
from robustboard.bench.datasets import Dataset
from robustboard.bench.evaluate import evaluate
from robustboard.bench.official import corrupted_images
from robustboard.bench.protocol import select, track_from
from robustboard.bench.session import LocalSession
from robustboard.errors import DataError

COUNT = 12


def _dataset(name: str) -> Dataset:
    shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)
    images = np.random.default_rng(0).integers(0, 256, size=(COUNT, *shape), dtype=np.uint8)
    labels = np.arange(COUNT) % 10
    return Dataset(name, ImageSet(images, labels), 10, tuple("0123456789"), lambda: None)


def _track(family: str, dataset: str, names: tuple[str, ...] = ("fog", "brightness")):
    severities = "fixed" if family == "mnist-c" else [1, 5]
    content = {
        "id": "official@1", "dataset": dataset, "threat": {"norm": "linf", "eps": "1/10"}, "n": "all", "batch_size": 5,
        "corruptions": {"set": family, "names": list(names), "severities": severities}, "bounds": {"methods": []},
        "attacks": {"pgd": {"steps": 1, "restarts": 1, "losses": ["ce"]}},
    }  # fmt: skip
    return track_from(content)


def _cifar_folder(root: Path, dataset: Dataset) -> Path:
    """As published: severity s holds the images plus 10 s, brightness 100 more, channels last, test order."""
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    last = dataset.test.images.transpose(0, 2, 3, 1)
    for extra, name in ((0, "fog"), (100, "brightness")):
        np.save(folder / f"{name}.npy", np.concatenate([last + np.uint8(10 * s + extra) for s in range(1, 6)]))
    np.save(folder / "labels.npy", np.tile(dataset.test.labels, 5).astype(np.uint8))
    return folder


def _mnist_folder(root: Path, dataset: Dataset) -> Path:
    """As published, in another order than the data set here."""
    folder, order = root / "mnist_c", np.random.default_rng(1).permutation(COUNT)
    last = dataset.test.images.transpose(0, 2, 3, 1)[order]
    for extra, name in ((0, "identity"), (7, "fog"), (9, "brightness")):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "test_images.npy", last + np.uint8(extra))
        np.save(folder / name / "test_labels.npy", dataset.test.labels[order])
    return folder


def _pictures(family: str, dataset: Dataset, root: Path, **track):
    track = _track(family, dataset.name, **track)
    examples = select(track, dataset)
    return corrupted_images(track, examples, [root / "nothing here", root]), examples


def test_cifar_files_hold_one_block_of_test_images_a_severity(tmp_path):
    dataset = _dataset("cifar10")
    _cifar_folder(tmp_path, dataset)
    pictures, examples = _pictures("cifar10-c", dataset, tmp_path)
    rows = np.array([3, 0, 7])
    for name, severity, extra in (("fog", 1, 10), ("fog", 5, 50), ("brightness", 5, 150)):
        np.testing.assert_array_equal(pictures(name, severity, rows), examples.images[rows] + np.uint8(extra))


def test_mnist_files_are_matched_by_their_clean_images(tmp_path):
    dataset = _dataset("mnist")
    _mnist_folder(tmp_path, dataset)
    pictures, examples = _pictures("mnist-c", dataset, tmp_path)
    rows = np.arange(COUNT)
    np.testing.assert_array_equal(pictures("fog", 5, rows), examples.images + np.uint8(7))
    np.testing.assert_array_equal(pictures("brightness", 5, rows[:2]), examples.images[:2] + np.uint8(9))


class Bright(nn.Module):
    """Says the first pixel's value in twentieths, modulo 10, with weights so that a gradient exists."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        first = x.flatten(1)[:, :1] * 10
        return -((first - torch.arange(10) - 0.5) ** 2) * self.scale


def test_an_evaluation_judges_the_official_pixels_and_says_which(tmp_path):
    dataset = _dataset("mnist")
    _mnist_folder(tmp_path, dataset)
    track = _track("mnist-c", "mnist")
    examples = select(track, dataset)
    pictures = corrupted_images(track, examples, [tmp_path])
    found = evaluate(LocalSession(Bright(), torch.device("cpu")), track, examples, pictures=pictures)
    corner = (examples.images[:, 0, 0, 0] + np.uint8(9)).astype(float) / 255 * 10
    expected = np.clip(np.floor(corner), 0, 9).astype(int) == examples.labels
    np.testing.assert_array_equal(found.outcomes["corruption/brightness/5"], expected)
    (note,) = (note for note in found.notes if "official files" in note)
    assert "mnist-c" in note
    again = corrupted_images(track, examples, [tmp_path])
    assert evaluate(LocalSession(Bright(), torch.device("cpu")), track, examples, pictures=again).notes == found.notes


def _no_labels(folder: Path) -> None:
    (folder / "fog.npy").unlink()


def _pickled(folder: Path) -> None:
    (folder / "fog.npy").write_bytes(pickle.dumps([1, 2]))


def _truncated(folder: Path) -> None:
    whole = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").write_bytes(whole[: len(whole) // 2])


def _floats(folder: Path) -> None:
    np.save(folder / "fog.npy", np.load(folder / "fog.npy") / 255)


def _small(folder: Path) -> None:
    np.save(folder / "fog.npy", np.load(folder / "fog.npy")[:, :8, :8])


def _short(folder: Path) -> None:
    """Ten images a severity in place of twelve: every block but the first would begin too early."""
    np.save(folder / "fog.npy", np.load(folder / "fog.npy")[:50])


def _archive(folder: Path) -> None:
    with (folder / "fog.npy").open("wb") as file:
        np.savez(file, images=np.zeros((60, 32, 32, 3), np.uint8))


def _few_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.load(folder / "labels.npy")[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_labels, "has no file fog.npy; unpack the official archive again"),
        (_pickled, "fog.npy cannot be read"),
        (_truncated, "fog.npy cannot be read"),
        (_floats, r"must hold uint8 images of shape \(60, 32, 32, 3\).*not float64"),
        (_small, r"not uint8 \(60, 8, 8, 3\)"),
        (_short, r"fog.npy must hold .* one for each label, not uint8 \(50, 32, 32, 3\)"),
        (_archive, "fog.npy is an archive, not a single array"),
        (_few_labels, "must hold a multiple of 5 labels, not 59"),
    ],
)
def test_a_damaged_file_is_one_sentence_before_any_work(tmp_path, spoil, says):
    dataset = _dataset("cifar10")
    spoil(_cifar_folder(tmp_path, dataset))
    with pytest.raises(DataError, match=says):
        _pictures("cifar10-c", dataset, tmp_path)


def test_a_short_file_of_digits_is_one_sentence_before_any_work(tmp_path):
    dataset = _dataset("mnist")
    images = _mnist_folder(tmp_path, dataset) / "brightness" / "test_images.npy"
    np.save(images, np.load(images)[:-1])
    with pytest.raises(DataError, match=r"brightness/test_images.npy must hold .*not uint8 \(11, 28, 28, 1\)"):
        _pictures("mnist-c", dataset, tmp_path)


def test_files_of_other_images_are_refused(tmp_path):
    dataset = _dataset("cifar10")
    folder = _cifar_folder(tmp_path, dataset)
    np.save(folder / "labels.npy", np.zeros(5 * COUNT, dtype=np.uint8))
    with pytest.raises(DataError, match="the labels are not those of the judged images"):
        _pictures("cifar10-c", dataset, tmp_path)
    mnist = _dataset("mnist")
    clean = _mnist_folder(tmp_path, mnist) / "identity" / "test_images.npy"
    np.save(clean, np.load(clean) ^ np.uint8(1))
    with pytest.raises(DataError, match=r"12 of 12 images are not in identity/test_images\.npy"):
        _pictures("mnist-c", mnist, tmp_path)


def test_a_missing_folder_says_where_it_was_looked_for_and_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"looked for CIFAR-10-C/labels.npy in .*use the set cifar10-c-style") as error:
        _pictures("cifar10-c", _dataset("cifar10"), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_official_images_of_another_data_set_are_refused(tmp_path):
    with pytest.raises(DataError, match="corrupted images of cifar10, but official@1 is a track on cifar10-q75"):
        _pictures("cifar10-c", _dataset("cifar10-q75"), tmp_path)
