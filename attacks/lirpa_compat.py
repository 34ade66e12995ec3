"""Loads auto_LiRPA, mended where this torch and numpy need it.

The release on PyPI (0.3, 2022) was written for torch < 1.13. Each mend below asks first whether it is needed, so a
newer auto_LiRPA or an older torch is left alone, and applying it twice changes nothing. Nothing of torch changes its
meaning: two names that older releases had are put back, and what must behave differently or be faster is replaced
inside auto_LiRPA's own modules only.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustboard.errors import BoundsError

# Measured: between 32 and 128 there is no difference, below and above it is slower.
_TRANSPOSED = 64

INSTALL = "pip install --no-deps auto_LiRPA==0.3"


def load() -> types.ModuleType:
    """The package `auto_LiRPA`, ready to use; the first call imports and mends it.

    Raises:
        BoundsError: if it is not installed, or cannot be imported with this torch.
    """
    mend_before_import()
    try:
        with quiet(), _logs_kept():
            package = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        if error.name == "auto_LiRPA":
            raise BoundsError(f"Verified bounds need auto_LiRPA, which is not installed; run `{INSTALL}`.") from error
        raise BoundsError(f"auto_LiRPA cannot be imported here ({error}); run `{INSTALL}`.") from error
    mend_after_import()
    return package


def submodule(name: str) -> types.ModuleType:
    """The package's module `name`, such as `patches`."""
    load()
    return importlib.import_module(f"auto_LiRPA.{name}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep auto_LiRPA's prints and warnings, and the tracer's, away from the user's terminal."""
    # Recorded, not filtered: the package installs filters of its own when it is imported.
    with warnings.catch_warnings(record=True), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """The messages that auto_LiRPA logs meanwhile; it names unsupported operators nowhere else."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("auto_LiRPA")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def mend_before_import() -> None:
    """Put back what auto_LiRPA 0.3 imports or uses of numpy and torch and what they no longer have."""
    _mend_numpy_isin()
    _mend_opset_setter()
    _mend_node_items()


def mend_after_import() -> None:
    """Mend what is inside auto_LiRPA itself, and keep its log to itself."""
    _mend_named_members()
    if not _clamp_passes_gradient_at_its_bounds():
        for name, module in list(sys.modules.items()):
            if name.startswith("auto_LiRPA.operators.") and getattr(module, "torch", None) is torch:
                module.__dict__["torch"] = _TorchWithInclusiveClamp()
    convolution = sys.modules.get("auto_LiRPA.operators.convolution")
    if getattr(convolution, "F", None) is functional:
        vars(convolution)["F"] = _FunctionalWithQuickTranspose()
    log = logging.getLogger("auto_LiRPA")
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.NullHandler())


def _mend_numpy_isin() -> None:
    # 0.3 has `from numpy.lib.arraysetops import isin`; numpy 2 made that module private.
    try:
        importlib.import_module("numpy.lib.arraysetops")
    except ImportError:
        module = types.ModuleType("numpy.lib.arraysetops")
        module.__dict__["isin"] = np.isin
        sys.modules["numpy.lib.arraysetops"] = module


def _mend_opset_setter() -> None:
    # 0.3 chooses opset 12 by `torch.onnx.symbolic_helper._set_opset_version`; torch moved the setting to a global of
    # its internal TorchScript exporter, where `torch.onnx.utils._optimize_graph` reads it.
    helper = importlib.import_module("torch.onnx.symbolic_helper")
    if hasattr(helper, "_set_opset_version"):
        return

    def set_opset_version(version: int) -> None:
        for name in ("torch.onnx._internal.torchscript_exporter._globals", "torch.onnx._globals"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            module.GLOBALS.export_onnx_opset_version = version
            return

    helper.__dict__["_set_opset_version"] = set_opset_version


def _mend_node_items() -> None:
    # 0.3 reads the attributes of a traced node as `node[key]`, which torch.onnx added to the class until 2.0.
    node: Any = torch._C.Node
    if not hasattr(node, "__getitem__"):
        helper = importlib.import_module("torch.onnx.symbolic_helper")
        node.__getitem__ = helper._node_get


def _mend_named_members() -> None:
    # torch 2 passes `remove_duplicate` to `_named_members`, which 0.3 overrides without it: `parameters()` fails, and
    # with it matrix mode and residual networks.
    bounded: Any = importlib.import_module("auto_LiRPA.bound_general").BoundedModule
    members = bounded._named_members
    known = inspect.signature(members).parameters.values()
    if not any(parameter.name == "remove_duplicate" or parameter.kind is parameter.VAR_KEYWORD for parameter in known):

        def named_members(self: Any, get_members_fn: Any, prefix: str = "", recurse: bool = True, **_: Any) -> Any:
            return members(self, get_members_fn, prefix, recurse)

        bounded._named_members = named_members


def _clamp_passes_gradient_at_its_bounds() -> bool:
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(torch.clamp(ends, 0.0, 1.0).sum(), ends)
    return bool((gradient == 1).all())


class _InclusiveClamp(torch.autograd.Function):
    """`torch.clamp` whose gradient is one on the closed interval, as it was in the torch that auto_LiRPA knew."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float | None, high: float | None) -> Tensor:
        clamped = torch.clamp(values, min=low, max=high)
        ctx.save_for_backward(clamped == values)
        return clamped

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


class _TorchWithInclusiveClamp(types.ModuleType):
    """Stands for `torch` inside auto_LiRPA's operators: every alpha of alpha-CROWN starts at exactly 0 or 1.

    Where `torch.clamp` has gradient zero at its bounds, no alpha ever moves and alpha-CROWN silently returns CROWN.
    """

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def clamp(values: Tensor, min: float | None = None, max: float | None = None) -> Tensor:  # noqa: A002
        """`torch.clamp` with the inclusive gradient."""
        result: Tensor = _InclusiveClamp.apply(values, min, max)
        return result


class _FunctionalWithQuickTranspose(types.ModuleType):
    """Stands for `torch.nn.functional` where auto_LiRPA walks back through a convolution.

    On a CPU torch transposes a convolution in float64 example by example, which is most of CROWN's time: each of the
    many examples is a neuron and a small patch. As products of matrices it takes up to ten times less.
    """

    def __init__(self) -> None:
        super().__init__("torch.nn.functional")

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    @staticmethod
    def conv_transpose2d(
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        """`torch.nn.functional.conv_transpose2d`, with the same arguments, up to rounding."""
        plain = values.dim() == 4 and len(values) and groups == 1 and _pair(dilation) == (1, 1) and bias is None
        if not plain or values.dtype != torch.float64 or values.device.type != "cpu":
            return functional.conv_transpose2d(values, weight, bias, stride, padding, output_padding, groups, dilation)
        kernel, strides, pads, more = tuple(weight.shape[2:]), _pair(stride), _pair(padding), _pair(output_padding)
        sizes = zip(values.shape[2:], strides, pads, kernel, more, strict=True)
        height, width = ((n - 1) * step - 2 * pad + taps + extra for n, step, pad, taps, extra in sizes)
        matrix = weight.flatten(1)
        if values.shape[2:] == (1, 1) and pads == more == (0, 0):
            return (values.flatten(1) @ matrix).view(-1, weight.shape[1], *kernel)
        # A few at a time, whose products are still in the cache when they are added up.
        parts = [
            functional.fold(matrix.T @ part.flatten(2), (height, width), kernel, padding=pads, stride=strides)
            for part in torch.split(values, _TRANSPOSED)
        ]
        return torch.cat(parts)


def _pair(setting: int | Sequence[int]) -> tuple[int, int]:
    """A setting of both dimensions, or one for each."""
    if isinstance(setting, int):
        return setting, setting
    first, second = setting
    return int(first), int(second)


@contextlib.contextmanager
def _logs_kept() -> Iterator[None]:
    # The import calls `logging.basicConfig(stream=sys.stdout)`: every program's log would go to its standard output. It
    # also imports torch's extension builder, which warns on machines without a GPU.
    root, builder = logging.getLogger(), logging.getLogger("torch.utils.cpp_extension")
    handlers, level, builder_level = list(root.handlers), root.level, builder.level
    builder.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
        builder.setLevel(builder_level)
