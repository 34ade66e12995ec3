"""Branch and bound on the signs of unstable neurons, best first: a proof, a counter-example, or an exhausted budget.

The bounds are beta-CROWN's (Wang et al. 2021, arXiv 2103.06624). A neuron to split is chosen by filtered smart
branching (De Palma et al. 2021, arXiv 2104.06718): a cheap score picks candidates, then both children of each are
really bounded. The cheap score is exact bookkeeping: at the corner x where the final linear function is least, the
network's margin exceeds the bound by the sum over neurons of |weight| times the distance between relu(z) and the line
that was used, and a split removes a neuron's share. The intercept of its upper line, BaBSR's score, proposes further
candidates.

Examples are searched one by one and all targets of one example together, so that nothing depends on which other
examples are asked about.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustboard.attacks.complete.mixed_integer import solve
from robustboard.attacks.complete.reduction import Problem
from robustboard.attacks.complete.relaxation import Bound, Multipliers, Reduced, Rows, bound, crown_slopes, optimise

EXHAUSTED = "their nodes were used up"
NEAR_ZERO = "a margin is closer to zero than float error"


@dataclass(frozen=True)
class Effort:
    """How hard to try; work units, never time.

    Attributes:
        nodes: sub-domains to bound for one example, at most; the whole ball is bounded whatever this is, which counts
            one for each target class.
        width: sub-domains that are split at a time.
        candidates: splits that are tried for each, by each of the two scores.
        root_iterations: optimisation steps of the first bounds.
        iterations: optimisation steps of a sub-domain's bound.
    """

    nodes: int
    width: int = 16
    candidates: int = 3
    root_iterations: int = 60
    iterations: int = 6


@dataclass
class Search:
    """What a search found.

    Attributes:
        margins: (T,), a lower bound on each margin; above the tolerance where it is proved.
        nodes: sub-domains that were bounded.
        adversarial: an image that the caller's `breaks` confirmed, or None.
        reason: why the search ended without an answer, or None.
        exhausted: whether that is the budget.
    """

    margins: Tensor
    nodes: int = 0
    adversarial: Tensor | None = None
    reason: str | None = None
    exhausted: bool = False


@dataclass(order=True)
class _Domain:
    """A sub-domain, ordered by its bound and then by its age; multipliers in float32 to save memory."""

    value: float
    age: int
    target: int
    phase: Tensor
    alpha: Tensor
    beta: Tensor


def branch_and_bound(
    problem: Problem,
    *,
    tolerance: float,
    effort: Effort,
    breaks: Callable[[Tensor], Tensor | None],
    tell: Callable[[int], None] = lambda _: None,
) -> Search:
    """Decide whether every margin of a problem exceeds the tolerance on its box.

    Args:
        problem: the network on the box, and the margins.
        tolerance: the least margin that counts.
        effort: the budget.
        breaks: given points (M, d) of the box that look like counter-examples, confirms one or gives None.
        tell: called with the number of sub-domains that have just been bounded.
    """
    return _Searcher(problem, tolerance, effort, breaks, tell).run()


class _Searcher:
    def __init__(
        self,
        problem: Problem,
        tolerance: float,
        effort: Effort,
        breaks: Callable[[Tensor], Tensor | None],
        tell: Callable[[int], None],
    ) -> None:
        self.problem, self.network, self.tolerance, self.effort = problem, problem.network, tolerance, effort
        self.breaks, self.tell = breaks, tell
        # The least bound among the leaves that are proved; an open leaf has no say until the search ends.
        self.search = Search(torch.full((len(problem.margins),), torch.inf, dtype=torch.float64))
        self.waiting: list[_Domain] = []
        self.age = 0
        self.closest = float("inf")

    def run(self) -> Search:
        """Search until an answer or the end of the budget."""
        self._root()
        while self.waiting and self.search.adversarial is None and self.search.reason is None:
            if self.search.nodes + 2 > self.effort.nodes:
                self.search.reason, self.search.exhausted = EXHAUSTED, True
                break
            self._round()
        for domain in self.waiting:
            self._lower(domain.target, domain.value)
        return self.search

    def _root(self) -> None:
        count = len(self.problem.margins)
        phase = torch.zeros(count, len(self.network), dtype=torch.int8, device=self.network.low.device)
        start = crown_slopes(self.network, count)
        value, corner, multipliers = optimise(
            self.network,
            self.problem.margins,
            phase,
            start,
            iterations=self.effort.root_iterations,
            enough=self.tolerance,
        )
        self._count(count)
        self._keep(list(range(count)), phase, value, corner, multipliers)

    def _round(self) -> None:
        """Split the sub-domains with the lowest bounds and bound their children."""
        share = min(self.effort.width, (self.effort.nodes - self.search.nodes) // 2)
        taken = [heapq.heappop(self.waiting) for _ in range(min(share, len(self.waiting)))]
        free = [domain for domain in taken if bool((domain.phase == 0).any())]
        leaves = [domain for domain in taken if not bool((domain.phase == 0).any())]
        while leaves and self.search.adversarial is None:
            self._leaf(leaves.pop(0))
        if not free or self.search.adversarial is not None:
            self.waiting += leaves + free
            return
        rows = self.problem.margins[torch.tensor([domain.target for domain in free])]
        phase, multipliers = _stacked(free)
        neuron = self._choose(rows, phase, multipliers)
        children = torch.cat([_split(phase, neuron, 1), _split(phase, neuron, -1)])
        twice = torch.arange(len(free)).repeat(2)
        value, corner, raised = optimise(
            self.network,
            rows[twice],
            children,
            multipliers[twice],
            iterations=self.effort.iterations,
            enough=self.tolerance,
        )
        inherited = torch.tensor([domain.value for domain in free], dtype=torch.float64)[twice]
        self._count(len(children))
        value = torch.maximum(value, inherited.to(value))
        self._keep([domain.target for domain in free] * 2, children, value, corner, raised)

    def _choose(self, rows: Rows, phase: Tensor, multipliers: Multipliers) -> Tensor:
        """The neuron to split in each sub-domain, (B,)."""
        seen = bound(self.network, rows, phase, multipliers)
        tries = _candidates(self.network, seen, phase, multipliers, self.effort.candidates)
        count, width = tries.shape
        each = torch.arange(count).repeat_interleave(width)
        flat = tries.flatten()
        worst = torch.full((count * width,), torch.inf, dtype=seen.value.dtype, device=seen.value.device)
        total = torch.zeros_like(worst)
        for side in (1, -1):
            child = bound(self.network, rows[each], _split(phase[each], flat, side), multipliers[each]).value
            # What is proved need not be proved any better.
            child = child.clamp(max=self.tolerance)
            worst, total = torch.minimum(worst, child), total + child
        # The worse child decides; the other one breaks ties, and splits that are there already never win.
        score = (worst + 0.1 * total).masked_fill(phase[each].gather(1, flat[:, None])[:, 0] != 0, -torch.inf)
        return tries.gather(1, score.view(count, width).argmax(dim=1, keepdim=True))[:, 0]

    def _leaf(self, domain: _Domain) -> None:
        """A sub-domain without free neurons is a linear program."""
        solved = solve(self.problem, domain.target, phase=domain.phase, cutoff=2 * self.tolerance, nodes=1)
        if solved.proved:
            self._lower(domain.target, 2 * self.tolerance)
            return
        if solved.point is not None:
            self.search.adversarial = self.breaks(solved.point[None])
        if self.search.adversarial is None:
            self.search.reason = NEAR_ZERO
            self._lower(domain.target, domain.value)

    def _keep(self, targets: list[int], phase: Tensor, value: Tensor, corner: Tensor, multipliers: Multipliers) -> None:
        """File the sub-domains that are not proved, and look at their corners for counter-examples."""
        proved = (value > self.tolerance).tolist()
        for place, target in enumerate(targets):
            if proved[place]:
                self._lower(target, float(value[place]))
        rest = [place for place, done in enumerate(proved) if not done]
        if not rest:
            return
        for place in rest:
            self.age += 1
            alpha, beta = multipliers.alpha[place].float(), multipliers.beta[place].float()
            domain = _Domain(float(value[place]), self.age, targets[place], phase[place].clone(), alpha, beta)
            heapq.heappush(self.waiting, domain)
        self._look(corner[rest])

    def _look(self, points: Tensor) -> None:
        margins = self.network.evaluate(self.problem.margins, points).amin(dim=1)
        order = margins.argsort(stable=True)
        least = float(margins[order[0]])
        if least < self.closest:
            self.closest = least
            self.search.adversarial = self.breaks(points[order[:8]])
        if least <= self.tolerance and self.search.adversarial is None:
            self.search.reason = NEAR_ZERO

    def _lower(self, target: int, value: float) -> None:
        self.search.margins[target] = min(float(self.search.margins[target]), value)

    def _count(self, nodes: int) -> None:
        self.search.nodes += nodes
        self.tell(nodes)


def _stacked(domains: list[_Domain]) -> tuple[Tensor, Multipliers]:
    phase = torch.stack([domain.phase for domain in domains])
    alpha = torch.stack([domain.alpha for domain in domains]).double()
    return phase, Multipliers(alpha, torch.stack([domain.beta for domain in domains]).double())


def _split(phase: Tensor, neuron: Tensor, side: int) -> Tensor:
    return phase.scatter(1, neuron[:, None], side)


def _candidates(network: Reduced, seen: Bound, phase: Tensor, multipliers: Multipliers, count: int) -> Tensor:
    """Neurons worth trying, (B, 2 * count): the largest gaps at the corner, and the largest intercepts."""
    chord = network.high / (network.high - network.low)
    rise = -chord * network.low
    upper = chord * seen.inputs + rise
    line = torch.where(seen.weight > 0, multipliers.alpha * seen.inputs, upper)
    free = phase == 0
    gap = (seen.weight * (seen.inputs.relu() - line)).masked_fill(~free, -1.0)
    intercept = (-seen.weight.clamp(max=0.0) * rise).masked_fill(~free, -1.0)
    most = min(count, len(network))
    return torch.cat([gap.topk(most, dim=1).indices, intercept.topk(most, dim=1).indices], dim=1)
