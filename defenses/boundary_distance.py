"""The L2 distance from a point to the decision boundary of a polynomial network, as a semidefinite program.

Kuelbs et al. 2024 (arXiv 2405.14033, first version): with the margin value + slope . delta + delta^T F delta > 0 and D
in the place of delta delta^T, minimise tr D subject to value + slope . delta + tr(F D) <= 0 and
[[D, delta], [delta^T, 1]] >= 0. With one quadratic constraint this relaxation is tight (the S-lemma), so the square
root of the optimum is the distance itself.
"""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np

from robustboard.defenses.convex_programs import Floats, Solver, solve_accurately
from robustboard.errors import DefenseError


def boundary_distance(value: float, slope: Floats, curvature: Floats, *, solver: Solver = "clarabel") -> float:
    """The smallest |delta|_2 with value + slope . delta + delta^T curvature delta <= 0.

    Args:
        value: the margin, positive.
        slope: (d,).
        curvature: F, (d, d), symmetric.
        solver: `"clarabel"` or `"scs"`.

    Returns:
        The distance, infinity if the margin is positive everywhere.

    Raises:
        DefenseError: if the margin is not positive, or the solver ends without an accurate answer.

    >>> round(boundary_distance(1.0, np.array([0.0, -2.0]), np.zeros((2, 2))), 4)
    0.5
    """
    if value <= 0:
        raise DefenseError(
            f"The distance to the boundary is that of a correctly classified point, not of one of margin {value:g}."
        )
    if _everywhere_positive(value, slope, curvature):
        return math.inf
    dimension = len(slope)
    outer, delta = cp.Variable((dimension, dimension), symmetric=True), cp.Variable((dimension, 1))
    lifted = cp.bmat([[outer, delta], [delta.T, np.ones((1, 1))]])
    # In units of the margin the constraint's numbers do not depend on the scale of the network.
    reached = 1 + slope / value @ delta[:, 0] + cp.trace(curvature / value @ outer) <= 0
    problem = cp.Problem(cp.Minimize(cp.trace(outer)), [lifted >> 0, reached])
    solve_accurately(problem, solver)
    return math.sqrt(max(0.0, float(problem.value)))


def _everywhere_positive(value: float, slope: Floats, curvature: Floats) -> bool:
    """Whether value + slope . delta + delta^T curvature delta > 0 for all delta: its least value, if it has one, is."""
    values, vectors = np.linalg.eigh(curvature)
    along = vectors.T @ slope
    flat = values <= 1e-12 * max(1.0, float(np.abs(values).max()))
    if bool((values[flat] < -1e-12).any()) or bool((np.abs(along[flat]) > 1e-12).any()):
        return False
    return bool(value - (along[~flat] ** 2 / (4 * values[~flat])).sum() > 0)
