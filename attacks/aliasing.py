"""Networks that write into memory which they read again under another name.

A graph of operations, as tracers record it and as auto_LiRPA and `torch.fx` read it, has no notion of shared memory.
In `h = dense(x); v = h.view(-1); v += 1; return head(h)` the graph hands the old `h` to the head, so its bounds are
those of another function. Running its operations does not show it: they share memory just as the network's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustboard.errors import BoundsError


def require_no_stale_reads(model: nn.Module, images: Tensor) -> None:
    """Refuse a network that reads a tensor after its memory was written through another one.

    Writing over a tensor that is read only under the written name, as an in-place ReLU does, is a plain operation.

    Args:
        model: any module; it runs once, without gradients.
        images: what it runs on.

    Raises:
        BoundsError: if such a tensor is read.

    >>> class Shared(nn.Module):
    ...     def forward(self, images):
    ...         images = images * 2
    ...         images.view(-1).relu_()
    ...         return images + 1
    >>> require_no_stale_reads(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True)), torch.zeros(1, 2))
    >>> require_no_stale_reads(Shared(), torch.zeros(1, 2))
    Traceback (most recent call last):
    ...
    robustboard.errors.BoundsError: This network reads a tensor again whose memory it wrote through another one; ...
    """
    with torch.no_grad(), _Watch():
        model(images)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation: which tensor was made when, and who wrote last into which memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = 0
        # The tensors themselves are kept, so that neither an id nor an address is used twice.
        self._made: dict[int, tuple[int, Tensor]] = {}
        self._written: dict[int, tuple[int, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._now += 1
        for tensor in _tensors((args, kwargs)):
            self._made.setdefault(id(tensor), (0, tensor))
            when, writer = self._written.get(_memory(tensor), (-1, tensor))
            if tensor is not writer and self._made[id(tensor)][0] < when:
                raise BoundsError(
                    "This network reads a tensor again whose memory it wrote through another one; "
                    "a graph of its operations does not show that, so nothing is proved."
                )
        results = func(*args, **kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._write(value)
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self._write(kwargs[argument.name])
        for tensor in _tensors(results):
            self._made.setdefault(id(tensor), (self._now, tensor))
        return results

    def _write(self, value: Any) -> None:
        for tensor in _tensors(value):
            self._written[_memory(tensor)] = (self._now, tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
