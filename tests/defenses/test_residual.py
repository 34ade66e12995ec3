"""The networks that MixTrain was evaluated on, in size, and the residual ones as bounds see them."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.defenses.architectures import build
from robustboard.defenses.residual import ResidualBlock
from robustboard.errors import DefenseError


class CountReluOutputs(TorchDispatchMode):
    """Counts every neuron that a ReLU sees, whether it is a module or a function."""

    def __init__(self) -> None:
        super().__init__()
        self.units = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.relu.default:
            self.units += output.numel()
        return output


@pytest.mark.parametrize(
    ("name", "shape", "classes", "units", "parameters"),
    [
        ("cnn-small", (1, 28, 28), 10, 4_804, 166_406),
        ("cnn-large", (1, 28, 28), 10, 48_064, 1_974_762),
        ("cnn-small", (3, 32, 32), 10, 6_244, 214_918),
        ("cnn-large", (3, 32, 32), 10, 62_464, 2_466_858),
        ("wong-resnet", (3, 32, 32), 10, 39_912, 1_145_410),
        # By hand: the stem has 16 maps of 32 x 32, the stages halve them to 16, 8 and 4, each block with two ReLUs.
        (
            "wong-resnet-imagenet",
            (3, 64, 64),
            200,
            16 * 32**2 + 2 * (2 * 16 * 16**2 + 32 * 8**2 + 64 * 4**2) + 512,
            2_368 + 12_384 + 19_552 + 78_016 + 524_800 + 102_600,
        ),
    ],
)
def test_the_six_networks_have_the_published_sizes(
    name: str, shape: tuple[int, int, int], classes: int, units: int, parameters: int
) -> None:
    network = build(name, image_shape=shape, classes=classes, seed=0)
    with torch.no_grad(), CountReluOutputs() as counter:
        assert network(torch.rand(1, *shape)).shape == (1, classes)
    assert counter.units == units
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize("halve", [False, True])
def test_a_block_adds_a_shorter_way(halve: bool) -> None:
    block, images = ResidualBlock(3, 5, halve=halve), torch.rand(2, 3, 8, 8)
    whole = block(images)
    assert whole.shape == ((2, 5, 4, 4) if halve else (2, 5, 8, 8))
    with torch.no_grad():
        block.second.weight.zero_()
        block.second.bias.zero_()  # type: ignore[union-attr]
    assert torch.equal(block(images), block.skip(images).relu())
    assert not torch.equal(block(images), whole)


def test_convolutions_start_as_the_authors_start_them() -> None:
    """Normal weights of variance 2 / (k k out), and biases of zero; ours for linear layers."""
    network = build("wong-resnet", image_shape=(3, 32, 32), classes=10, seed=0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None and module.weight.numel() > 2_000:
            expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not module.bias.any()


def test_too_small_images_are_refused_in_a_sentence() -> None:
    with pytest.raises(DefenseError, match="wong-resnet needs images of at least 8 x 8"):
        build("wong-resnet", image_shape=(3, 7, 8), classes=10, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
@pytest.mark.parametrize(
    ("method", "slope"), [("crown-ibp", "adaptive"), ("crown", "adaptive"), ("crown", "same"), ("ibp", "adaptive")]
)
def test_bounds_of_a_residual_network_hold_and_train(method: str, slope: Any) -> None:
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = build("wong-resnet", image_shape=(3, 8, 8), classes=4, seed=0)
    label, eps = torch.tensor([1]), 1e-3

    def margins(points: Tensor) -> Tensor:
        logits = network(points)
        return logits[:, 1:2] - logits[:, [0, 2, 3]]

    bounds = BoundedNetwork(network, images, classes=4, slope=slope).margins(
        label, lower=images - eps, upper=images + eps, method=method
    )
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(50):
            points = images + eps * torch.randn(images.shape, generator=draws).sign()
            assert bool((margins(points) >= bounds - 1e-4 * bounds.abs()).all())
    bounds.sum().backward()  # type: ignore[no-untyped-call]
    moved = [name for name, parameter in network.named_parameters() if parameter.grad is not None]
    assert len(moved) == len(list(network.parameters()))
