"""Data is found where it is said to be, is what it claims to be, or ends in one sentence that helps."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustboard.attacks.keyed import content_hash
from robustboard.bench import sources
from robustboard.bench.arrays import ImageSet, as_floats, checked
from robustboard.bench.datasets import NpzSource, data_folders, from_arrays, load_dataset, names
from robustboard.errors import DataError


def save(path: Path, **arrays: object) -> NpzSource:
    np.savez(path, **arrays)
    return NpzSource(path)


def grey(n: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(n, 5, 5), dtype=np.uint8)


LABELS = np.array([0, 1, 2, 0, 1, 2])


def one_sentence(error: pytest.ExceptionInfo[DataError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- the embedded sets


def test_digits_are_split_by_content_and_scaled_to_bytes():
    """The embedded default must be the same everywhere: 360 smallest hashes to judge, 1437 to train on."""
    data = load_dataset("digits")
    assert data.train is not None
    assert data.test.images.shape == (360, 1, 8, 8)
    assert len(data.train) == 1437
    assert data.test.images.dtype == np.uint8
    assert data.test.images.max() == 255
    assert max(data.test.hashes) < min(data.train.hashes)
    assert set(np.unique(data.test.labels)) == set(range(10))


def test_breast_cancer_is_scaled_by_its_training_rows_alone():
    data = load_dataset("breast-cancer")
    assert data.train is not None
    train = data.train.images
    assert train.shape[1:] == (1, 1, 30)
    assert train.dtype == np.float32
    np.testing.assert_array_equal(train.min(axis=0), 0)
    np.testing.assert_array_equal(train.max(axis=0), 1)
    assert data.test.images.min() >= 0
    assert data.test.images.max() <= 1
    assert len(train) + len(data.test) == 569
    assert not set(data.train.hashes) & set(data.test.hashes)


# --- real data, where it is


def test_mnist_is_the_published_one_wherever_it_comes_from(data_file, tmp_path):
    """A re-packaging in another order and another format has the same images, labels and digest."""
    path = data_file("mnist.npz")
    data = load_dataset("mnist", data_dirs=[path.parent])
    assert data.test.images.shape == (10_000, 1, 28, 28)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    order = np.random.default_rng(1).permutation(10_000)
    write_idx(raw / "t10k-images-idx3-ubyte", data.test.images[order, 0])
    write_idx(raw / "t10k-labels-idx1-ubyte", data.test.labels[order].astype(np.uint8))
    again = load_dataset("mnist", data_dirs=[tmp_path])
    assert again.test.digest == data.test.digest
    assert again.test.hashes != data.test.hashes


def test_a_changed_mnist_is_refused(data_file, tmp_path):
    with np.load(data_file("mnist.npz")) as content:
        images, labels = content["test_images"].copy(), content["test_labels"]
    images[17, 3, 3] ^= 1
    np.savez(tmp_path / "mnist.npz", test_images=images, test_labels=labels)
    with pytest.raises(DataError, match="is not mnist: the digest") as error:
        load_dataset("mnist", data_dirs=[tmp_path])
    one_sentence(error)


def test_keras_names_in_mnist_npz_are_understood(data_file, tmp_path):
    with np.load(data_file("mnist.npz")) as content:
        np.savez(tmp_path / "mnist.npz", x_test=content["test_images"], y_test=content["test_labels"])
    assert len(load_dataset("mnist", data_dirs=[tmp_path]).test) == 10_000


def test_the_jpeg_set_decodes_to_colour_images(data_file):
    data = load_dataset("cifar10-q75", data_dirs=[data_file("cifar10_q75.npz").parent])
    assert data.test.images.shape == (10_000, 3, 32, 32)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert len(set(data.test.hashes)) == 10_000


@pytest.mark.parametrize(
    ("name", "base", "kept", "file"),
    [
        ("mnist-3v8", "mnist", (3, 8), "mnist.npz"),
        ("cifar10-q75-plane-horse", "cifar10-q75", (0, 7), "cifar10_q75.npz"),
    ],
)
def test_a_binary_subset_has_two_classes_of_its_base(data_file, name, base, kept, file):
    folder = data_file(file).parent
    small, whole = load_dataset(name, data_dirs=[folder]), load_dataset(base, data_dirs=[folder])
    assert small.classes == 2
    labelled = dict(zip(whole.test.hashes, whole.test.labels, strict=True))
    assert [kept[label] for label in small.test.labels] == [labelled[key] for key in small.test.hashes]
    assert len(small.test) == np.isin(whole.test.labels, kept).sum()


def test_fashion_mnist_reads_debians_package(tmp_path):
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        (pytest.fail if os.environ.get("ROBUSTBOARD_REQUIRE_DATA") == "1" else pytest.skip)(
            "Debian's package dataset-fashion-mnist is not installed"
        )
    data = load_dataset("fashion-mnist", data_dirs=[tmp_path])
    assert data.test.images.shape == (10_000, 1, 28, 28)
    assert data.train is not None
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10


# --- what is missing


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10-q75", "cifar100", "tiny-imagenet", "mnist-3v8"])
def test_missing_data_says_what_where_and_how(name, tmp_path):
    """The first thing a new user meets must be enough to go on."""
    with pytest.raises(DataError) as error:
        load_dataset(name, data_dirs=[tmp_path / "here", tmp_path / "there"])
    text = one_sentence(error)
    for part in (
        "looked for",
        str(tmp_path / "here"),
        str(tmp_path / "there"),
        "ROBUSTBOARD_DATA",
        "--data-dir",
        "npz",
    ):
        assert part in text


def test_a_failed_download_is_part_of_the_sentence(tmp_path, monkeypatch):
    import torchvision.datasets

    def refuse(root: object, *, download: bool) -> None:
        raise RuntimeError("Error downloading:\nTried a mirror, got:\nName or service not known")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(DataError, match=r"the download failed .*Name or service not known") as error:
        load_dataset("cifar10", data_dirs=[tmp_path], download=True)
    one_sentence(error)


def test_a_download_goes_to_the_last_folder_and_only_when_allowed(tmp_path, monkeypatch):
    import torchvision.datasets

    roots: list[Path] = []

    def note(root: Path, *, download: bool) -> None:
        assert download
        roots.append(root)

    monkeypatch.setattr(torchvision.datasets, "MNIST", note)
    folders = [tmp_path / "first", tmp_path / "last"]
    for download in (False, True):
        with pytest.raises(DataError):
            load_dataset("mnist", data_dirs=folders, download=download)
    assert roots == [tmp_path / "last"]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="'minst' is not known; known are breast-cancer, cifar10"):
        load_dataset("minst")
    assert set(names()) >= {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"}


def test_several_folders_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTBOARD_DATA", f"{tmp_path}/a:{tmp_path}/b")
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/cache")
    expected = [Path("mine"), tmp_path / "a", tmp_path / "b", tmp_path / "cache" / "robustboard"]
    assert list(data_folders([Path("mine")])) == expected


# --- IDX


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_idx_is_read_plain_and_gzipped(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", grey())
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS.astype(np.uint8))
    part = sources.read_idx(tmp_path, "train")
    np.testing.assert_array_equal(part.images[:, 0], grey())
    np.testing.assert_array_equal(part.labels, LABELS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>404</html>", "cannot be read"),
        (gzip.compress(b"<html>404</html>"), "not an IDX file"),
        (gzip.compress(b""), "not an IDX file"),
        (gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 6, 0, 0, 0, 5, 0, 0, 0, 5]) + b"x"), "truncated"),
        (gzip.compress(grey().tobytes())[:-9], "cannot be read"),
    ],
    # gzip writes the time into what it makes, and the processes that share the tests must agree on their names.
    ids=["a web page", "a zipped web page", "zipped nothing", "a header without its images", "a torn archive"],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, says):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        sources.read_idx(tmp_path, "test")
    assert "t10k-images-idx3-ubyte.gz" in one_sentence(error)


# --- CIFAR


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def fake_cifar(folder: Path) -> tuple[Path, Path, dict[str, str]]:
    """A miniature of the official archive and of the folder it unpacks to, with its checksums."""
    rng = np.random.default_rng(0)
    inside = folder / "cifar-10-batches-py"
    inside.mkdir()
    checksums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, size=(4, 3072), dtype=np.uint8),
            "labels": rng.integers(0, 10, 4).tolist(),
        }
        content = pickle.dumps(batch, protocol=2)
        (inside / name).write_bytes(content)
        checksums[name] = md5(content)
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(inside, "cifar-10-batches-py")
    return inside, archive, checksums | {archive.name: md5(archive.read_bytes())}


def test_cifar_is_the_same_from_its_folder_and_its_archive(tmp_path):
    inside, archive, checksums = fake_cifar(tmp_path)
    for split, n in (("train", 20), ("test", 4)):
        unpacked = sources.read_cifar(inside, split, checksums=checksums)
        packed = sources.read_cifar(archive, split, checksums=checksums)
        assert len(unpacked) == n
        assert unpacked.digest == packed.digest
    batch = pickle.loads((inside / "test_batch").read_bytes())
    image = sources.read_cifar(inside, "test", checksums=checksums).images[1]
    np.testing.assert_array_equal(image, batch["data"][1].reshape(3, 32, 32))


def test_no_pickle_is_opened_before_its_checksum_holds(tmp_path):
    """A batch is a pickle, and a pickle can run code."""
    inside, _, checksums = fake_cifar(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (inside / "test_batch").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not the published file"):
        sources.read_cifar(inside, "test", checksums=checksums)
    assert not (tmp_path / "exploded").exists()


def test_an_html_page_under_the_archives_name_is_refused(tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"<!DOCTYPE html><title>Moved</title>")
    with pytest.raises(DataError, match="an HTML page") as error:
        load_dataset("cifar100", data_dirs=[tmp_path])
    one_sentence(error)


# --- Tiny ImageNet


def fake_tiny(folder: Path) -> Path:
    """Three classes, the second training image of each grey, as in the official tree."""
    rng = np.random.default_rng(0)
    root = folder / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    annotations = []
    for place, wnid in enumerate(wnids):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(
            "".join(f"{wnid}_{i}.JPEG\t0\t0\t62\t62\n" for i in range(2))
        )
        for i in range(2):
            size = (64, 64) if i else (64, 64, 3)
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(images / f"{wnid}_{i}.JPEG")
        annotations.append(f"val_{place}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            root / "val/images" / f"val_{place}.JPEG"
        )
    (root / "wnids.txt").write_text("\n".join(wnids))
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    return root


def test_tiny_imagenet_numbers_classes_by_sorted_id_and_tests_on_its_validation_images(tmp_path):
    root = fake_tiny(tmp_path)
    archive = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(root.rglob("*")):
            packed.write(path, path.relative_to(tmp_path))
    read = partial(sources.read_tiny_imagenet, md5=md5(archive.read_bytes()), classes=3, per_class=(2, 1))
    test = read(root, "test")
    assert test.images.shape == (3, 3, 64, 64)
    assert test.labels.tolist() == [2, 0, 1]
    train = read(root, "train")
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert read(archive, "test").digest == test.digest
    assert read(archive, "train").digest == train.digest
    with pytest.raises(DataError, match="not the published file"):
        sources.read_tiny_imagenet(archive, "test")
    with pytest.raises(DataError, match="lists 3 images, not 150"):
        sources.read_tiny_imagenet(root, "test", classes=3)


# --- the user's own arrays


def test_own_arrays_from_a_file_and_from_memory_are_one_data_set(tmp_path):
    source = save(tmp_path / "a.npz", images=grey(), labels=LABELS, train_images=grey() // 2, train_labels=LABELS)
    loaded, given = load_dataset(source), from_arrays(grey(), LABELS)
    assert loaded.name == given.name == "arrays"
    assert loaded.test.digest == given.test.digest
    assert loaded.test.images.shape == (6, 1, 5, 5)
    assert loaded.classes == 3
    assert loaded.train is not None
    assert given.train is None


def test_float_arrays_are_kept_as_float32(tmp_path):
    images = np.random.default_rng(0).random((6, 3, 4, 4))
    data = load_dataset(save(tmp_path / "a.npz", images=images, labels=LABELS))
    np.testing.assert_array_equal(data.test.images, images.astype(np.float32))
    assert data.test.hashes[0] == content_hash(images[0].astype(np.float32))


FLOATS = grey() / 255.0


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"labels": LABELS}, "no array 'images'"),
        ({"images": grey()}, "no array 'labels'"),
        ({"images": grey()[0], "labels": LABELS}, r"\(N, C, H, W\) or \(N, H, W\)"),
        ({"images": grey()[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": np.zeros((6, 5, 5, 3), dtype=np.uint8), "labels": LABELS}, "channel-last"),
        ({"images": grey().astype(int), "labels": LABELS}, "uint8, or float in"),
        ({"images": FLOATS * np.nan, "labels": LABELS}, "NaN"),
        ({"images": (FLOATS - 0.5) / 0.5, "labels": LABELS}, "look normalised"),
        ({"images": FLOATS * 255, "labels": LABELS}, "divide by 255"),
        ({"images": grey() % 2, "labels": LABELS}, "none exceeds 1"),
        ({"images": grey(), "labels": LABELS[:5]}, "6 images but 5 labels"),
        ({"images": grey(), "labels": LABELS[:, None]}, r"of shape \(N,\)"),
        ({"images": grey(), "labels": LABELS.astype(float)}, "integers 0..K-1, not float64"),
        ({"images": grey(), "labels": LABELS - 1}, "smallest is -1"),
        ({"images": grey(), "labels": LABELS * 0}, "two classes"),
        ({"images": grey(), "labels": LABELS.astype(object)}, "cannot be read as an npz archive of plain arrays"),
        ({"images": grey(), "labels": LABELS, "train_images": grey()}, "both or neither"),
        ({"images": grey(), "labels": LABELS, "train_images": FLOATS, "train_labels": LABELS}, "one kind"),
    ],
)
def test_malformed_arrays_are_one_sentence(tmp_path, arrays, says):
    with pytest.raises(DataError, match=says) as error:
        load_dataset(save(tmp_path / "a.npz", **arrays))
    one_sentence(error)


def test_labels_must_fit_the_promised_classes(tmp_path):
    save(tmp_path / "a.npz", images=grey(), labels=LABELS)
    assert load_dataset(NpzSource(tmp_path / "a.npz", classes=10)).classes == 10
    with pytest.raises(DataError, match="label 2 does not fit 2 classes"):
        load_dataset(NpzSource(tmp_path / "a.npz", classes=2))


def npz_bytes() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, images=grey(), labels=LABELS)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", npz_bytes()[:200], npz_bytes()[:-30], b"<html></html>", b"\x93NUMPY", b"\x80\x04garbage"],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz") as error:
        load_dataset(NpzSource(tmp_path / "a.npz"))
    one_sentence(error)


@pytest.mark.parametrize("place", range(40, 400, 24))
def test_a_flipped_byte_never_ends_in_a_traceback(tmp_path, place):
    content = bytearray(npz_bytes())
    content[place] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(content)
    try:
        load_dataset(NpzSource(tmp_path / "a.npz"))
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_missing_file_and_a_single_array_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_dataset(NpzSource(tmp_path / "none.npz"))
    np.save(tmp_path / "a.npy", grey())
    with pytest.raises(DataError, match="single array"):
        load_dataset(NpzSource(tmp_path / "a.npy"))


# --- the arrays themselves


def test_the_digest_knows_content_and_labels_but_no_order():
    part = checked(grey(), LABELS, where="here")
    turned = ImageSet(part.images[::-1], part.labels[::-1])
    relabelled = ImageSet(part.images, part.labels[::-1])
    assert part.digest == turned.digest != relabelled.digest


def test_floats_are_those_of_torchvisions_to_tensor():
    import torch

    values = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(as_floats(values), torch.from_numpy(values).float().div(255).numpy())
