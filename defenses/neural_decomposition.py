"""From the matrices of the convex program back to neurons (Bartan and Pilanci 2021, arXiv 2101.02429, sec. 4).

With G = diag(1, ..., 1, -1), the constraint tr Z1 = Z4 reads tr(G Z) = 0. Such a positive semidefinite Z is a sum of
rank(Z) terms y y^T with y^T G y = 0 each: y = [v; t] with |v| = |t| is the neuron u = sign(t) v / |v| of weight t^2.
The terms are found two vectors at a time: of p with p^T G p > 0 and q with q^T G q < 0, one rotation makes the first
neutral.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from robustboard.attacks.quadratic import RELU_FIT, QuadraticNetwork
from robustboard.defenses.convex_programs import Floats

# Eigenvalues below this share of the largest are the solver's residual; dropping them moves f by that much.
_NEGLIGIBLE = 1e-7


def decompose(matrix: Floats, *, negligible: float = _NEGLIGIBLE) -> tuple[Floats, Floats]:
    """Neurons u_j of norm 1 with weights t_j^2 such that matrix = sum_j t_j^2 [u_j; 1][u_j; 1]^T.

    Args:
        matrix: Z, (d + 1, d + 1), positive semidefinite with tr Z1 = Z4, both up to a solver's accuracy. What is left
            of tr Z1 - Z4 after the last pair goes to one neuron's norm, so that Z4 is met and Z1 is off by as much.
        negligible: eigenvalues below this share of the largest are dropped.

    Returns:
        Directions (m, d) and weights (m,), with m the rank of Z.

    >>> directions, weights = decompose(np.diag([3.0, 1.0, 4.0]))
    >>> bool(np.isclose(weights.sum(), 4.0)), directions.shape
    (True, (3, 2))
    """
    signature = np.ones(len(matrix))
    signature[-1] = -1
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    kept = values > max(negligible * values[-1], np.finfo(np.float64).tiny)
    left = list((vectors[:, kept] * np.sqrt(values[kept])).T)
    neutral: list[Floats] = []
    while left:
        left.sort(key=lambda p: float(p @ (signature * p)))
        low, high = left[0], left[-1]
        below, above = float(low @ (signature * low)), float(high @ (signature * high))
        if below >= 0 or above <= 0:
            # All that is left has one sign: neutral up to the solver's residual, which is the least there can be.
            neutral += left
            break
        first, second = _neutralised(high, low, signature)
        left = [*left[1:-1], second]
        neutral.append(first)
    return _neurons(neutral, len(matrix) - 1)


def _neutralised(p: Floats, q: Floats, signature: Floats) -> tuple[Floats, Floats]:
    """A rotation of p and q, so p p^T + q q^T is unchanged, whose first vector y has y^T G y = 0."""
    pp, pq, qq = (float(left @ (signature * right)) for left, right in ((p, p), (p, q), (q, q)))
    # The root of pp + 2 alpha pq + alpha^2 qq of smaller size, in the form that loses no digits.
    root = math.sqrt(pq * pq - pp * qq)
    alpha = -pp / (pq + math.copysign(root, pq))
    length = math.sqrt(1 + alpha * alpha)
    return (p + alpha * q) / length, (q - alpha * p) / length


def _neurons(neutral: list[Floats], dimension: int) -> tuple[Floats, Floats]:
    directions, weights = [], []
    for y in neutral:
        length = float(np.linalg.norm(y[:-1]))
        if length > 0 and y[-1] != 0:
            directions.append(math.copysign(1, y[-1]) * y[:-1] / length)
            weights.append(float(y[-1]) ** 2)
    return np.array(directions).reshape(-1, dimension), np.array(weights)


def quadratic_network(
    positive: Floats, negative: Floats, *, coefficients: tuple[float, float, float] = RELU_FIT
) -> QuadraticNetwork:
    """The network whose outputs are those of the matrices, in float64.

    Args:
        positive: Z of every output, (O, d + 1, d + 1).
        negative: Z', the same shape.
        coefficients: a, b and c of the activation.

    Returns:
        A network on features (N, d) with O outputs; one output f becomes the two logits -f / 2 and f / 2.
    """
    count, dimension = len(positive), positive.shape[1] - 1
    directions, outputs = [], []
    for output in range(count):
        for sign, matrix in ((1.0, positive[output]), (-1.0, negative[output])):
            units, weights = decompose(matrix)
            directions.append(units)
            rows = np.zeros((len(weights), count))
            rows[:, output] = sign * weights
            outputs.append(rows)
    stacked = np.concatenate(outputs)
    if count == 1:
        stacked = np.concatenate([-stacked / 2, stacked / 2], axis=1)
    found = np.concatenate(directions)
    if not len(found):
        found, stacked = np.eye(1, dimension), np.zeros((1, stacked.shape[1]))
    return QuadraticNetwork(torch.from_numpy(found), torch.from_numpy(stacked), coefficients=coefficients)
