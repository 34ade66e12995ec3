"""The networks: sizes, seeds, normalisation, and the sentences for what cannot be built."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from robustboard.defenses.architectures import Normalize, build, channel_statistics, default_for, names
from robustboard.errors import DefenseError

# Parameter counts of Wong & Kolter's networks, of the usual CIFAR ResNet-18, and of today's LeNet-5.
PUBLISHED_SIZES = [
    ("cnn-small", (1, 28, 28), 166_406),
    ("cnn-large", (1, 28, 28), 1_974_762),
    ("cnn-small", (3, 32, 32), 214_918),
    ("cnn-large", (3, 32, 32), 2_466_858),
    ("resnet18", (3, 32, 32), 11_173_962),
    ("wong-resnet", (3, 32, 32), 1_145_410),
    ("lenet", (3, 32, 32), 62_006),
    ("lenet", (1, 28, 28), 61_706),
    ("linear", (1, 28, 28), 784 * 10 + 10),
    ("papernot-mnist", (1, 28, 28), 320 + 9_248 + 18_496 + 36_928 + 205_000 + 40_200 + 2_010),
    ("papernot-cifar", (3, 32, 32), 1_792 + 36_928 + 73_856 + 147_584 + 819_456 + 65_792 + 2_570),
    ("mlp-100-50", (1, 8, 8), 64 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10),
]


@pytest.mark.parametrize(("name", "shape", "parameters"), PUBLISHED_SIZES)
def test_sizes_are_the_published_ones(name: str, shape: tuple[int, int, int], parameters: int) -> None:
    network = build(name, image_shape=shape, classes=10, seed=0)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("name", [*names(), "mlp-7"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 12)])
def test_logits_have_one_column_a_class(name: str, shape: tuple[int, int, int]) -> None:
    if name.startswith("papernot") or name == "wong-resnet-imagenet":  # these need 16 pixels a side
        shape = (shape[0], 2 * shape[1], 2 * shape[2])
    network = build(name, image_shape=shape, classes=3, seed=0).eval()
    assert network(torch.rand(2, *shape)).shape == (2, 3)


def test_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build("mlp-9", image_shape=(1, 4, 4), classes=2, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = build("mlp-9", image_shape=(1, 4, 4), classes=2, seed=5)
    other = build("mlp-9", image_shape=(1, 4, 4), classes=2, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_weights_follow_the_seed_in_threads_too() -> None:
    def first(seed: int) -> torch.Tensor:
        return next(build("mlp-200", image_shape=(1, 8, 8), classes=2, seed=seed).parameters())

    alone = first(0), first(1)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(first, [0, 1] * 200))
    assert all(torch.equal(weights, alone[place % 2]) for place, weights in enumerate(together))


def test_cnn_a_has_the_layer_names_of_the_published_weights() -> None:
    """Published CNN-A weights are named as in a Sequential that starts with the convolution."""
    network = build("cnn-a", image_shape=(1, 28, 28), classes=10, seed=0)
    assert {name.partition(".")[0] for name in network.state_dict()} == {"0", "2", "5", "7"}


def test_normalisation_standardises_each_channel_and_travels_with_the_weights() -> None:
    images = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0.5, 0.1]).view(
        3, 1, 1
    )
    normalize = channel_statistics(images)
    flat = normalize(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(dim=1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(dim=1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    network = build("mlp-5", image_shape=(3, 6, 6), classes=2, seed=0, normalize=normalize)
    assert isinstance(network[0], Normalize)
    assert {"0.mean", "0.std"} <= set(network.state_dict())


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    normalize = channel_statistics(torch.full((4, 1, 2, 2), 0.5))
    assert bool(torch.isfinite(nn.Sequential(normalize)(torch.rand(1, 1, 2, 2))).all())


def test_default_is_small_for_small_images() -> None:
    assert default_for((1, 8, 8)).startswith("mlp-")
    assert default_for((1, 28, 28)) == default_for((3, 32, 32)) == "cnn-small"


@pytest.mark.parametrize("name", ["vgg", "mlp-", "mlp-0", "mlp-10-", "mlp", "cnn-small ", "mlp-999999"])
def test_an_unknown_name_lists_what_there_is(name: str) -> None:
    with pytest.raises(DefenseError, match="choose from cnn-a, cnn-large, cnn-small, lenet, linear, papernot-cifar, "):
        build(name, image_shape=(1, 28, 28), classes=10, seed=0)


def test_images_too_small_for_a_convolution_are_refused() -> None:
    with pytest.raises(DefenseError, match="at least 4 x 4"):
        build("cnn-small", image_shape=(1, 2, 8), classes=2, seed=0)
    with pytest.raises(DefenseError, match="papernot-mnist needs images of at least 16 x 16"):
        build("papernot-mnist", image_shape=(1, 15, 16), classes=2, seed=0)
