"""Training a two-layer polynomial network, robust or not, as one convex program (Kuelbs et al. 2024, arXiv 2405.14033).

A neuron alpha sigma(u . x) with |u|_2 = 1 contributes alpha [u; 1][u; 1]^T to a matrix: those with alpha > 0 to Z,
those with alpha < 0 to Z' (Bartan and Pilanci 2021, arXiv 2101.02429). With M = Z - Z' in the blocks M1 (d, d), M2 (d)
and M4,

    f(x) = a x^T M1 x + b M2 . x + c M4,    sum |alpha_j| = Z4 + Z4',    tr Z1 = Z4,    tr Z1' = Z4',    Z, Z' >= 0,

so a convex loss of f plus beta (Z4 + Z4') is a semidefinite program. A margin s(x) = sum_k s_k f_k(x) is a quadratic
s(x) + g . delta + delta^T F delta of a perturbation, and by the S-lemma it stays at or above w in the ball
|delta|_2 <= r exactly if for some lambda >= 0

    [[lambda I + F, g / 2], [g^T / 2, s(x) - w - lambda r^2]] >= 0,

which is affine in Z, Z', w and lambda together: adversarial training is a semidefinite program as well. On a box,
diag(lambda_1, ..., lambda_d) and eps^2 sum lambda_i take the places of lambda I and lambda r^2 (Shor's relaxation): w
is then a lower bound of the margin, tighter than that of the ball around the box. `neural_decomposition` turns Z and Z'
into a network with the same f.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import cvxpy as cp
import numpy as np
import numpy.typing as npt

from robustboard.attacks.quadratic import RELU_FIT
from robustboard.attacks.threat import Norm
from robustboard.errors import DefenseError, first_line

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Loss = Literal["hinge", "squared"]
MultiClass = Literal["pairwise", "one-vs-all"]
Solver = Literal["clarabel", "scs"]

# With hundreds of matrix inequalities Clarabel stalls just short of its usual gap of 1e-8.
_OPTIONS: Mapping[Solver, Mapping[str, float]] = MappingProxyType(
    {"clarabel": {"tol_gap_abs": 1e-7, "tol_gap_rel": 1e-7}, "scs": {}}
)


@dataclass(frozen=True)
class Ball:
    """The perturbations of a feature vector that are trained against.

    Attributes:
        norm: `"l2"` or `"linf"`.
        radius: in units of the features; zero means standard training.
    """

    norm: Norm
    radius: float


@dataclass(frozen=True)
class Solution:
    """What a program ends with.

    Attributes:
        positive: Z of every output, (O, d + 1, d + 1); O is K, or 1 for two classes.
        negative: Z', the same shape.
        objective: the optimal value.
        worst: what the program knows of every example and output, (N, columns): the robust margins w of the hinge loss
            (of the pairs with the other classes in rising order, or of each output against the rest), or the largest
            deviation from the target of the squared loss. Examples outside `robust` have their clean values.
    """

    positive: Floats
    negative: Floats
    objective: float
    worst: Floats


def solve(
    features: Floats,
    labels: Labels,
    *,
    classes: int,
    beta: float,
    ball: Ball,
    multi_class: MultiClass = "pairwise",
    loss: Loss = "hinge",
    robust: Iterable[int] | None = None,
    coefficients: tuple[float, float, float] = RELU_FIT,
    solver: Solver = "clarabel",
) -> Solution:
    """Train on the whole of a small data set, to the global optimum.

    Two classes have one output f, positive for class 1. Otherwise each class has an output, and the hinge loss is
    either that of the worst pair, max_k max(0, 1 - w_ik), or the sum over K programs of one class against the rest.
    The squared loss is (target - f)^2 with targets 1 and -1, at its largest over the ball.

    Args:
        features: (N, d), best of norm about 1.
        labels: (N,), in [0, K).
        classes: K.
        beta: the weight of the regulariser; below about 1e-3 the program is ill-conditioned.
        ball: what to withstand.
        multi_class: how K > 2 outputs are told apart.
        loss: the squared loss goes with one output a class, `"one-vs-all"`.
        robust: the examples that are trained against the ball, the others count as they are; by default all.
        coefficients: a, b and c of the activation.
        solver: `"clarabel"`, an interior-point method, or `"scs"`, a first-order one.

    Raises:
        DefenseError: if the solver fails or ends without an accurate optimum.
    """
    robust_rows = range(len(labels)) if robust is None else robust
    task = _Task(features, beta, ball, frozenset(robust_rows) if ball.radius > 0 else frozenset(), coefficients, solver)
    if classes == 2:
        return task.against_the_rest([labels == 1], loss)
    if multi_class == "one-vs-all":
        return task.against_the_rest([labels == k for k in range(classes)], loss)
    if loss == "squared":
        raise DefenseError("The squared loss is that of single outputs, so it goes with one-vs-all, not with pairwise.")
    return task.pairwise(labels, classes)


@dataclass(frozen=True)
class _Task:
    """What all programs of one training share."""

    features: Floats
    beta: float
    ball: Ball
    robust: frozenset[int]
    coefficients: tuple[float, float, float]
    solver: Solver

    def against_the_rest(self, members: list[npt.NDArray[np.bool_]], loss: Loss) -> Solution:
        """One program for each output, with target 1 for its members and -1 for the rest."""
        solutions = []
        for member in members:
            output = _Output.new(self.features.shape[1])
            targets = np.where(member, 1.0, -1.0)
            if loss == "hinge":
                worst, constraints = self._margins([output.form.times(sign) for sign in targets])
                total = cp.sum(cp.pos(1 - worst))
            else:
                worst, constraints = self._deviations(output.form, targets)
                total = cp.sum_squares(worst)
            solutions.append(self._solved([output], total, worst[:, None], constraints))
        return Solution(
            np.concatenate([one.positive for one in solutions]),
            np.concatenate([one.negative for one in solutions]),
            sum(one.objective for one in solutions),
            np.concatenate([one.worst for one in solutions], axis=1),
        )

    def pairwise(self, labels: Labels, classes: int) -> Solution:
        """One program in which every example's class has to win against each of the others."""
        outputs = [_Output.new(self.features.shape[1]) for _ in range(classes)]
        columns, constraints = [], []
        for place in range(classes - 1):
            rivals = [place if place < label else place + 1 for label in labels.tolist()]
            forms = [
                outputs[label].form.minus(outputs[rival].form)
                for label, rival in zip(labels.tolist(), rivals, strict=True)
            ]
            worst, new = self._margins(forms)
            columns.append(worst)
            constraints += new
        margins = cp.vstack(columns).T
        total = cp.sum(cp.max(cp.pos(1 - margins), axis=1))
        return self._solved(outputs, total, margins, constraints)

    def _margins(self, forms: list[_Form]) -> tuple[Any, list[Any]]:
        """The margins (N,) of one form an example, those of the robust ones at their least over the ball."""
        worst = cp.Variable(len(forms))
        constraints = []
        for row, (form, x) in enumerate(zip(forms, self.features, strict=True)):
            value, slope, curvature = form.around(x, self.coefficients)
            if row in self.robust:
                constraints += stays_above(worst[row], value, slope, curvature, self.ball)
            else:
                constraints.append(worst[row] == value)
        return worst, constraints

    def _deviations(self, form: _Form, targets: Floats) -> tuple[Any, list[Any]]:
        """Upper bounds (N,) of |f - target|, tight at an optimum."""
        low, low_constraints = self._margins([form] * len(targets))
        high, high_constraints = self._margins([form.times(-1)] * len(targets))
        worst = cp.Variable(len(targets))
        return worst, [*low_constraints, *high_constraints, worst >= targets - low, worst >= -high - targets]

    def _solved(self, outputs: list[_Output], total: Any, worst: Any, constraints: list[Any]) -> Solution:
        regulariser = sum(output.size for output in outputs)
        objective = cp.Minimize(total / len(self.features) + self.beta * regulariser)
        for output in outputs:
            constraints = [*constraints, *output.constraints]
        problem = cp.Problem(objective, constraints)
        solve_accurately(problem, self.solver)
        positive = np.stack([np.asarray(output.positive.value) for output in outputs])
        negative = np.stack([np.asarray(output.negative.value) for output in outputs])
        return Solution(positive, negative, float(problem.value), np.asarray(worst.value))


@dataclass(frozen=True)
class _Form:
    """The blocks of M = sum_k s_k (Z^k - Z'^k): a quadratic function of the features."""

    quadratic: Any
    linear: Any
    constant: Any

    def times(self, factor: float) -> _Form:
        return _Form(factor * self.quadratic, factor * self.linear, factor * self.constant)

    def minus(self, other: _Form) -> _Form:
        return _Form(self.quadratic - other.quadratic, self.linear - other.linear, self.constant - other.constant)

    def around(self, x: Floats, coefficients: tuple[float, float, float]) -> tuple[Any, Any, Any]:
        """Value, slope g and curvature F of the function as a quadratic of the perturbation of x."""
        a, b, c = coefficients
        bent = self.quadratic @ x
        return (
            a * (x @ bent) + b * (x @ self.linear) + c * self.constant,
            b * self.linear + 2 * a * bent,
            (a * self.quadratic),
        )


@dataclass(frozen=True)
class _Output:
    """Z and Z' of one output."""

    positive: Any
    negative: Any

    @classmethod
    def new(cls, dimension: int) -> _Output:
        shape = (dimension + 1, dimension + 1)
        return cls(cp.Variable(shape, PSD=True), cp.Variable(shape, PSD=True))

    @property
    def form(self) -> _Form:
        effective = self.positive - self.negative
        return _Form(effective[:-1, :-1], effective[:-1, -1], effective[-1, -1])

    @property
    def size(self) -> Any:
        """Z4 + Z4', the sum of |alpha_j|."""
        return self.positive[-1, -1] + self.negative[-1, -1]

    @property
    def constraints(self) -> list[Any]:
        return [cp.trace(part[:-1, :-1]) == part[-1, -1] for part in (self.positive, self.negative)]


def stays_above(worst: Any, value: Any, slope: Any, curvature: Any, ball: Ball) -> list[Any]:
    """Constraints that hold exactly if value + slope . delta + delta^T curvature delta >= worst in the ball.

    For an L-inf ball they are sufficient, and necessary where the curvature is diagonal. All arguments may be cvxpy
    expressions, the slope (d,) and the curvature (d, d).
    """
    dimension = slope.shape[0]
    if ball.norm == "l2":
        multiplier = cp.Variable(nonneg=True)
        shift, paid = multiplier * np.eye(dimension), multiplier * ball.radius**2
    else:
        multiplier = cp.Variable(dimension, nonneg=True)
        shift, paid = cp.diag(multiplier), cp.sum(multiplier) * ball.radius**2
    half = cp.reshape(slope / 2, (dimension, 1), order="C")
    corner = cp.reshape(value - worst - paid, (1, 1), order="C")
    return [cp.bmat([[curvature + shift, half], [half.T, corner]]) >> 0]


def solve_accurately(problem: Any, solver: Solver) -> None:
    """Solve a cvxpy problem in place.

    Raises:
        DefenseError: if it has no optimum, or the solver did not reach it to its own accuracy.
    """
    try:
        with warnings.catch_warnings():
            # An inaccurate optimum is an error of ours, a sentence, below.
            warnings.simplefilter("ignore")
            problem.solve(solver=solver.upper(), **_OPTIONS[solver])
    except (cp.SolverError, ArithmeticError, ValueError) as error:
        raise DefenseError(
            f"The solver {solver} failed on the convex program ({first_line(error)}); raise beta, scale the features "
            "to norm about 1, or use the scalable form."
        ) from error
    if problem.status != cp.OPTIMAL:
        raise DefenseError(
            f"The solver {solver} ended with the status {problem.status} and no accurate optimum, as it does when the "
            "convex program is ill-conditioned; raise beta (1e-3 and more), scale the features to norm about 1, or "
            "use the scalable form."
        )
