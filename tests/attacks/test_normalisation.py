"""A leading per-channel affine layer is recognised in the forms that people write it in, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import transforms

from robustboard.attacks.normalisation import ChannelAffine, split_normalisation


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465]))
        self.register_buffer("std", torch.tensor([0.2471, 0.2435, 0.2616]))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[None, :, None, None].to(x.device)) / self.std.view(1, -1, 1, 1)


class ScaleShift(nn.Module):
    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, -3.0, 4.0]).view(3, 1, 1), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return 1 - self.scale * x


class PerPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(0, 1, 192).view(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - 0.5) / 0.25) + x


def followed(first: nn.Module) -> nn.Module:
    rest = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)]
    return nn.Sequential(first, *rest).eval()


def branching(x: Tensor) -> Tensor:
    return x - 0.5 if x.sum() > 0 else x


def in_place(x: Tensor) -> Tensor:
    x -= 0.5
    return x


RECOGNISED = {
    "buffers": Buffers(),
    "frozen parameter, negative scale": ScaleShift(trained=False),
    "numbers": Function(lambda x: (x - 0.1307) / 0.3081),
    "number first": Function(lambda x: 2 * x - 1),
    "functions": Function(lambda x: torch.div(torch.sub(x, 0.5), 0.25)),
    "reversed": Function(lambda x: 1 - x),
    "torchvision": transforms.Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
    "behind an identity": nn.Sequential(nn.Identity(), Buffers()),
}
LEFT_ALONE = {
    "nothing": nn.ReLU(),
    "trained": ScaleShift(trained=True),
    "per pixel": PerPixel(),
    "input used twice": Skip(),
    "branches on the input": Function(branching),
    "overwrites the input": Function(in_place),
    "divides by the input": Function(lambda x: 1 / (x + 1.0) / 2),
}


@pytest.mark.parametrize("first", RECOGNISED.values(), ids=RECOGNISED.keys())
def test_the_map_and_the_rest_make_up_the_model(first: nn.Module) -> None:
    model, images = followed(first), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    affine, rest = split_normalisation(model, 3)
    assert not affine.is_identity
    assert not any(isinstance(module, type(first)) for module in rest.modules() if type(first) is not nn.Sequential)
    torch.testing.assert_close(rest(affine.apply(images).float()), model(images), atol=1e-5, rtol=1e-5)
    assert {id(p) for p in rest.parameters()} <= {id(p) for p in model.parameters()}, "the rest shares the parameters"


@pytest.mark.parametrize("first", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_is_not_a_leading_channel_map_stays_in_the_model(first: nn.Module) -> None:
    model, images = followed(first), torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    affine, rest = split_normalisation(model, 3)
    left = affine.apply(images).float()
    torch.testing.assert_close(rest(left.clone()), model(images.clone()), atol=1e-5, rtol=1e-5)
    if not affine.is_identity:  # a part may be split off (x + 1), never the part that is not affine
        assert torch.equal(affine.scale, torch.ones(3, dtype=torch.float64))
    else:
        assert torch.equal(left, images)


@given(
    scale=st.floats(-20, 20).filter(lambda s: abs(s) > 1e-3),
    shift=st.floats(-20, 20),
    low=st.floats(0, 1, width=32),
    width=st.floats(0, 1, width=32),
)
def test_a_box_is_rounded_outward(scale: float, shift: float, low: float, width: float) -> None:
    """The normalised box holds the exact image of every point of the box, whatever the sign of the scale."""
    affine = ChannelAffine(torch.tensor([scale], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64))
    lower = torch.full((1, 1, 1, 1), low)
    upper = lower + width
    new_lower, new_upper = affine.box(lower, upper)
    for point in (lower, upper, (lower + upper) / 2):
        exact = affine.apply(point)
        assert new_lower.dtype == torch.float32
        assert bool((new_lower.double() <= exact).all())
        assert bool((exact <= new_upper.double()).all())
