"""Offsets for a classifier whose training left them open: only the biases of its last layer, from its scores.

For two classes, Nar et al. 2019 (arXiv 1901.08360): half-way between the nearest points of the two classes, which for
a given direction is the offset of the largest margin. For more, where the midpoints of the pairs contradict each other,
the biases that minimise the cross-entropy: a convex problem in K numbers. That rule is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

OVERLAP = 0.01


def offsets(scores: Tensor, labels: Tensor) -> Tensor:
    """Biases (K,) for scores without any, (N, K); shifting or scaling the scores shifts or scales them alike.

    >>> offsets(torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 8.0]]), torch.tensor([0, 0, 1]))
    tensor([ 2.7500, -2.7500])
    """
    if scores.shape[1] != 2:
        return class_offsets(scores, labels)
    difference = (scores[:, 1] - scores[:, 0]) / 2
    if not bool(torch.bincount(labels, minlength=2).all()):
        return torch.zeros_like(scores[0])
    offset = midpoint_offset(difference[labels == 1], difference[labels == 0])
    return torch.stack([-offset, offset])


def midpoint_offset(upper: Tensor, lower: Tensor) -> Tensor:
    """The b that puts the zero of s + b half-way between the classes, a scalar.

    Where the scores overlap, the 1 % of each class that lie nearest to the other are passed over.

    Args:
        upper: the scores s of the class that is to be positive, (N,).
        lower: those of the other, (M,).

    >>> midpoint_offset(torch.tensor([3.0, 9.0]), torch.tensor([-5.0, 1.0]))
    tensor(-2.)
    """
    least, greatest = upper.min(), lower.max()
    if least <= greatest:
        least, greatest = torch.quantile(upper, OVERLAP), torch.quantile(lower, 1 - OVERLAP)
    return -(least + greatest) / 2


def class_offsets(scores: Tensor, labels: Tensor) -> Tensor:
    """The biases (K,), zero in sum, that minimise the cross-entropy of scores (N, K) brought to unit deviation.

    Without that scale the fit may not move at all, or lose every class but one.
    """
    scale = deviation(scores).double()
    fixed = scores.double() / scale
    biases = torch.zeros(fixed.shape[1], dtype=torch.float64, device=fixed.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [biases], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        # The small penalty keeps the bias of a class without examples finite.
        loss = functional.cross_entropy(fixed + biases, labels) + 1e-6 * biases.square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[no-untyped-call]
    found = biases.detach()
    return ((found - found.mean()) * scale).to(scores)


def deviation(scores: Tensor) -> Tensor:
    """The standard deviation of the differences between the scores (N, K) of a point, whatever their offsets; positive.

    >>> deviation(torch.tensor([[9.0, 0.0], [5.0, 0.0], [1.0, 4.0]]))
    tensor(2.4944)
    """
    apart = scores - scores.mean(dim=1, keepdim=True)
    spread = (apart - apart.mean(dim=0)).square().mean().sqrt()
    return spread.clamp(min=torch.finfo(torch.float32).tiny)
