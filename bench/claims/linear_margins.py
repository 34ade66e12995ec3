"""The two theorems of Nar et al. 2019 (arXiv 1901.08360) on linear classifiers, as an experiment.

Separable points of two classes lie in a plane that is one unit away from the origin in several further directions.
Theorem 1: descent on the cross-entropy ends below a bound that falls as the plane moves away. Theorem 2: descent on the
differential loss ends at the largest margin wherever the plane lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from robustboard.attacks.keyed import generator
from robustboard.defenses.differential import differential_loss
from robustboard.defenses.feature_rank import cross_entropy_margin_bound, feature_rank
from robustboard.defenses.offsets import offsets


@dataclass(frozen=True)
class LinearMargins:
    """Distances of the nearest point from the hyperplanes found on one data set.

    Attributes:
        largest: gamma, of the hard-margin support vector machine.
        differential: of differential training, its offset at the midpoint.
        cross_entropy: of descent on the cross-entropy.
        bound: theorem 1's upper bound on it.
    """

    largest: float
    differential: float
    cross_entropy: float
    bound: float


def linear_margins(seed: int, *, steps: int = 4000, directions: int = 8) -> LinearMargins:
    """Train the three classifiers on one data set.

    Args:
        seed: of the data set.
        steps: of gradient descent; each is divided by the loss, which changes the pace and not the limit.
        directions: in how many directions the plane is away from the origin.
    """
    points, labels = plane_off_origin(seed, directions)
    largest = margin(*hard_margin_machine(points, labels), points, labels)
    differential = margin(*by_differences(points, labels, steps), points, labels)
    weight, offset = by_cross_entropy(points, labels, steps)
    found = margin(weight, offset, points, labels)
    scaled = offset / (found * float(weight.norm()))
    return LinearMargins(
        largest, differential, found, cross_entropy_margin_bound(largest, scaled, feature_rank(points).offset)
    )


def plane_off_origin(seed: int, directions: int) -> tuple[Tensor, Tensor]:
    """Two separable classes: points (60, 2 + directions) in double precision, and labels (60,) in {0, 1}."""
    draws = generator("linear margins", seed)
    labels = torch.arange(60) % 2
    plane = torch.randn(60, 2, generator=draws, dtype=torch.float64)
    towards = torch.randn(2, generator=draws, dtype=torch.float64)
    towards /= towards.norm()
    # Bring each point to its side of a line that does not pass through the origin, at a distance of at least 1/2.
    along = plane @ towards
    sides = 2.0 * labels - 1
    plane += ((along.abs() + 0.5) * sides - along + 2.0).unsqueeze(1) * towards
    return torch.cat([plane, torch.ones(60, directions, dtype=torch.float64)], dim=1), labels


def margin(weight: Tensor, offset: float, points: Tensor, labels: Tensor) -> float:
    """The distance of the nearest point from the hyperplane, negative if one is on the wrong side."""
    return float(((points @ weight + offset) * (2 * labels - 1)).min() / weight.norm())


def hard_margin_machine(points: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """The hyperplane of the largest margin, by quadratic programming."""
    import cvxpy as cp

    weight, offset = cp.Variable(points.shape[1]), cp.Variable()
    sides = cp.multiply(2 * labels.numpy() - 1, points.numpy() @ weight + offset)
    cp.Problem(cp.Minimize(cp.sum_squares(weight)), [sides >= 1]).solve(solver=cp.CLARABEL)
    return torch.from_numpy(np.array(weight.value)), float(offset.value)


def by_differences(points: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, float]:
    """Descent on the differential loss (L), and the midpoint for an offset."""
    weights = torch.zeros(2, points.shape[1], dtype=torch.float64, requires_grad=True)
    _descend(lambda: differential_loss(points @ weights.T, labels, "log"), [weights], steps)
    found = weights.detach()
    biases = offsets(points @ found.T, labels)
    return (found[1] - found[0]) / 2, float(biases[1] - biases[0]) / 2


def by_cross_entropy(points: Tensor, labels: Tensor, steps: int) -> tuple[Tensor, float]:
    """Descent on the cross-entropy, weights and offset together."""
    weight = torch.zeros(points.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sides = 2 * labels - 1
    _descend(lambda: functional.softplus(-sides * (points @ weight + offset)).mean(), [weight, offset], steps)
    return weight.detach(), offset.item()


def _descend(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int, rate: float = 0.1) -> None:
    for _ in range(steps):
        value = loss()
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(rate / value * gradient)
