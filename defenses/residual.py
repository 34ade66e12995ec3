"""The residual networks of Wong et al. 2018 (arXiv 1805.12514), without batch statistics, so that they can be bounded.

Two sizes, as the authors of MixTrain (arXiv 1811.02625) have them in their symbolic interval library: one block a
stage after the first, no widening. Which sizes the paper's residual rows used is not known. Symbolic bounds of one
32 x 32 image take on the order of a minute on a CPU core, CROWN-IBP bounds a tenth of a second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions beside a shorter one: ReLU(conv(ReLU(conv(x))) + skip(x)).

    Args:
        before: channels in.
        after: channels out.
        halve: whether height and width are halved.
    """

    def __init__(self, before: int, after: int, *, halve: bool = False) -> None:
        super().__init__()
        kernel, short, stride = (4, 2, 2) if halve else (3, 1, 1)
        self.first = nn.Conv2d(before, after, kernel, stride=stride, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, short, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        """(N, before, H, W) to (N, after, H, W), or to half the height and width."""
        added: Tensor = self.second(self.first(features).relu()) + self.skip(features)
        return added.relu()


def wong_resnet(channels: int, height: int, width: int, classes: int) -> list[nn.Module]:
    """For images of 32 x 32: three stages after a 3 x 3 stem, and 1000 hidden units."""
    stem = nn.Conv2d(channels, 16, 3, padding=1)
    return _initialised([stem, nn.ReLU(), *_stages(), *_head(height, width, hidden=1000, classes=classes)])


def wong_resnet_imagenet(channels: int, height: int, width: int, classes: int) -> list[nn.Module]:
    """For images of 64 x 64: the same stages after a 7 x 7 stem that halves the image, and 512 hidden units."""
    stem = nn.Conv2d(channels, 16, 7, stride=2, padding=3)
    halved = (height + 1) // 2, (width + 1) // 2
    return _initialised([stem, nn.ReLU(), *_stages(), *_head(*halved, hidden=512, classes=classes)])


def _stages() -> list[nn.Module]:
    return [
        ResidualBlock(16, 16, halve=True),
        ResidualBlock(16, 16),
        ResidualBlock(16, 32, halve=True),
        ResidualBlock(32, 64, halve=True),
    ]


def _head(height: int, width: int, *, hidden: int, classes: int) -> list[nn.Module]:
    features = 64 * (height // 8) * (width // 8)
    return [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)]


def _initialised(layers: list[nn.Module]) -> list[nn.Module]:
    """He et al.'s normal weights in the convolutions, as there are no batch statistics to scale them."""
    for module in nn.ModuleList(layers).modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            with torch.no_grad():
                module.weight.normal_(0.0, math.sqrt(2 / fan_out))
                module.bias.zero_()
    return layers
