"""What lies between a classifier and auto_LiRPA: a view to trace, and corrections to the network made from it."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from robustboard.attacks.counting import only_counts
from robustboard.errors import BoundsError

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# ONNX's numbers of float32 and float64.
_WIDE_TYPES = (1, 11)
# Pre-hooks that compute a module's weight from its parameters and never see its input.
_REWEIGHTING = (WeightNorm, SpectralNorm)


def shared_view(model: nn.Module) -> nn.Module:
    """A copy of the module tree, in eval mode and without dropout, on the model's own parameters and buffers.

    Raises:
        BoundsError: if a hook may change what a module computes; no reading of the modules would show it.
    """
    _require_plain_hooks(model)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        # Hooks that are left count passes; they belong to the model, and may hold what cannot be copied.
        memo |= {id(hooks): OrderedDict() for name in _HOOKS if (hooks := getattr(module, name, None)) is not None}
    view = copy.deepcopy(model, memo)
    for module in list(view.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.dropout._DropoutNd):
                setattr(module, name, nn.Identity())
    return view.eval()


def _require_plain_hooks(model: nn.Module) -> None:
    shared = torch.nn.modules.module
    before = list(shared._global_forward_pre_hooks.values())
    after = list(shared._global_forward_hooks.values())
    for module in model.modules():
        before += module._forward_pre_hooks.values()
        after += module._forward_hooks.values()
    if not all(type(hook) in _REWEIGHTING for hook in before) or not all(only_counts(hook) for hook in after):
        raise BoundsError("This network has forward hooks, which may change what its modules compute.")


def share_buffers(network: Any, core: nn.Module) -> None:
    """Give auto_LiRPA's network the live buffers: its copies of running statistics would age while training goes on."""
    live = dict(core.named_buffers())
    for node in network.modules():
        if type(node).__name__ == "BoundBuffers" and node.ori_name in live:
            node.buffer = live[node.ori_name]


def patches_hold(network: Any) -> bool:
    """Whether patches mode may be trusted: it ignores dilation, mixes up groups and takes feature maps for square."""
    for node in network.modules():
        shape = tuple(getattr(node, "output_shape", None) or ())
        if len(shape) == 4 and getattr(node, "from_input", False) and shape[2] != shape[3]:
            return False
        attributes = node.attr if isinstance(getattr(node, "attr", None), dict) else {}
        if attributes.get("group", 1) != 1 or any(step != 1 for step in attributes.get("dilations", [])):
            return False
        if len(set(attributes.get("kernel_shape", []))) > 1 or len(set(attributes.get("strides", []))) > 1:
            return False
    return True


def casts_hold(network: Any) -> bool:
    """Whether every change of type keeps the values: the bounds take each for the identity, also one to integers.

    A division that rounds (`rounding_mode`) is such a cast after tracing.
    """
    casts = [node for node in network.modules() if type(node).__name__ == "BoundCast"]
    return not any(getattr(node, "from_input", True) and node.to not in _WIDE_TYPES for node in casts)


def separate_examples(network: Any) -> None:
    """Make the bounds of hidden neurons independent of the rest of the batch.

    auto_LiRPA bounds a neuron by CROWN when it is unstable for any example of the batch, and otherwise keeps the
    interval bound, its reference. Here each example for which the interval bound says that the neuron is stable keeps
    that bound, whatever the others do.
    """
    restore = network.restore_sparse_bounds
    signature = inspect.signature(restore)
    if "ref_intermediate_lb" not in signature.parameters:
        return

    def restore_each(*args: Any, **kwargs: Any) -> None:
        restore(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        node, low, high = given["node"], given["ref_intermediate_lb"].detach(), given["ref_intermediate_ub"].detach()
        stable = (low >= 0) | (high <= 0)
        node.lower, node.upper = torch.where(stable, low, node.lower), torch.where(stable, high, node.upper)

    network.__dict__["restore_sparse_bounds"] = restore_each
