"""The convex program of robust polynomial networks at scale: factored, with the exact worst case in every step.

Burer and Monteiro's substitution Z = sum_j alpha_j [u_j; 1][u_j; 1]^T turns the semidefinite program of
`convex_programs` into the training of the network itself, whose parameters need no cone constraint. The worst
perturbation in the L2 ball is found exactly (`worst_margins`), and by Danskin's theorem the gradient of the robust loss
is that at the worst perturbation held fixed. A stationary point is not proved to be the global optimum, but with as
many neurons as an optimal Z and Z' have ranks together the optima are equal; from several starts both forms meet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.quadratic import RELU_FIT, QuadraticNetwork
from robustboard.defenses.convex_features import FeatureMap
from robustboard.defenses.worst_margins import Comparisons, WorstMargins


class UnitNeurons(nn.Module):
    """f_k(x) = sum_j alpha_jk sigma(u_j . z(x)) with |u_j|_2 = 1: the network under training.

    Args:
        features: z; the ball is around its output.
        width: m.
        classes: K; two classes have one output f and the logits -f / 2 and f / 2.
        draws: of the initial weights.
        coefficients: a, b and c of the activation.
    """

    def __init__(
        self,
        features: FeatureMap,
        *,
        width: int,
        classes: int,
        draws: torch.Generator,
        coefficients: tuple[float, float, float] = RELU_FIT,
    ) -> None:
        super().__init__()
        self.features, self.classes, self.coefficients = features, classes, coefficients
        kind = features.mean.dtype
        self.directions = nn.Parameter(torch.randn(width, features.dimension, generator=draws, dtype=kind))
        self.outputs = nn.Parameter(
            torch.randn(width, 1 if classes == 2 else classes, generator=draws, dtype=kind) / width
        )
        with torch.no_grad():
            self.directions.copy_(self.units())

    def units(self) -> Tensor:
        """u, (m, q)."""
        return functional.normalize(self.directions, dim=1)

    def size(self) -> Tensor:
        """The regulariser sum_jk |alpha_jk|, a scalar."""
        return self.outputs.abs().sum()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, ...)."""
        a, b, c = self.coefficients
        projections = self.features(x) @ self.units().T
        logits: Tensor = (a * projections.square() + b * projections + c) @ self._of_each_class()
        return logits

    @torch.no_grad()
    def deployed(self) -> QuadraticNetwork:
        """The same function as a network of the inputs themselves."""
        directions, offsets = self.features.folded(self.units())
        return QuadraticNetwork(directions, self._of_each_class(), offsets=offsets, coefficients=self.coefficients)

    def worst_margins(self, x: Tensor, comparisons: Comparisons, radius: float) -> WorstMargins:
        """The margins of inputs (N, ...) over the ball of that radius around their features."""
        units = self.units()
        return WorstMargins(
            units,
            self.outputs,
            self.features(x) @ units.T,
            comparisons,
            radius=radius,
            coefficients=self.coefficients,
        )

    def _of_each_class(self) -> Tensor:
        return torch.cat([-self.outputs / 2, self.outputs / 2], dim=1) if self.classes == 2 else self.outputs


def hinge_loss(model: UnitNeurons, x: Tensor, comparisons: Comparisons, *, radius: float, worst_only: bool) -> Tensor:
    """The mean over examples of max(0, 1 - w) at the exact worst case w of the margins.

    Args:
        model: the network.
        x: inputs (N, ...).
        comparisons: the margins of every example.
        radius: of the L2 ball, in units of the features.
        worst_only: whether an example counts with the largest of its terms (pairwise) or with their sum (one-vs-all).
    """
    margins = model.worst_margins(x, comparisons, radius)
    wanted = margins.lower < 1
    if worst_only:
        wanted &= margins.lower <= margins.upper.amin(dim=1, keepdim=True)
    example, number = wanted.nonzero(as_tuple=True)
    points, worst = margins.worst(example, number)
    if worst_only:
        table = torch.full_like(margins.lower, torch.inf)
        table[example, number] = worst
        kept = table.argmin(dim=1)[example] == number
        example, number, points = example[kept], number[kept], points[kept]
    terms = (1 - margins.at(example, number, points)).clamp(min=0)
    return terms.sum() / len(x)


def squared_loss(model: UnitNeurons, x: Tensor, comparisons: Comparisons, *, radius: float) -> Tensor:
    """The mean over examples of (target - f_k)^2 at the exact worst case, summed over outputs; targets are 1 and -1.

    Args:
        model: the network.
        x: inputs (N, ...).
        comparisons: each output against the rest, whose signs are the targets.
        radius: of the L2 ball, in units of the features.
    """
    example, number = torch.ones_like(comparisons.rows, dtype=torch.bool).nonzero(as_tuple=True)
    misses = []
    # The margin s f has the target 1, which it misses by 1 - min(s f) on one side and by -min(-s f) - 1 on the other.
    for side in (1.0, -1.0):
        margins = model.worst_margins(
            x, Comparisons(comparisons.mix, comparisons.rows, side * comparisons.signs), radius
        )
        points, _ = margins.worst(example, number)
        misses.append(side - margins.at(example, number, points))
    return torch.maximum(*misses).square().sum() / len(x)
