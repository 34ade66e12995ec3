"""Input gradients of convolutions of few channels, such as a network's first, without their slow routine.

On a CPU the gradient with respect to the input of a convolution of one or three channels takes four to ten times as
long as the convolution itself, a third of a pass forward and backward of a small network. As a product of matrices, the
transposed kernel with the gradient of the outputs, whose results are then added up pixel by pixel, it takes up to five
times less.

The forward pass is the module's own, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# With more channels the routine for gradients is the faster one.
_MOST_CHANNELS = 4


@contextmanager
def quick_input_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context a model's gradients with respect to its input take less time, and its parameters get none.

    Args:
        model: its convolutions of few channels are exchanged, on a CPU, and put back at the end.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    exchanged = [module for module in model.modules() if _suits(module)]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module in exchanged:
            module.__class__ = _QuickConv2d
        yield
    finally:
        for module in exchanged:
            module.__class__ = nn.Conv2d
        for parameter in frozen:
            parameter.requires_grad_(True)


def _suits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.in_channels <= _MOST_CHANNELS
        and not isinstance(module.padding, str)
        and (module.groups, module.dilation, module.padding_mode) == (1, (1, 1), "zeros")
    )


class _QuickConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002, the base's name
        # Whoever thaws the weights wants their gradients, which the routine here does not give.
        wanted = torch.is_grad_enabled() and input.requires_grad and not weight.requires_grad and input.dim() == 4
        if not wanted:
            plain: Tensor = super()._conv_forward(input, weight, bias)
            return plain
        padding = int(self.padding[0]), int(self.padding[1])
        found: Tensor = _FewChannels.apply(input, weight, bias, (self.stride[0], self.stride[1]), padding)
        return found


class _FewChannels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = images.shape[-2:], stride, padding
        return functional.conv2d(images, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        found = input_gradient(gradient, weight, ctx.size, stride=ctx.stride, padding=ctx.padding)
        return found, None, None, None, None


def input_gradient(
    gradient: Tensor, weight: Tensor, size: tuple[int, int], *, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient of a convolution with respect to its input, (N, I, H, W).

    Args:
        gradient: with respect to the output, (N, O, H', W').
        weight: (O, I, K, L).
        size: (H, W).
        stride: of each dimension.
        padding: zeros at either end of each dimension.

    >>> images, weight = torch.rand(2, 1, 9, 8, requires_grad=True), torch.rand(3, 1, 4, 3)
    >>> output = functional.conv2d(images, weight, stride=2, padding=1)
    >>> (expected,) = torch.autograd.grad(output.sum(), images)
    >>> found = input_gradient(torch.ones_like(output), weight, (9, 8), stride=(2, 2), padding=(1, 1))
    >>> torch.allclose(found, expected)
    True
    """
    # What each output sends to each pixel under its kernel, (N, I K L, H' W').
    sent = torch.matmul(weight.flatten(1).T, gradient.flatten(2))
    return functional.fold(sent, size, weight.shape[2:], padding=padding, stride=stride)
