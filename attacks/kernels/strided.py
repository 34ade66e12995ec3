"""Input gradients of strided convolutions of few channels, such as a network's first, without their slow routine.

On a CPU the gradient with respect to the input of a strided convolution of one or three channels takes several times as
long as the convolution itself: without it, a pass forward and backward of a small network takes a fifth less time. It
is a convolution of stride one: every stride-th pixel of the gradient is a sum over the same few outputs, with its own
part of the kernel, so all of them are channels of one convolution that are then interleaved (Shi et al. 2016, arXiv
1609.05158).

The forward pass is the module's own, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# With more channels the routine for gradients is the faster one.
_MOST_CHANNELS = 4
# Where an exchanged module keeps its rearranged kernel.
_KERNELS = "_phases"


@contextmanager
def quick_input_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context a model's gradients with respect to its input take less time, and its parameters get none.

    Args:
        model: its strided convolutions of few channels are exchanged, on a CPU, and put back at the end.
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
            vars(module).pop(_KERNELS, None)
        for parameter in frozen:
            parameter.requires_grad_(True)


def _suits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.in_channels <= _MOST_CHANNELS
        and module.stride[0] == module.stride[1] > 1
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
        kernels = vars(self).get(_KERNELS)
        if kernels is None:
            padding = int(self.padding[0]), int(self.padding[1])
            kernels = vars(self)[_KERNELS] = Phases(weight.detach(), self.stride[0], padding)
        found: Tensor = _StridedConv.apply(input, weight, bias, kernels)
        return found


class _StridedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, kernels: Phases) -> Tensor:
        ctx.kernels, ctx.size = kernels, images.shape[-2:]
        return functional.conv2d(images, weight, bias, kernels.stride, kernels.padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernels.input_gradient(gradient, ctx.size), None, None, None


class Phases:
    """A strided convolution's kernel, rearranged into that of its input gradient: one channel for each phase.

    Args:
        weight: (O, I, K, L).
        stride: s, of both dimensions.
        padding: zeros at either end of each dimension.

    >>> images, weight = torch.rand(2, 1, 9, 8, requires_grad=True), torch.rand(3, 1, 4, 3)
    >>> output = functional.conv2d(images, weight, stride=2, padding=1)
    >>> (expected,) = torch.autograd.grad(output.sum(), images)
    >>> torch.allclose(Phases(weight, 2, (1, 1)).input_gradient(torch.ones_like(output), (9, 8)), expected)
    True
    """

    def __init__(self, weight: Tensor, stride: int, padding: tuple[int, int]) -> None:
        self.stride, self.padding = stride, padding
        taps = [_taps(weight.shape[2 + axis], stride, padding[axis]) for axis in (0, 1)]
        self._firsts = [first for _, first in taps]
        kernels = weight.transpose(0, 1)
        for axis, (places, _) in enumerate(taps):
            # A kernel value that does not exist is the zero behind the last one.
            padded = functional.pad(kernels, (0, 1) if axis else (0, 0, 0, 1))
            kernels = padded.index_select(2 + axis, places.flatten())
        inputs, outputs = kernels.shape[:2]
        spans = [places.shape[1] for places, _ in taps]
        kernels = kernels.view(inputs, outputs, stride, spans[0], stride, spans[1]).permute(0, 2, 4, 1, 3, 5)
        self._kernels = kernels.reshape(inputs * stride * stride, outputs, *spans).contiguous()

    def input_gradient(self, gradient: Tensor, size: tuple[int, int]) -> Tensor:
        """The gradient with respect to the input, (N, I, H, W).

        Args:
            gradient: with respect to the output, (N, O, H', W').
            size: (H, W).
        """
        pads = []
        for axis in (1, 0):
            before = -self._firsts[axis]
            whole = math.ceil(size[axis] / self.stride) + self._kernels.shape[2 + axis] - 1
            pads += [before, whole - gradient.shape[2 + axis] - before]
        phases = functional.conv2d(functional.pad(gradient, pads), self._kernels)
        return functional.pixel_shuffle(phases, self.stride)[..., : size[0], : size[1]]


def _taps(length: int, stride: int, padding: int) -> tuple[Tensor, int]:
    """Which kernel value meets which output, (s, span), and the first output, relative to a pixel's own.

    Pixel q * s + r meets output q + d through the kernel's value r + padding - s * d, where there is one.
    """
    first = math.ceil((padding - length + 1) / stride)
    offsets = torch.arange(first, (stride - 1 + padding) // stride + 1)
    places = torch.arange(stride)[:, None] + padding - stride * offsets
    return places.where((places >= 0) & (places < length), torch.tensor(length)), first
