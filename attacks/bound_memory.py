"""How much memory a bound needs, estimated from the layers that auto_LiRPA traced.

CROWN walks back from every hidden layer that needs bounds and from the logits. On the way it holds, for each of the S
neurons it started from, one coefficient for each of the n neurons of the layer it has reached: S x n numbers an
example. Behind convolutions the coefficients are patches, as large as the neuron's receptive field so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from robustboard.attacks.bounded_network import BoundedNetwork

# The coefficients exist for both sides, before and after a layer, split by sign, beside the unfolded slopes (measured).
_COPIES = 14
# alpha-CROWN keeps those of every layer for its backward pass, and slopes with their gradient, moments and best values.
_COPIES_KEPT = 6
_ALPHA_COPIES = 12


@dataclass(frozen=True)
class Need:
    """Bytes that one example takes, by method."""

    ibp: int
    crown_ibp: int
    crown: int
    alpha_crown: int

    def of(self, method: str) -> int:
        """The bytes for a name of `METHODS`."""
        return int(getattr(self, method.replace("-", "_")))


def estimate(bounded: BoundedNetwork) -> Need:
    """Estimate what bounding one example takes; measured peaks lie between a third of it and all of it."""
    network, classes, patches = bounded.network, bounded.classes, bounded.patches
    itemsize = torch.finfo(bounded.dtype).bits // 8
    nodes = [node for node in network.modules() if getattr(node, "from_input", False) and _shape(node)]
    hidden = {node.inputs[index].name for node in nodes for index in getattr(node, "requires_input_bounds", None) or ()}
    activations = 4 * sum(_size(node) for node in nodes)
    final = network.final_node()
    margins = [(classes - 1) * held for held in _held(nodes, final, patches=False)]
    peaks, kept, slopes = [max(margins)], sum(margins), 0
    for target in (node for node in nodes if node.name in hidden):
        rows = _size(target)
        coefficients = [rows * held for held in _held(nodes, target, patches=patches)]
        peaks.append(max(coefficients))
        kept += sum(coefficients)
        # One slope for each neuron below and each row above, shared within a channel of a convolution.
        slope_rows = _shape(target)[0] if patches and len(_shape(target)) == 3 else rows
        slopes += 2 * slope_rows * sum(_size(node) for node in _below(nodes, target) if node.name in hidden)
    slopes += 2 * (classes - 1) * sum(_size(node) for node in nodes if node.name in hidden)
    return Need(
        ibp=itemsize * activations,
        crown_ibp=itemsize * (activations + _COPIES * max(margins)),
        crown=itemsize * (activations + _COPIES * max(peaks)),
        alpha_crown=itemsize * (activations + _COPIES * max(peaks) + _COPIES_KEPT * kept + _ALPHA_COPIES * slopes),
    )


def _held(nodes: list[Any], start: Any, *, patches: bool) -> list[int]:
    """Coefficients a row of `start` holds at each layer on the way back to the input."""
    # A node maps to the side of its patch, or to None where the coefficients are a full matrix.
    side: dict[str, int | None] = {start.name: 1 if patches and len(_shape(start)) == 3 else None}
    held = []
    for node in reversed(nodes):
        if node.name not in side:
            continue
        reach = side[node.name]
        full = _size(node)
        held.append(full if reach is None else min(full, _shape(node)[0] * reach * reach))
        for before in node.inputs:
            grown = _grow(node, reach)
            known = side.get(before.name, 0)
            side[before.name] = None if grown is None or known is None else max(grown, known)
    return held


def _grow(node: Any, side: int | None) -> int | None:
    if side is None or len(_shape(node)) != 3:
        return None
    given = getattr(node, "attr", None)
    attributes: dict[str, Any] = given if isinstance(given, dict) else {}
    kernel = attributes.get("kernel_shape")
    if kernel is None:
        return side
    strides, dilations = attributes.get("strides", [1]), attributes.get("dilations", [1])
    return (side - 1) * int(max(strides)) + (int(max(kernel)) - 1) * int(max(dilations)) + 1


def _below(nodes: list[Any], target: Any) -> list[Any]:
    found, reached = [], {target.name}
    for node in reversed(nodes):
        if node.name in reached:
            reached |= {before.name for before in node.inputs}
            found.append(node)
    return found[1:]


def _shape(node: Any) -> tuple[int, ...]:
    shape = getattr(node, "output_shape", None)
    return tuple(shape[1:]) if shape is not None and len(shape) > 1 else ()


def _size(node: Any) -> int:
    return math.prod(_shape(node))
