"""The exact worst margins of a two-layer polynomial network over L2 balls, cheap enough for every training step.

A margin is a signed sum of outputs, s(x) = sum_j w_j sigma(u_j . x), so at x + delta it is the quadratic
s(x) + g . delta + delta^T F delta with F = a sum_j w_j u_j u_j^T (Kuelbs et al. 2024, arXiv 2405.14033). Its minimum
over the ball is a trust-region subproblem, exact by the S-lemma. Three things keep it cheap: all that moves a margin
lies in the span of the directions, r = min(m, d) dimensions; examples that compare the same outputs share F up to its
sign, so a batch has one eigendecomposition a comparison; and two bounds of the minimum show which margins matter at
all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustboard.attacks.trust_region import minimum


@dataclass(frozen=True)
class Comparisons:
    """Which margins the loss of an example looks at: number c of example i is signs[i, c] * (mix[rows[i, c]] . f).

    Attributes:
        mix: (R, O), sums of outputs, each with a curvature matrix of its own.
        rows: int64 (N, C).
        signs: (N, C), 1 or -1.
    """

    mix: Tensor
    rows: Tensor
    signs: Tensor


def pairs_of(labels: Tensor, classes: int, like: Tensor) -> Comparisons:
    """f_y - f_k for the K - 1 other classes k in rising order; two classes have the one output f and its sign.

    Args:
        labels: int64 (N,).
        classes: K.
        like: a tensor of the wanted type.
    """
    if classes == 2:
        return one_against_rest(labels, classes, like)
    first, second = torch.triu_indices(classes, classes, offset=1, device=labels.device)
    mix = functional.one_hot(first, classes) - functional.one_hot(second, classes)
    row_of = torch.zeros(classes, classes, dtype=torch.long, device=labels.device)
    row_of[first, second] = row_of[second, first] = torch.arange(len(first), device=labels.device)
    own = labels.unsqueeze(1)
    rivals = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
    rivals = rivals + (rivals >= own).long()
    return Comparisons(mix.to(like), row_of[own, rivals], torch.where(own < rivals, 1.0, -1.0).to(like))


def one_against_rest(labels: Tensor, classes: int, like: Tensor) -> Comparisons:
    """f_k for the own class and -f_k for each other one; two classes have the one output f, positive for class 1.

    Args:
        labels: int64 (N,).
        classes: K.
        like: a tensor of the wanted type.
    """
    count = 1 if classes == 2 else classes
    rows = torch.arange(count, device=labels.device).expand(len(labels), -1)
    own = labels.unsqueeze(1) == (torch.ones_like(rows) if classes == 2 else rows)
    mix = torch.eye(count, device=labels.device)
    return Comparisons(mix.to(like), rows, torch.where(own, 1.0, -1.0).to(like))


class WorstMargins:
    """The margins of a batch around its projections, with bounds of their worst cases, and the exact ones on demand.

    Args:
        units: u, (m, d).
        outputs: alpha, (m, O).
        projections: u_j . x_i, (N, m).
        comparisons: which margins there are, C an example.
        radius: of the L2 ball, not negative.
        coefficients: a, b and c of the activation.

    Attributes:
        values: the clean margins, (N, C).
        lower: (N, C), not above the worst margin up to float error; the clean margin for a ball of radius zero.
        upper: (N, C), the margin at one point of the ball, the end of the steepest descent.
    """

    def __init__(
        self,
        units: Tensor,
        outputs: Tensor,
        projections: Tensor,
        comparisons: Comparisons,
        *,
        radius: float,
        coefficients: tuple[float, float, float],
    ) -> None:
        self._units, self._outputs, self._projections = units, outputs, projections
        self._comparisons, self._radius, self._coefficients = comparisons, radius, coefficients
        with torch.no_grad():
            self._survey()

    def _survey(self) -> None:
        a, b, c = self._coefficients
        rows, signs = self._comparisons.rows, self._comparisons.signs
        weights = self._comparisons.mix @ self._outputs.T
        activations = a * self._projections.square() + b * self._projections + c
        self.values = signs * (activations @ weights.T).gather(1, rows)
        self.lower = self.upper = self.values
        if self._radius == 0:
            return
        self._basis, _ = torch.linalg.qr(self._units.detach().T)
        reduced = self._units @ self._basis
        forms = torch.einsum("pj,jr,js->prs", a * weights, reduced, reduced)
        self._curvatures, self._axes = torch.linalg.eigh(forms)
        rates = signs.unsqueeze(2) * weights[rows] * (2 * a * self._projections + b).unsqueeze(1)
        self._slopes = rates @ reduced
        lengths = torch.linalg.vector_norm(self._slopes, dim=2)
        falls = self.values - self._radius * lengths
        least = torch.where(signs > 0, self._curvatures[rows, 0], -self._curvatures[rows, -1])
        self.lower = falls + self._radius**2 * least.clamp(max=0)
        steps = self._slopes / lengths.clamp(min=torch.finfo(lengths.dtype).tiny).unsqueeze(2)
        along = (steps @ reduced.T).square() * weights[rows]
        self.upper = falls + self._radius**2 * a * signs * along.sum(dim=2)

    @torch.no_grad()
    def worst(self, example: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The worst points of T margins, (T, r) in coordinates of the span, and the margins there, (T,).

        Args:
            example: int64 (T,), which example.
            number: int64 (T,), which of its comparisons.
        """
        values = self.values[example, number]
        if self._radius == 0:
            return values.new_zeros(len(values), 0), values
        rows, signs = self._comparisons.rows[example, number], self._comparisons.signs[example, number]
        axes = self._axes[rows]
        slopes = torch.einsum("tr,trs->ts", self._slopes[example, number], axes)
        found = minimum(signs.unsqueeze(1) * self._curvatures[rows], slopes, self._radius)
        return torch.einsum("ts,trs->tr", found.point.to(axes), axes), values + found.value.to(values)

    def at(self, example: Tensor, number: Tensor, points: Tensor) -> Tensor:
        """The margins at given points, (T,), differentiable in the weights (Danskin: the points are fixed)."""
        a, b, c = self._coefficients
        rows, signs = self._comparisons.rows[example, number], self._comparisons.signs[example, number]
        projections = self._projections[example]
        if self._radius > 0:
            projections = projections + points @ (self._units @ self._basis).T
        activations = a * projections.square() + b * projections + c
        weights = self._comparisons.mix @ self._outputs.T
        return signs * (activations * weights[rows]).sum(dim=1)
