"""Networks by name, initialised from a seed: float32 images (N, C, H, W) in [0, 1] to logits (N, K).

`cnn-small` and `cnn-large` are Wong & Kolter's MNIST and CIFAR networks (arXiv 1711.00851 and 1805.12514), which most
work on certified training shares; `cnn-small` is also known as CNN-A (Dathathri et al. 2020, arXiv 2010.11645).
`resnet18` is the residual network of He et al. 2015 (arXiv 1512.03385) with the usual stem for 32 x 32 images.
`lenet` is LeNet-5 (LeCun et al. 1998, https://yann.lecun.org/exdb/publis/pdf/lecun-98.pdf) in its present form, with
ReLU and max pooling; smaller images are padded to 32 x 32, as there.
`papernot-mnist` and `papernot-cifar` are those of defensive distillation (Papernot et al. 2016, arXiv 1511.04508), laid
out as in the code of Carlini & Wagner 2017 (arXiv 1608.04644): no padding, dropout after the first hidden layer.
`linear` is softmax regression.
`wong-resnet` (32 x 32) and `wong-resnet-imagenet` (64 x 64) are residual networks for certified training (`residual`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from robustboard.attacks import global_draws
from robustboard.defenses.residual import wong_resnet, wong_resnet_imagenet
from robustboard.errors import DefenseError

Shape = tuple[int, int, int]
_MLP = re.compile(r"mlp(-[1-9][0-9]{0,4})+")


class Normalize(nn.Module):
    """`(x - mean) / std` for each channel; both are buffers, so they travel with the weights.

    Args:
        mean: (C,).
        std: (C,), positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone().float().view(-1, 1, 1))
        self.register_buffer("std", std.detach().clone().float().view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to images of mean zero and deviation one."""
        return (images - self.mean) / self.std


def build(
    name: str,
    *,
    image_shape: Shape,
    classes: int,
    seed: int,
    normalize: Normalize | None = None,
) -> nn.Sequential:
    """A freshly initialised network, on the CPU and in train mode; the global random state is left as it was.

    Args:
        name: one of `names()`, or `mlp-` and the widths of the hidden layers, as in `mlp-100-50`.
        image_shape: (C, H, W).
        classes: K.
        seed: of the initial weights.
        normalize: a first layer; None leaves the pixels as they are.

    Raises:
        DefenseError: if the name is unknown, or the images are too small for the network.

    >>> network = build("mlp-100-50", image_shape=(1, 8, 8), classes=10, seed=0)
    >>> network(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    factory = _NETWORKS.get(name)
    if factory is None and not _MLP.fullmatch(name):
        raise DefenseError(
            f"The architecture {name!r} is unknown; choose from {', '.join(names())}, or mlp- with the widths of the "
            "hidden layers, such as mlp-100-50."
        )
    smallest = _SMALLEST.get(name, 4)
    if factory is not None and min(image_shape[1:]) < smallest:
        raise DefenseError(
            f"The architecture {name} needs images of at least {smallest} x {smallest} pixels, not {image_shape[1:]}."
        )
    with global_draws.preserved():
        torch.manual_seed(seed)
        layers = factory(image_shape, classes) if factory else _mlp(name, image_shape, classes)
    return nn.Sequential(*([normalize] if normalize is not None else []), *layers)


def names() -> tuple[str, ...]:
    """The networks that have a name of their own."""
    return tuple(sorted(_NETWORKS))


def default_for(image_shape: Shape) -> str:
    """The network that the methods here use unless they are told another: one that two CPU cores can train.

    The perceptron of tiny images is as small as complete verification needs it to settle every example in seconds, so
    that what a method's true robust accuracy is there need not be guessed. One of 256 and 128 neurons is some three
    points more robust, and a third of its examples stay open.
    """
    channels, height, width = image_shape
    return "mlp-100-50" if channels == 1 and height * width <= 256 else "cnn-small"


def channel_statistics(images: Tensor) -> Normalize:
    """The normalisation that gives `images` (N, C, H, W) mean zero and deviation one in every channel."""
    channels = images.transpose(0, 1).flatten(1).double()
    return Normalize(channels.mean(dim=1), channels.std(dim=1, correction=0).clamp(min=1e-3))


def _mlp(name: str, image_shape: Shape, classes: int) -> list[nn.Module]:
    channels, height, width = image_shape
    widths = [channels * height * width, *(int(word) for word in name.split("-")[1:])]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return [*layers, nn.Linear(widths[-1], classes)]


def _cnn_small(image_shape: Shape, classes: int) -> list[nn.Module]:
    channels, height, width = image_shape
    return [
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    ]


def _cnn_large(image_shape: Shape, classes: int) -> list[nn.Module]:
    channels, height, width = image_shape
    return [
        nn.Conv2d(channels, 32, 3, stride=1, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=1, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    ]


def _lenet(image_shape: Shape, classes: int) -> list[nn.Module]:
    channels, *sides = image_shape
    above, left = (max(0, (33 - side) // 2) for side in sides)
    height, width = ((side + 2 * padding - 4) // 2 for side, padding in zip(sides, (above, left), strict=True))
    return [
        nn.Conv2d(channels, 6, 5, padding=(above, left)),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * ((height - 4) // 2) * ((width - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    ]


def _papernot(image_shape: Shape, classes: int, *, width: int, hidden: int) -> list[nn.Module]:
    channels, *sides = image_shape
    rows, columns = (((side - 4) // 2 - 4) // 2 for side in sides)
    return [
        nn.Conv2d(channels, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * rows * columns, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    ]


def _linear(image_shape: Shape, classes: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(math.prod(image_shape), classes)]


def _resnet18(image_shape: Shape, classes: int) -> list[nn.Module]:
    # A second and more of imports, for the one network that needs it.
    from torchvision.models import resnet18

    network = cast("nn.Module", resnet18(num_classes=classes))
    network.conv1 = nn.Conv2d(image_shape[0], 64, 3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return [network]


_NETWORKS: Mapping[str, Callable[[Shape, int], list[nn.Module]]] = MappingProxyType(
    {
        "cnn-a": _cnn_small,
        "cnn-small": _cnn_small,
        "cnn-large": _cnn_large,
        "lenet": _lenet,
        "linear": _linear,
        "papernot-cifar": partial(_papernot, width=64, hidden=256),
        "papernot-mnist": partial(_papernot, width=32, hidden=200),
        "resnet18": _resnet18,
        "wong-resnet": lambda shape, classes: wong_resnet(*shape, classes),
        "wong-resnet-imagenet": lambda shape, classes: wong_resnet_imagenet(*shape, classes),
    }
)
_SMALLEST: Mapping[str, int] = MappingProxyType(
    {"linear": 1, "papernot-cifar": 16, "papernot-mnist": 16, "wong-resnet": 8, "wong-resnet-imagenet": 16}
)
"""The smallest side of an image, where it is not four."""
