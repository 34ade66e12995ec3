"""The gradient that an attack follows, and the step that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from robustboard.attacks.guards import NO_GRADIENT
from robustboard.attacks.threat import Norm
from robustboard.errors import ModelError


def gradient_at(points: Tensor, total: Tensor) -> Tensor:
    """The gradient of `total`, a sum of losses, with respect to `points`; the parameters get none.

    Raises:
        ModelError: if there is no path from the points to the losses.
    """
    gradient = torch.autograd.grad(total, points, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise ModelError(NO_GRADIENT)
    return gradient


def uphill(gradient: Tensor, norm: Norm) -> Tensor:
    """The unit step of steepest ascent in the norm, (N, C, H, W); zero where the gradient is zero.

    >>> uphill(torch.tensor([[3.0, -4.0]]), "linf"), uphill(torch.tensor([[3.0, -4.0]]), "l2")
    (tensor([[ 1., -1.]]), tensor([[ 0.6000, -0.8000]]))
    """
    if norm == "linf":
        return gradient.sign()
    # A saturated loss has gradients as small as 1e-38, whose squares vanish: scale by the largest entry first.
    tiny = torch.finfo(gradient.dtype).tiny
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
    unit: Tensor = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=tiny)
    return unit.view_as(gradient)
