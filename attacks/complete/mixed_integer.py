"""The same question as a mixed-integer linear program, solved by HiGHS through scipy: Tjeng et al. 2019 (1711.07356).

Every unstable neuron has a binary variable, and its big-M constants are its alpha-CROWN bounds. The margin is
constrained to be at most a cut-off and then minimised: an infeasible program proves that the margin exceeds the
cut-off, and any feasible point is a candidate for a counter-example, so the solver may stop at the first.

The solver's tolerances are absolute and it drops coefficients below 1e-9, so every neuron is measured in units of its
own largest input: no bound is then larger than one, whatever the scale of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from robustboard.attacks.complete.reduction import Problem
from robustboard.attacks.complete.relaxation import Ranges, Reduced, Rows

# scipy's status 2 is HiGHS's "infeasible", but also its "model error": the message tells them apart.
_INFEASIBLE = 2
# HiGHS ends at the first incumbent when any gap will do.
_ANY_GAP = 1e30


@dataclass(frozen=True)
class Solved:
    """What the solver said.

    Attributes:
        proved: no point of the sub-domain has a margin below the cut-off.
        point: (d,), a point of the box whose margin is at most the cut-off by the solver's arithmetic, or None.
        nodes: nodes of the solver's own tree.
    """

    proved: bool
    point: Tensor | None
    nodes: int


def solve(problem: Problem, target: int, *, ranges: Ranges | None = None, cutoff: float, nodes: int) -> Solved:
    """Minimise one margin of a problem.

    Args:
        problem: the network on its box.
        target: the row of the margin.
        ranges: one sub-domain, (n,), of which the known signs count; None for the whole box.
        cutoff: margins above this are of no interest. It must exceed what is to be proved by more than the solver's
            feasibility tolerance, which is 1e-6.
        nodes: the work budget, in the solver's nodes.
    """
    network, objective = _balanced(problem.network, problem.margins[slice(target, target + 1)])
    if not _finite(network, objective):
        return Solved(proved=False, point=None, nodes=0)
    pixels, units = len(network.lower), len(network)
    fixed = np.zeros(units) if ranges is None else _signs(ranges)
    low, high = network.low.cpu().numpy(), network.high.cpu().numpy()
    low, high = np.where(fixed > 0, 0.0, low), np.where(fixed < 0, 0.0, high)
    p, q, r = (part.cpu().numpy() for part in (network.units.inputs, network.units.hidden, network.units.offset))
    identity, nothing = sparse.identity(units, format="csr"), sparse.csr_matrix((units, pixels))
    z = sparse.hstack([sparse.csr_matrix(p), sparse.csr_matrix(q)], format="csr")
    y = sparse.hstack([nothing, identity], format="csr")
    # With s = 1 where the neuron is positive: z <= y, y <= z - low (1 - s), y <= high s, y >= 0.
    blocks = [
        LinearConstraint(sparse.hstack([y - z, sparse.csr_matrix((units, units))], format="csr"), r, np.inf),
        LinearConstraint(sparse.hstack([y - z, -sparse.diags(low)], format="csr"), -np.inf, r - low),
        LinearConstraint(sparse.hstack([y, -sparse.diags(high)], format="csr"), -np.inf, 0.0),
    ]
    costs = np.concatenate([objective.inputs[0].cpu().numpy(), objective.hidden[0].cpu().numpy(), np.zeros(units)])
    offset = float(objective.offset[0])
    blocks.append(LinearConstraint(costs[None], -np.inf, cutoff - offset))
    solution = milp(
        costs,
        constraints=blocks,
        integrality=np.concatenate([np.zeros(pixels + units), np.ones(units)]),
        bounds=Bounds(
            np.concatenate([network.lower.cpu().numpy(), np.zeros(units), (fixed > 0).astype(float)]),
            np.concatenate([network.upper.cpu().numpy(), high, (fixed >= 0).astype(float)]),
        ),
        options={"node_limit": max(1, nodes), "mip_rel_gap": _ANY_GAP},
    )
    used = int(getattr(solution, "mip_node_count", 0) or 0)
    if solution.status == _INFEASIBLE and "infeasible" in solution.message.lower():
        return Solved(proved=True, point=None, nodes=used)
    if solution.x is None:
        return Solved(proved=False, point=None, nodes=used)
    point = torch.from_numpy(solution.x[:pixels]).to(network.lower)
    return Solved(proved=False, point=point.clamp(network.lower, network.upper), nodes=used)


def _signs(ranges: Ranges) -> np.ndarray:
    """The known signs (n,) of one sub-domain: 1 active, -1 inactive, 0 open."""
    on = ranges.low >= 0
    return (on.double() - (~on & (ranges.high <= 0)).double()).cpu().numpy()


def _balanced(network: Reduced, rows: Rows) -> tuple[Reduced, Rows]:
    """The same network and functions of it, with every neuron in units of the larger of its two bounds."""
    unit = torch.maximum(-network.low, network.high)
    units = network.units
    scaled = Rows(units.inputs / unit[:, None], units.hidden * unit / unit[:, None], units.offset / unit)
    balanced = replace(network, units=scaled, low=network.low / unit, high=network.high / unit)
    return balanced, Rows(rows.inputs, rows.hidden * unit, rows.offset)


def _finite(network: Reduced, rows: Rows) -> bool:
    numbers = [part for one in (network.units, rows) for part in (one.inputs, one.hidden, one.offset)]
    return all(bool(part.isfinite().all()) for part in (*numbers, network.low, network.high))
