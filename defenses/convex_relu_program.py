"""Robust training of a gated ReLU network as one convex program, its constraints held exactly.

The programs of Pilanci and Ergen 2020 (arXiv 2002.10553) and, robust, of Bai et al. 2021 (arXiv 2105.12237), in the
form of Kuelbs et al. 2024 (arXiv 2405.14033); `convex_relu` explains the symbols. For two classes, y = 1 and -1:

    min  1/N sum_n max(0, 1 - y_n e_n . x_n + r |e_n|_*) + beta sum_p (|v_p|_2 + |w_p|_2)
    with e_n = sum_p s_np (v_p - w_p) and (2 s_np - 1) v_p . x_n >= r |v_p|_* for all n and p, and the same for w.

More classes have an output each, and a hinge term for every other class, or for every output against the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np

from robustboard.attacks.threat import Norm
from robustboard.defenses.convex_programs import Ball, Floats, Labels, Loss, MultiClass, Solver, solve_accurately
from robustboard.errors import DefenseError


@dataclass(frozen=True)
class GatedSolution:
    """What the program ends with.

    Attributes:
        positive: v, (P, d, O); O is K, or 1 for two classes.
        negative: w, the same shape.
        objective: the optimal value.
    """

    positive: Floats
    negative: Floats
    objective: float


def solve_gated(
    features: Floats,
    labels: Labels,
    gates: Floats,
    *,
    classes: int,
    beta: float,
    ball: Ball,
    multi_class: MultiClass = "pairwise",
    loss: Loss = "hinge",
    solver: Solver = "clarabel",
) -> GatedSolution:
    """Train on the whole of a small data set, to the global optimum for these gates.

    Args:
        features: (N, d).
        labels: (N,), in [0, K).
        gates: (P, d).
        classes: K; two classes have one output, positive for class 1.
        beta: the weight of the regulariser.
        ball: what to withstand.
        multi_class: whether an example's terms are its pairs with the other classes, or all outputs against the rest.
        loss: the squared loss goes with one output a class, `"one-vs-all"`.
        solver: `"clarabel"` or `"scs"`.

    Raises:
        DefenseError: if the solver fails or ends without an accurate optimum.
    """
    count = 1 if classes == 2 else classes
    if loss == "squared" and multi_class == "pairwise" and count > 1:
        raise DefenseError("The squared loss is that of single outputs, so it goes with one-vs-all, not with pairwise.")
    patterns = (features @ gates.T >= 0).astype(np.float64)
    parts = [
        [cp.Variable((features.shape[1], count)) for _ in range(len(gates))],
        [cp.Variable((features.shape[1], count)) for _ in range(len(gates))],
    ]
    sided = [(2 * patterns[:, [place]] - 1) * features for place in range(len(gates))]
    constraints = [
        sided[place] @ part[:, output] >= ball.radius * cp.norm(part[:, output], _dual(ball.norm))
        for one in parts
        for place, part in enumerate(one)
        for output in range(count)
    ]
    sizes = [cp.norm(part[:, output], 2) for one in parts for part in one for output in range(count)]
    terms = []
    for x, label, pattern in zip(features, labels.tolist(), patterns, strict=True):
        active = [place for place in range(len(gates)) if pattern[place]]
        effective: Any = np.zeros((features.shape[1], count))
        if active:
            effective = sum(parts[0][place] - parts[1][place] for place in active)
        for mix in _comparisons(label, classes, multi_class):
            vector = effective @ mix
            fall = ball.radius * cp.norm(vector, _dual(ball.norm))
            miss = 1 - x @ vector
            terms.append(cp.square(cp.abs(miss) + fall) if loss == "squared" else cp.pos(miss + fall))
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.hstack(terms)) / len(features) + beta * cp.sum(cp.hstack(sizes))), constraints
    )
    solve_accurately(problem, solver)
    positive, negative = (np.stack([np.asarray(part.value) for part in one]) for one in parts)
    return GatedSolution(positive, negative, float(problem.value))


def _comparisons(label: int, classes: int, multi_class: MultiClass) -> list[Floats]:
    """The signed sums of outputs that are to exceed one, each (O,)."""
    if classes == 2:
        return [np.array([1.0 if label == 1 else -1.0])]
    unit = np.eye(classes)
    if multi_class == "one-vs-all":
        return [unit[k] if k == label else -unit[k] for k in range(classes)]
    return [unit[label] - unit[k] for k in range(classes) if k != label]


def _dual(norm: Norm) -> int:
    return 1 if norm == "linf" else 2
