"""Recognises a leading per-channel affine layer, the usual `(x - mean) / std`, and splits it off a classifier.

Bounds are then taken in normalised coordinates, where a box stays a box. The layer must not be folded into the weights
of a first convolution instead: the convolution pads with zeros *after* normalising, so folding changes the function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_ADD: tuple[object, ...] = (operator.add, torch.add, "add")
_SUB: tuple[object, ...] = (operator.sub, torch.sub, "sub")
_MUL: tuple[object, ...] = (operator.mul, torch.mul, "mul")
_DIV: tuple[object, ...] = (operator.truediv, torch.div, torch.true_divide, "div")
_AS_IS: tuple[object, ...] = ("contiguous", "float", "clone")


@dataclass(frozen=True)
class ChannelAffine:
    """`y[c] = scale[c] * x[c] + shift[c]`, both float64 of shape (C,)."""

    scale: Tensor
    shift: Tensor

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def apply(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) in float64."""
        scale, shift = self.scale.to(images.device), self.shift.to(images.device)
        return images.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    def box(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The image of the box [lower, upper], rounded outward to the inputs' type; shapes (N, C, H, W)."""
        if self.is_identity:
            return lower, upper
        first, second = self.apply(lower), self.apply(upper)
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        return _outward(low, lower.dtype, -torch.inf), _outward(high, upper.dtype, torch.inf)


def split_normalisation(model: nn.Module, channels: int) -> tuple[ChannelAffine, nn.Module]:
    """Split `model` into a leading per-channel affine map and the rest, which shares the model's parameters.

    The model is traced with `torch.fx`. Where that fails, or the input is used in any other way first, the map is the
    identity and the rest is the untouched model. A map with parameters that are being trained is left in the model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Normalised(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.tensor([0.5, 0.25]).view(1, 2, 1, 1))
        ...         self.net = nn.Conv2d(2, 3, 1)
        ...     def forward(self, x):
        ...         return self.net((x - self.mean) / 0.5)
        >>> affine, rest = split_normalisation(Normalised(), 2)
        >>> affine.scale.tolist(), affine.shift.tolist()
        ([2.0, 2.0], [-1.0, -0.5])
    """
    nothing = ChannelAffine(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))
    try:
        graph = _Tracer().trace(model)
        affine, end = _leading_affine(model, graph, nothing)
        if end is None:
            return nothing, model
        rest = _after(model, graph, end)
    except Exception:  # tracing runs the model's own code: whatever it raises, the whole model is bounded as it is
        return nothing, model
    return affine, rest


class _Tracer(fx.Tracer):
    """Keeps torchvision's `Normalize` whole: its forward inspects the tensor, which cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _normalize_constants(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _leading_affine(model: nn.Module, graph: fx.Graph, identity: ChannelAffine) -> tuple[ChannelAffine, fx.Node | None]:
    """The longest affine chain from the input, and the node that ends it (None when there is no chain)."""
    constants = _Constants(model, graph)
    node = next(node for node in graph.nodes if node.op == "placeholder")
    affine, end = identity, None
    while True:
        users = [user for user in node.users if user not in constants]
        if len(users) != 1:
            return affine, end
        step = _affine_step(model, users[0], node, constants, len(identity.scale))
        if step is None:
            return affine, end
        node = end = users[0]
        affine = ChannelAffine(affine.scale * step.scale, affine.shift * step.scale + step.shift)


def _affine_step(
    model: nn.Module, node: fx.Node, source: fx.Node, constants: _Constants, channels: int
) -> ChannelAffine | None:
    """What `node` does to `source`, if that is a per-channel affine map."""
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Identity):
            return ChannelAffine(one, zero)
        known = _normalize_constants(module)
        if known is None:
            return None
        mean, std = (torch.as_tensor(values, dtype=torch.float32).double().expand(channels) for values in known)
        return ChannelAffine(1 / std, -mean / std)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _AS_IS and node.args == (source,):
        return ChannelAffine(one, zero)
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = _per_channel(constants.value(right if left is source else left), channels)
    if other is None or (left is source) == (right is source):
        return None
    sides: dict[tuple[object, ...], Callable[[], ChannelAffine | None]] = {
        _ADD: lambda: ChannelAffine(one, other),
        _MUL: lambda: ChannelAffine(other, zero),
        _SUB: lambda: ChannelAffine(one, -other) if left is source else ChannelAffine(-one, other),
        _DIV: lambda: ChannelAffine(1 / other, zero) if left is source else None,
    }
    return next((make() for targets, make in sides.items() if node.target in targets), None)


def _normalize_constants(module: nn.Module) -> tuple[Any, Any] | None:
    kind = type(module)
    if kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision."):
        return module.mean, module.std
    return None


class _Constants:
    """The values of the nodes that hang on stored tensors alone, such as `self.mean.view(1, 3, 1, 1)`."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._values: dict[fx.Node, Any] = {}
        # A constant that is moved to an image's device or type asks the image for that and for nothing else.
        asked = {"device": torch.device("cpu"), "dtype": torch.float64}
        for node in graph.nodes:
            if node.op == "get_attr":
                self._values[node] = _attribute(model, str(node.target))
            elif node.op == "call_function" and node.target is getattr and node.args[1] in asked:
                self._values[node] = asked[str(node.args[1])]
            elif (
                node.op in ("call_function", "call_method")
                and node.all_input_nodes
                and all(item in self._values for item in node.all_input_nodes)
            ):
                self._values[node] = self._run(node)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def value(self, argument: object) -> Tensor | None:
        """The float64 value of an argument that is a number or a constant node, else None."""
        value = self._values.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            return None
        if isinstance(value, Tensor) and value.requires_grad:
            return None
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")

    def _run(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value.detach().cpu().double() if isinstance(value, Tensor) and not value.requires_grad else value


def _per_channel(value: Tensor | None, channels: int) -> Tensor | None:
    """The (C,) vector that broadcasts over (N, C, H, W) as `value` does, or None when it varies over pixels."""
    if value is None or value.ndim > 4:
        return None
    shape = (1,) * (4 - value.ndim) + tuple(value.shape)
    if shape[0] != 1 or shape[1] not in (1, channels) or shape[2:] != (1, 1):
        return None
    return value.reshape(shape[1]).expand(channels)


def _after(model: nn.Module, graph: fx.Graph, end: fx.Node) -> nn.Module:
    """The traced model from `end` on, as a module of its own input."""
    source = next(node for node in graph.nodes if node.op == "placeholder")
    end.replace_all_uses_with(source, delete_user_cb=lambda user: user is not end)
    rest = fx.GraphModule(model, graph)
    graph.eliminate_dead_code()
    rest.delete_all_unused_submodules()
    rest.recompile()
    return rest


def _outward(values: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    rounded = values.to(dtype)
    # One step more than the nearest value also covers the rounding of the layer itself.
    return torch.nextafter(rounded, torch.full_like(rounded, towards))
