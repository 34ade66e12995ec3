"""Quick input gradients are torch's own up to rounding, and leave the model as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustboard.attacks.kernels.quick_gradients import _QuickConv2d, input_gradient, quick_input_gradients

SHAPES = [
    (length, stride, padding, size)
    for length, stride, padding, size in itertools.product((1, 2, 3, 4, 5, 7), (1, 2, 3, 4), (0, 1, 2, 3), (8, 9, 11))
    if padding <= length // 2 + 1 and size + 2 * padding >= length
]


@pytest.mark.parametrize(("length", "stride", "padding", "size"), SHAPES)
def test_it_is_the_gradient(length: int, stride: int, padding: int, size: int) -> None:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size + 3, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, length, length, generator=draws, dtype=torch.float64)
    strides = stride, max(1, stride - 1)
    output = functional.conv2d(images, weight, stride=strides, padding=padding)
    gradient = torch.randn(output.shape, generator=draws, dtype=torch.float64)
    (expected,) = torch.autograd.grad(output, images, gradient)
    found = input_gradient(gradient, weight, (size, size + 3), stride=strides, padding=(padding, padding))
    assert torch.allclose(found, expected, atol=1e-12)


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(4, 5)),
    ).eval()


def gradients(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    points = images.clone().requires_grad_()
    logits = model(points)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), points)[0]


def test_within_the_context_logits_are_the_same_and_gradients_too() -> None:
    torch.manual_seed(0)
    model, images = network(), torch.rand(3, 3, 14, 14)
    logits, slopes = gradients(model, images)
    with quick_input_gradients(model):
        assert [type(model[place]) is _QuickConv2d for place in (0, 2, 4)] == [True, True, False]
        quick_logits, quick_slopes = gradients(model, images)
    assert torch.equal(logits, quick_logits)
    assert torch.allclose(slopes, quick_slopes, atol=1e-6)
    assert vars(model[0]).keys() == vars(model[4]).keys()


def test_the_model_is_left_as_it_was_even_after_an_error() -> None:
    model = network()
    model[6].weight.requires_grad_(requires_grad=False)
    seen = []

    def fail() -> None:
        with quick_input_gradients(model):
            seen.extend(parameter.requires_grad for parameter in model.parameters())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(seen)
    assert all(type(module) is not _QuickConv2d for module in model.modules())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["6.weight"]


@pytest.mark.parametrize(
    "options",
    [{"groups": 3}, {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "valid"}],
    ids=lambda options: next(iter(options)),
)
def test_other_convolutions_are_left_alone(options: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 6, 3, **{"stride": 2, "padding": 1, **options}).eval()
    with quick_input_gradients(layer):
        assert type(layer) is nn.Conv2d
