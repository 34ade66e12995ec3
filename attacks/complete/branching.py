"""Branch and bound on the signs of unstable neurons, best first: a proof, a counter-example, or an exhausted budget.

The bounds are beta-CROWN's (Wang et al. 2021, arXiv 2103.06624). Before a sub-domain is split its neurons' ranges are
clipped to where the margin is still open, and its children inherit them; from then on its bounds hold only there, and
prove no more than that the margin exceeds the cut-off, twice the tolerance.

A neuron to split is chosen by filtered smart branching (De Palma et al. 2021, arXiv 2104.06718): a cheap score picks
candidates, then both children of each are really bounded. The cheap score is exact bookkeeping: at the corner x where
the final linear function is least, the network's margin exceeds the bound by the sum over neurons of |weight| times the
distance between relu(z) and the line that was used, and a split removes a neuron's share. The intercept of its upper
line, BaBSR's score, proposes further candidates.

Examples are searched one by one and all targets of one example together, so that nothing depends on which other
examples are asked about.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustboard.attacks.complete.clipping import Clipper
from robustboard.attacks.complete.mixed_integer import solve
from robustboard.attacks.complete.reduction import Problem
from robustboard.attacks.complete.relaxation import (
    Bound,
    Multipliers,
    Ranges,
    Rows,
    bound,
    chords,
    crown_slopes,
    lowest,
    optimise,
)

EXHAUSTED = "their nodes were used up"
NEAR_ZERO = "a margin is closer to zero than float error"
# The second time the bound that clips is itself better for the first.
_CLIPS = 2


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
        margins: (T,), a lower bound on each margin; above the tolerance where it is proved, and no more than twice the
            tolerance where that took a search.
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
    """A sub-domain, ordered by its bound and then by its age.

    Ranges (n,), rounded outward, and multipliers are in float32 to save memory.
    """

    value: float
    age: int
    target: int
    ranges: Ranges
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
        # Half as many bytes, twice the speed: multipliers and splits are found with it, and no bound is believed.
        self.sketch = self.network.to(torch.float32)
        # The least bound among the leaves that are proved; an open leaf has no say until the search ends.
        self.search = Search(torch.full((len(problem.margins),), torch.inf, dtype=torch.float64))
        self.waiting: list[_Domain] = []
        self.age = 0
        self.closest = float("inf")
        self.cutoff = 2 * tolerance
        below, above = problem.below, problem.above
        self.clip = None if below is None or above is None else Clipper(self.network, below, above)

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
        ranges = self.network.ranges(count)
        start = crown_slopes(self.network, count)
        value, corner, multipliers = optimise(
            self.network,
            self.problem.margins,
            ranges,
            start,
            iterations=self.effort.root_iterations,
            enough=self.tolerance,
        )
        self._count(count)
        self._keep(list(range(count)), ranges, value, corner, multipliers)

    def _round(self) -> None:
        """Split the sub-domains with the lowest bounds and bound their children."""
        share = min(self.effort.width, (self.effort.nodes - self.search.nodes) // 2)
        taken = [heapq.heappop(self.waiting) for _ in range(min(share, len(self.waiting)))]
        free = [domain for domain in taken if bool(domain.ranges.free.any())]
        leaves = [domain for domain in taken if not bool(domain.ranges.free.any())]
        while leaves and self.search.adversarial is None:
            self._leaf(leaves.pop(0))
        if not free or self.search.adversarial is not None:
            self.waiting += leaves + free
            return
        part = self._clipped(_stacked(free, self.problem))
        if not len(part.targets):
            return
        neuron = self._choose(part)
        ends = part.ranges.split(neuron, 1), part.ranges.split(neuron, -1)
        children = Ranges(torch.cat([end.low for end in ends]), torch.cat([end.high for end in ends]))
        twice = torch.arange(len(part.targets)).repeat(2)
        rows = part.rows[twice]
        _, _, raised = optimise(
            self.sketch,
            rows.to(torch.float32),
            children.to(torch.float32),
            part.multipliers[twice].to(torch.float32),
            iterations=self.effort.iterations,
            enough=self.tolerance,
        )
        value, corner = lowest(self.network, rows, children, raised.to(torch.float64))
        self._count(len(value))
        # Clipped bounds hold only where the margin may be at most the cut-off, so they prove no more than that.
        most = torch.inf if self.clip is None else self.cutoff
        value = torch.maximum(value, part.value[twice]).clamp(max=most)
        self._keep(part.targets * 2, children, value, corner, raised)

    def _clipped(self, part: _Part) -> _Part:
        """The sub-domains with narrower ranges, less those that this settles or leaves without free neurons."""
        if self.clip is None:
            return part
        for _ in range(_CLIPS):
            ranges = self.clip(part.ranges, part.seen, self.cutoff)
            seen = bound(self.network, part.rows, ranges, part.multipliers)
            value = torch.maximum(part.value, seen.value)
            value = value.masked_fill((ranges.low > ranges.high).any(dim=1), self.cutoff).clamp(max=self.cutoff)
            part = replace(part, ranges=ranges, value=value, seen=seen)
            proved = value > self.tolerance
            for place in proved.nonzero().flatten().tolist():
                self._lower(part.targets[place], float(value[place]))
            closed = ~proved & ~ranges.free.any(dim=1)
            for place in closed.nonzero().flatten().tolist():
                self._wait(part.targets[place], ranges, value, part.multipliers, place)
            if bool((proved | closed).any()):
                part = part[(~proved & ~closed).nonzero().flatten()]
            if not len(part.targets):
                break
        return part

    def _choose(self, part: _Part) -> Tensor:
        """The neuron to split in each sub-domain, (B,)."""
        tries = _candidates(part.ranges, part.seen, part.multipliers, self.effort.candidates)
        rows, ranges = part.rows.to(torch.float32), part.ranges.to(torch.float32)
        multipliers = part.multipliers.to(torch.float32)
        count, width = tries.shape
        each = torch.arange(count).repeat_interleave(width)
        flat = tries.flatten()
        worst = torch.full((count * width,), torch.inf, dtype=torch.float32, device=flat.device)
        total = torch.zeros_like(worst)
        for side in (1, -1):
            child, _ = lowest(self.sketch, rows[each], ranges[each].split(flat, side), multipliers[each])
            # What is proved need not be proved any better.
            child = child.clamp(max=self.tolerance)
            worst, total = torch.minimum(worst, child), total + child
        # The worse child decides; the other one breaks ties, and splits that are there already never win.
        score = (worst + 0.1 * total).masked_fill(~ranges.free.gather(1, tries).flatten(), -torch.inf)
        return tries.gather(1, score.view(count, width).argmax(dim=1, keepdim=True))[:, 0]

    def _leaf(self, domain: _Domain) -> None:
        """A sub-domain without free neurons is a linear program."""
        solved = solve(self.problem, domain.target, ranges=domain.ranges, cutoff=2 * self.tolerance, nodes=1)
        if solved.proved:
            self._lower(domain.target, 2 * self.tolerance)
            return
        if solved.point is not None:
            self.search.adversarial = self.breaks(solved.point[None])
        if self.search.adversarial is None:
            self.search.reason = NEAR_ZERO
            self._lower(domain.target, domain.value)

    def _keep(
        self, targets: list[int], ranges: Ranges, value: Tensor, corner: Tensor, multipliers: Multipliers
    ) -> None:
        """File the sub-domains that are not proved, and look at their corners for counter-examples."""
        proved = (value > self.tolerance).tolist()
        for place, target in enumerate(targets):
            if proved[place]:
                self._lower(target, float(value[place]))
        rest = [place for place, done in enumerate(proved) if not done]
        if not rest:
            return
        for place in rest:
            self._wait(targets[place], ranges, value, multipliers, place)
        self._look(corner[rest])

    def _wait(self, target: int, ranges: Ranges, value: Tensor, multipliers: Multipliers, place: int) -> None:
        self.age += 1
        kept = Ranges(_outward(ranges.low[place], -1), _outward(ranges.high[place], 1))
        alpha, beta = multipliers.alpha[place].float(), multipliers.beta[place].float()
        heapq.heappush(self.waiting, _Domain(float(value[place]), self.age, target, kept, alpha, beta))

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


def _outward(bounds: Tensor, side: int) -> Tensor:
    """In float32 and no tighter."""
    near = bounds.float()
    return torch.where((near - bounds) * side >= 0, near, near.nextafter(torch.tensor(side * torch.inf)))


@dataclass(frozen=True)
class _Part:
    """Sub-domains that are worked on together: B rows each."""

    targets: list[int]
    rows: Rows
    ranges: Ranges
    value: Tensor
    multipliers: Multipliers
    seen: Bound

    def __getitem__(self, chosen: Tensor) -> _Part:
        return _Part(
            [self.targets[place] for place in chosen.tolist()],
            self.rows[chosen],
            self.ranges[chosen],
            self.value[chosen],
            self.multipliers[chosen],
            self.seen[chosen],
        )


def _stacked(domains: list[_Domain], problem: Problem) -> _Part:
    targets = [domain.target for domain in domains]
    low = torch.stack([domain.ranges.low for domain in domains]).double()
    ranges = Ranges(low, torch.stack([domain.ranges.high for domain in domains]).double())
    alpha = torch.stack([domain.alpha for domain in domains]).double()
    multipliers = Multipliers(alpha, torch.stack([domain.beta for domain in domains]).double())
    rows = problem.margins[torch.tensor(targets)]
    value = low.new_tensor([domain.value for domain in domains])
    return _Part(targets, rows, ranges, value, multipliers, bound(problem.network, rows, ranges, multipliers))


def _candidates(ranges: Ranges, seen: Bound, multipliers: Multipliers, count: int) -> Tensor:
    """Neurons worth trying, (B, 2 * count): the largest gaps at the corner, and the largest intercepts."""
    chord = chords(ranges)
    rise = -chord * ranges.low
    upper = chord * seen.inputs + rise
    line = torch.where(seen.weight > 0, multipliers.alpha * seen.inputs, upper)
    free = ranges.free
    gap = (seen.weight * (seen.inputs.relu() - line)).masked_fill(~free, -1.0)
    intercept = (-seen.weight.clamp(max=0.0) * rise).masked_fill(~free, -1.0)
    most = min(count, free.shape[1])
    return torch.cat([gap.topk(most, dim=1).indices, intercept.topk(most, dim=1).indices], dim=1)
