"""The data sets that come in files: their classes, the layouts they are found in, their downloads and digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from robustboard.bench import sources
from robustboard.bench.arrays import ImageSet
from robustboard.bench.sources import Reader, Split


@dataclass(frozen=True)
class Known:
    """What is known about a data set that comes in files."""

    class_names: tuple[str, ...]
    layouts: tuple[tuple[str, Reader], ...]  # (path inside a folder, reader of that path)
    download: Callable[[Path], None] | None = None
    system: tuple[Path, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


DIGITS = tuple(str(digit) for digit in range(10))
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip


# Of the pixels with their labels, in any order: equal for every faithful packaging (ImageSet.digest).
_MNIST_DIGESTS = {
    "test": "f730facf61f5fef83bcc058b107d8faddbb744eee8570b1e8aee61e14a25a68a",
    "train": "ab830e6b13ac613b9bd928b8d3841d38b10117bd1e22ba681d16a3ede66de933",
}
_FASHION_DIGESTS = {
    "test": "2abda68f968aa62faf1a2925945295f7a355503f14e2be01acc5adb4e6307af1",
    "train": "4731307d751076c8e9a5a3c6cf9aff64c0c524159315cc1d901f3e04b15a2b67",
}


def _in_parent(path: Path, split: Split) -> ImageSet:
    return sources.read_idx(path.parent, split)


def _idx_layouts(*folders: str) -> tuple[tuple[str, Reader], ...]:
    name = "t10k-images-idx3-ubyte"
    return tuple((f"{folder}/{name}{ending}", _in_parent) for folder in folders for ending in ("", ".gz"))


def _torchvision(name: str) -> Callable[[Path], None]:
    return partial(_download_by_torchvision, name)


def _download_by_torchvision(name: str, folder: Path) -> None:
    import torchvision.datasets  # slow to import, and rarely needed

    getattr(torchvision.datasets, name)(folder, download=True)


def _download_tiny_imagenet(folder: Path) -> None:
    from torchvision.datasets.utils import download_url

    name = "tiny-imagenet-200.zip"
    download_url(f"http://cs231n.stanford.edu/{name}", folder, filename=name, md5=sources.TINY_MD5)


def known_datasets() -> dict[str, Known]:
    """All of them, by id."""
    return {
        "mnist": Known(
            DIGITS,
            (("mnist.npz", sources.read_split_npz), *_idx_layouts("mnist", "MNIST/raw")),
            download=_torchvision("MNIST"),
            digests=_MNIST_DIGESTS,
        ),
        "fashion-mnist": Known(
            _FASHION,
            (
                ("fashion-mnist.npz", sources.read_split_npz),
                *_idx_layouts("fashion-mnist", "fashion-mnist/data/fashion", "FashionMNIST/raw"),
            ),
            download=_torchvision("FashionMNIST"),
            system=(Path("/usr/share/datasets"),),  # Debian's package dataset-fashion-mnist
            digests=_FASHION_DIGESTS,
        ),
        "cifar10": Known(
            _CIFAR10,
            (("cifar-10-batches-py", sources.read_cifar), ("cifar-10-python.tar.gz", sources.read_cifar)),
            download=_torchvision("CIFAR10"),
        ),
        "cifar10-q75": Known(_CIFAR10, (("cifar10_q75.npz", sources.read_jpeg_npz),)),
        "cifar100": Known(
            _CIFAR100,
            (("cifar-100-python", sources.read_cifar), ("cifar-100-python.tar.gz", sources.read_cifar)),
            download=_torchvision("CIFAR100"),
        ),
        "tiny-imagenet": Known(
            tuple(str(number) for number in range(200)),
            (
                ("tiny-imagenet-200", sources.read_tiny_imagenet),
                ("tiny-imagenet-200.zip", sources.read_tiny_imagenet),
            ),
            download=_download_tiny_imagenet,
        ),
    }
