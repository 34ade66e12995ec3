"""Two-layer networks with a quadratic activation, and their margins as quadratics of the perturbation.

f_k(x) = sum_j outputs[j, k] sigma(directions[j] . x + offsets[j]) with sigma(t) = a t^2 + b t + c. This is the model of
convex neural networks with polynomial activations (Bartan and Pilanci 2021, arXiv 2101.02429) and of their adversarial
training (Kuelbs, Lall and Pilanci 2024, arXiv 2405.14033), whose code uses a = 0.09, b = 0.5, c = 0.47, a fit of ReLU.
The difference of two logits is a quadratic of the input, so that its minimum over an L2 ball is known exactly
(`trust_region`) and over a box from below (`box_relaxation`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.errors import ModelError

RELU_FIT = (0.09, 0.5, 0.47)


class QuadraticNetwork(nn.Module):
    """f_k(x) = sum_j outputs[j, k] sigma(directions[j] . x + offsets[j]), with sigma(t) = a t^2 + b t + c.

    Args:
        directions: (m, d), the first layer's weights.
        outputs: (m, K), the second layer's weights.
        offsets: (m,), the first layer's biases; zero by default.
        coefficients: a, which must not be zero, b and c.

    Raises:
        ModelError: if the shapes do not fit together, or a is zero.

    >>> network = QuadraticNetwork(torch.ones(1, 4), torch.tensor([[1.0, -1.0]]), coefficients=(1.0, 0.0, 0.5))
    >>> network(torch.ones(1, 1, 2, 2)).tolist()
    [[16.5, -16.5]]
    """

    coefficients: Tensor

    def __init__(
        self,
        directions: Tensor,
        outputs: Tensor,
        *,
        offsets: Tensor | None = None,
        coefficients: tuple[float, float, float] = RELU_FIT,
    ) -> None:
        super().__init__()
        offsets = directions.new_zeros(len(directions)) if offsets is None else offsets
        if directions.ndim != 2 or outputs.ndim != 2 or {len(outputs), *offsets.shape} != {len(directions)}:
            raise ModelError(
                "A quadratic network needs directions (m, d), outputs (m, K) and offsets (m,), not "
                f"{tuple(directions.shape)}, {tuple(outputs.shape)} and {tuple(offsets.shape)}."
            )
        if not all(map(math.isfinite, coefficients)) or coefficients[0] == 0:
            raise ModelError(f"The coefficients (a, b, c) must be finite and a not zero, unlike {coefficients}.")
        self.directions = nn.Parameter(directions.detach().clone())
        self.offsets = nn.Parameter(offsets.detach().clone())
        self.outputs = nn.Parameter(outputs.detach().clone())
        self.register_buffer("coefficients", torch.tensor(coefficients, dtype=directions.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of inputs (N, d), or of images (N, C, H, W) with d = C H W."""
        a, b, c = self.coefficients.unbind()
        # sigma(t) = a (t + b / 2a)^2 + c - b^2 / 4a: with the square alone an interval bound of each neuron is exact.
        shifted = functional.linear(x.flatten(1), self.directions, self.offsets + b / (2 * a))
        constant = (c - b.square() / (4 * a)) * self.outputs.sum(dim=0)
        return functional.linear(shifted**2, a * self.outputs.T, constant)


@dataclass(frozen=True)
class MarginForms:
    """The margins f_y - f_k of P pairs (y, k) as quadratics of a perturbation, each in the axes of its own curvatures.

    At x + delta the margin is margin(x) + g(x) . delta + delta^T F delta, with weights w_j = outputs[j, y] -
    outputs[j, k], F = a sum_j w_j u_j u_j^T and g(x) = sum_j w_j (2 a (u_j . x + o_j) + b) u_j. All of it lives in the
    span of the directions, r = min(m, d) dimensions: F = B diag(e) B^T, where B has the orthonormal columns
    basis @ axes[p], and delta = B t gives margin + sum_i e_i t_i^2 + g_i t_i. What lies outside changes no logit.

    Attributes:
        pairs: int64 (P, 2), the classes y and k.
        basis: (d, r), orthonormal columns that span the directions.
        axes: (P, r, r), the eigenvectors of F as columns, in coordinates of `basis`.
        curvatures: e, (P, r), rising.
        weights: w, (P, m).
        directions: u, (m, d), and the network's other values, all float64.
        offsets: o, (m,).
        coefficients: a, b and c.
    """

    pairs: Tensor
    basis: Tensor
    axes: Tensor
    curvatures: Tensor
    weights: Tensor
    directions: Tensor
    offsets: Tensor
    coefficients: tuple[float, float, float]

    def values(self, x: Tensor) -> Tensor:
        """margin(x), (P, N), for x of shape (N, ...)."""
        return self.weights @ self._activated(self._projections(x)).T

    def slopes(self, x: Tensor) -> Tensor:
        """g(x) in the axes of each pair, (P, N, r)."""
        a, b, _ = self.coefficients
        rates = 2 * a * self._projections(x) + b
        return torch.einsum("pj,nj,jr,prs->pns", self.weights, rates, self.directions @ self.basis, self.axes)

    def interval(self, lower: Tensor, upper: Tensor) -> Tensor:
        """A lower bound on the margins over boxes of inputs, (P, N): every neuron may take any value of its range."""
        low, high = lower.flatten(1).double(), upper.flatten(1).double()
        centre, reach = self._projections((low + high) / 2), (high - low) / 2 @ self.directions.T.abs()
        least, greatest = centre - reach, centre + reach
        a, b, _ = self.coefficients
        vertex = torch.full_like(centre, -b / (2 * a)).clamp(least, greatest)
        ends = torch.stack([self._activated(point) for point in (least, greatest, vertex)])
        return self.weights.clamp(min=0.0) @ ends.amin(dim=0).T + self.weights.clamp(max=0.0) @ ends.amax(dim=0).T

    def size(self, largest: Tensor, *, radius: float = 0.0) -> Tensor:
        """A bound on the sum of the absolute values of all terms of a margin, (P, N): what float error is relative to.

        Args:
            largest: a bound on the absolute value of each input, (N, ...).
            radius: how much further the inputs may go, in the L2 norm.
        """
        a, b, c = self.coefficients
        lengths: Tensor = torch.linalg.vector_norm(self.directions, dim=1)
        reach = largest.flatten(1).double() @ self.directions.T.abs() + self.offsets.abs() + radius * lengths
        return self.weights.abs() @ (abs(a) * reach.square() + abs(b) * reach + abs(c)).T

    def _projections(self, x: Tensor) -> Tensor:
        return functional.linear(x.flatten(1).double(), self.directions, self.offsets)

    def _activated(self, projections: Tensor) -> Tensor:
        a, b, c = self.coefficients
        return a * projections.square() + b * projections + c

    def perturbation(self, coordinates: Tensor) -> Tensor:
        """The perturbations delta, (P, N, d), from t in the axes of each pair, (P, N, r)."""
        return torch.einsum("dr,prs,pns->pnd", self.basis, self.axes, coordinates)


@torch.no_grad()
def margin_forms(network: QuadraticNetwork, pairs: Tensor) -> MarginForms:
    """The margins of some pairs of classes as quadratics; one eigendecomposition of size r each, in float64.

    Args:
        network: the network; its values are read as they stand, and no gradient is recorded.
        pairs: int64 (P, 2): the class y that should win and its rival k.

    Example:
        >>> network = QuadraticNetwork(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), coefficients=(1, 0, 0))
        >>> forms = margin_forms(network, torch.tensor([[0, 1]]))  # x_0^2 - 2 x_1^2
        >>> forms.curvatures.tolist(), forms.values(torch.tensor([[3.0, 1.0]])).item()
        ([[-2.0, 1.0]], 7.0)
    """
    directions, offsets, outputs = (
        part.detach().double() for part in (network.directions, network.offsets, network.outputs)
    )
    a, b, c = (float(value) for value in network.coefficients.double())
    weights = outputs.T[pairs[:, 0]] - outputs.T[pairs[:, 1]]
    basis, _ = torch.linalg.qr(directions.T)
    reduced = directions @ basis
    curvatures, axes = torch.linalg.eigh(torch.einsum("jr,pj,js->prs", a * reduced, weights, reduced))
    return MarginForms(pairs, basis, axes, curvatures, weights, directions, offsets, (a, b, c))
