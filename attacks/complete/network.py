"""A classifier read as what complete verification needs: affine maps with ReLU between them, in float64.

The model is traced with `torch.fx`. Every operation must be known to be affine (linear, convolution, average pooling,
batch normalisation at its running statistics, reshaping, normalisation by constants, residual sums) or be a ReLU;
anything else is refused with a sentence, and so is an operation that writes over a tensor which is read again later:
the graph has no notion of shared memory. `verify` runs what was read next to the model itself, as a second guard.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from robustboard.attacks.bounded_view import shared_view
from robustboard.errors import BoundsError, first_line

# Numbers of a traced model that differ from the model's own by more than float32 rounding are another function.
SAME_FUNCTION = 1e-3

_ROWS_AT_A_TIME = 512
_RELU_FUNCTIONS: tuple[object, ...] = (torch.relu, functional.relu)
_AFFINE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ZeroPad2d,
)
_NORMALISING: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d)
_SHAPING: tuple[object, ...] = (
    *("flatten", "view", "reshape", "unsqueeze", "squeeze", "contiguous", "clone", "mean"),
    *(torch.flatten, torch.reshape, torch.mean, functional.avg_pool2d, functional.adaptive_avg_pool2d),
)
_SUMS: tuple[object, ...] = (
    operator.add,
    torch.add,
    "add",
    operator.sub,
    torch.sub,
    "sub",
    operator.iadd,
    operator.isub,
)
_PRODUCTS: tuple[object, ...] = (operator.mul, torch.mul, "mul", operator.imul)
_QUOTIENTS: tuple[object, ...] = (operator.truediv, torch.div, torch.true_divide, "div", operator.itruediv)
_WRITING: dict[object, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_WEIGHTED: tuple[object, ...] = (functional.linear, functional.conv2d)
# What may return its input, or a view of it.
_SHARING: tuple[object, ...] = (
    *("flatten", "view", "reshape", "unsqueeze", "squeeze", "contiguous", "float", "double"),
    *(torch.flatten, torch.reshape, nn.Flatten, nn.Unflatten, nn.Identity),
)
# A change of type is what the float64 copy is there to avoid.
_RETYPING: tuple[object, ...] = ("float", "double")


class ReluNetwork:
    """A copy of a classifier in float64 whose only non-linear steps are `layers` ReLUs.

    Args:
        model: the classifier, in eval mode; it is not changed.
        image: one image (1, C, H, W); only its shape and device count.

    Raises:
        BoundsError: naming the operation that is neither affine nor a ReLU.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> network = ReluNetwork(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        ...                       torch.zeros(1, 1, 2, 2))
        >>> network.widths, network.logits(torch.zeros(5, 1, 2, 2)).shape
        ((3,), torch.Size([5, 2]))
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.shape = tuple(image.shape[1:])
        self.device = next((parameter.device for parameter in model.parameters()), image.device)
        try:
            copied = copy.deepcopy(shared_view(model)).double().requires_grad_(requires_grad=False)
            graph = _Tracer().trace(copied)
            self._relus = _read(copied, graph)
        except BoundsError:
            raise
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            raise BoundsError(f"Complete verification cannot trace this network: {first_line(error)}.") from error
        self._module = fx.GraphModule(copied, graph)
        widths: list[int] = []

        def measure(_: int, values: Tensor) -> Tensor:
            widths.append(values[0].numel())
            return values.relu()

        try:
            self._run(torch.zeros(1, *self.shape, dtype=torch.float64, device=self.device), measure)
        except Exception as error:  # as above: a shape that is fixed in code, a module that insists on float32
            raise BoundsError(f"Complete verification cannot run this network: {first_line(error)}.") from error
        self.widths = tuple(widths)

    @property
    def layers(self) -> int:
        """How many ReLU steps there are."""
        return len(self.widths)

    def logits(self, images: Tensor) -> Tensor:
        """The logits (N, K), in float64; gradients with respect to the images flow."""
        return self._run(images.to(self.device, torch.float64), lambda _, values: values.relu())

    def affine(
        self, layer: int, active: Sequence[Tensor], unstable: Sequence[Tensor], mix: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The inputs of ReLU step `layer`, or mixtures of the logits, as affine functions, some rows at a time.

        In the functions, a neuron of an earlier step is its input where it is active, a variable of its own where it is
        unstable, and zero everywhere else.

        Args:
            layer: the ReLU step, or `layers` for the logits.
            active: for each earlier step a float64 (width,) of zeros and ones.
            unstable: for each earlier step the positions of its unstable neurons, int64.
            mix: (R, K), the rows to bound as mixtures of the logits; None takes every input of the step.

        Yields:
            Coefficients on the pixels (R, C * H * W), on the variables (R, n) in the order of the steps, and the
            constants (R,).
        """
        pixels = torch.zeros(1, *self.shape, dtype=torch.float64, device=self.device, requires_grad=True)
        variables = [torch.zeros(len(rows), dtype=torch.float64, device=self.device) for rows in unstable]
        reached: list[Tensor] = []

        def step(index: int, values: Tensor) -> Tensor:
            if index == layer:
                reached.append(values.flatten())
            if index >= layer:
                return values
            flat = values.flatten() * active[index]
            return flat.index_add(0, unstable[index], variables[index]).view(values.shape)

        with torch.enable_grad():
            for variable in variables:
                variable.requires_grad_()
            logits = self._run(pixels, step)
            outputs = reached[0] if layer < self.layers else logits.flatten()
            # A layer need not depend on all of them; their part of its derivative is zero then, not missing.
            outputs = outputs + 0.0 * sum(leaf.sum() for leaf in (pixels, *variables))
        count = len(outputs) if mix is None else len(mix)
        for first in range(0, count, _ROWS_AT_A_TIME):
            part = _unit_rows(first, count, outputs) if mix is None else mix[first : first + _ROWS_AT_A_TIME]
            slopes = torch.autograd.grad(outputs, [pixels, *variables], part, is_grads_batched=True, retain_graph=True)
            flat = [slope.reshape(len(part), -1) for slope in slopes]
            yield flat[0], torch.cat([flat[0][:, :0], *flat[1:]], dim=1), part @ outputs.detach()

    def _run(self, images: Tensor, step: Callable[[int, Tensor], Tensor]) -> Tensor:
        logits: Tensor = _Runner(self._module, self._relus, step).run(images)
        return logits


def _unit_rows(first: int, count: int, like: Tensor) -> Tensor:
    """Some rows of the identity matrix, which may be too large as a whole."""
    places = torch.arange(first, min(first + _ROWS_AT_A_TIME, count), device=like.device)
    return functional.one_hot(places, count).to(like.dtype)


class _Proxy(fx.Proxy):
    """Records `a += b` as what it is; otherwise Python falls back on `a = a + b`, and the tracer never hears of it."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self._written(operator.iadd, other)

    def __isub__(self, other: object) -> fx.Proxy:
        return self._written(operator.isub, other)

    def __imul__(self, other: object) -> fx.Proxy:
        return self._written(operator.imul, other)

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self._written(operator.itruediv, other)

    def _written(self, operation: Callable[..., Any], other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})


class _Tracer(fx.Tracer):
    """Keeps torchvision's `Normalize` whole: its forward inspects the tensor, which cannot be traced."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_normalize(m) or super().is_leaf_module(m, module_qualified_name)


class _Runner(fx.Interpreter):
    """Runs the graph with a given function in place of each ReLU."""

    def __init__(self, module: fx.GraphModule, relus: Sequence[str], step: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(module)
        self._places = {name: place for place, name in enumerate(relus)}
        self._step = step

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self._places:
            return self._step(self._places[n.name], self.env[n.all_input_nodes[0]])
        if n.op == "call_method" and n.target in _RETYPING:
            return self.env[n.all_input_nodes[0]]
        if n.target in _WRITING:
            # Nobody reads the old value again, but autograd and `step` may still hold it.
            return _WRITING[n.target](*self.fetch_args_kwargs_from_env(n)[0])
        return super().run_node(n)


def _read(model: nn.Module, graph: fx.Graph) -> list[str]:
    """The names of the ReLU nodes, in order.

    Raises:
        BoundsError: if a node is neither affine nor a ReLU.
    """
    relus: list[str] = []
    varying: set[fx.Node] = set()  # tensors that depend on the image
    shapes: set[fx.Node] = set()  # sizes of such tensors, which do not depend on its values
    memory = _Memory()
    for node in graph.nodes:
        inputs = [item for item in node.all_input_nodes if item in varying]
        if node.op == "placeholder":
            if varying:
                raise BoundsError("Complete verification is for networks of one input, the image.")
            varying.add(node)
        elif node.op == "output":
            memory.read(inputs)
            if len(inputs) != 1 or node.args[0] is not inputs[0]:
                raise BoundsError("Complete verification is for networks of one output, the logits.")
        elif not inputs:
            if any(item in shapes for item in node.all_input_nodes):
                shapes.add(node)
        elif _is_shape(node):
            shapes.add(node)
        else:
            varying.add(node)
            memory.follow(model, node, inputs)
            if _is_relu(model, node):
                relus.append(node.name)
            elif not _is_affine(model, node, inputs):
                raise BoundsError(f"Complete verification does not know the operation {_name(model, node)}.")
    return relus


class _Memory:
    """Which tensors share memory, and which of them have been written over."""

    def __init__(self) -> None:
        self._home: dict[fx.Node, fx.Node] = {}
        self._stale: set[fx.Node] = set()

    def read(self, inputs: list[fx.Node]) -> None:
        """Refuse, with a BoundsError, to read a tensor that has been written over since it was computed."""
        if any(item in self._stale for item in inputs):
            raise BoundsError("Complete verification is not for networks that write over what they read again later.")

    def follow(self, model: nn.Module, node: fx.Node, inputs: list[fx.Node]) -> None:
        """One more operation on tensors that depend on the image.

        Raises:
            BoundsError: if it reads a tensor that has been written over, or writes over the image.
        """
        self.read(inputs)
        written = _writes(model, node)
        source = inputs[0]
        home = self._home.get(source, source)
        if written and (home.op == "placeholder" or (node.args and node.args[0] is not source)):
            raise BoundsError("Complete verification is not for networks that write over their input or a constant.")
        if written:
            self._stale |= {home} | {other for other, place in self._home.items() if place is home}
        shares = written or _kind(model, node) in _SHARING
        self._home[node] = home if shares else node


def _writes(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.target is functional.relu:
        return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))
    return node.target in _WRITING or (node.op == "call_method" and node.target == "relu_")


def _kind(model: nn.Module, node: fx.Node) -> object:
    return type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _is_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size"
    return node.target is getattr and node.args[1] in ("shape", "device", "dtype")


def _is_relu(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))) is nn.ReLU
    return node.target in _RELU_FUNCTIONS or (node.op == "call_method" and node.target in ("relu", "relu_"))


def _is_affine(model: nn.Module, node: fx.Node, inputs: list[fx.Node]) -> bool:
    if not node.args or any(isinstance(item, fx.Node) and item in inputs for item in node.kwargs.values()):
        return False
    if node.kwargs.get("rounding_mode") is not None:
        return False
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if "forward" in vars(module):
            return False
        if type(module) in _NORMALISING:
            return getattr(module, "running_mean", None) is not None
        return type(module) in _AFFINE_MODULES or (_is_normalize(module) and not getattr(module, "inplace", False))
    if node.target in _SUMS:
        return all(item in node.args for item in inputs)
    if node.target in _PRODUCTS:
        return len(inputs) == 1 and node.args.count(inputs[0]) == 1
    if node.target in _QUOTIENTS or node.target in _WEIGHTED:
        return inputs == [node.args[0]]
    return inputs == [node.args[0]] and (node.target in _SHAPING or node.target in _RETYPING)


def _is_normalize(module: nn.Module) -> bool:
    return type(module).__name__ == "Normalize" and type(module).__module__.startswith("torchvision.")


def _name(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
