"""Settling examples: a proof, a confirmed counter-example, or a sentence that says why neither was found.

Branch and bound comes first. Once it has done as much work as the mixed-integer program is expected to need, what is
left of the budget goes to that program: see `_program_cost`.

A proof counts as those of `proofs` do: the margins are bounded in float64 on the ball rounded outward, and must exceed
a tolerance that covers the float32 network. Here the error of float32 is seen at many points of the box, not at three,
so that a tenth of the tolerance will do: an exact answer is worth little if a margin of a thousandth stays open.
A counter-example is an image of the ball rounded inward which the network
itself, in float32, misclassifies. That what was read is the model is compared at random points of the box and at every
point where the search asks the model, as a guard beside the refusals of `network`. Budgets are nodes; nothing depends
on time or on which other examples are asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robustboard.attacks.complete.branching import EXHAUSTED, NEAR_ZERO, Effort, Search, branch_and_bound
from robustboard.attacks.complete.mixed_integer import solve
from robustboard.attacks.complete.network import SAME_FUNCTION, ReluNetwork
from robustboard.attacks.complete.reduction import Problem, reduce_to_box
from robustboard.attacks.guards import require_eval
from robustboard.attacks.keyed import content_hash, generator
from robustboard.attacks.pgd import ascend
from robustboard.attacks.proofs import (
    Bounds,
    correctly_classified,
    nothing_known,
    out_of_memory,
    seen_margins,
)
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError, first_line

BRANCHING, PROGRAM = "complete-bab", "complete-mip"
METHODS = (BRANCHING, PROGRAM)
_OTHER_FUNCTION = "Complete verification reads this network as another function than it computes."

# Relative to the largest logit. Still ten times the usual error of a float32 forward pass, and `seen_margins` raises it
# to ten times the largest error that it sees at the compared points.
TOLERANCE = 1e-5
# Optimisation steps for every hidden neuron that CROWN leaves unstable.
_NEURON_ITERATIONS = 20
# From a suspicious corner a few steps of projected gradient ascent often cross the boundary.
_POLISH_STEPS = 20
# The cost model of the mixed-integer program, in sub-domains of branch and bound on the same problem. Measured on
# 64-100-50-10 networks (digits, eps 1/10) on one core: HiGHS takes about 0.2 s a margin at 46 unstable neurons, 1.3 s
# at 60 and 5 s at 72, a factor of ten every 22 neurons, while branch and bound does some 5000 sub-domains a second.
_PROGRAM_NODES, _PROGRAM_NEURONS, _PROGRAM_PIXELS, _TENFOLD = 25_000, 72, 64, 22
_HOPELESS_NEURONS = 500
# Points of each box at which what was read is compared with the model: as many inside as corners.
_COMPARED = 64


@dataclass(frozen=True)
class Settled:
    """What complete verification found for N examples.

    Attributes:
        bounds: lower bounds on the margins, as for every other method; `reason` says why none could be found.
        methods: for each example the method that proved it, or None.
        adversarial: float32 (N, C, H, W), a counter-example where one was found, else the image itself.
        broken: bool (N,), where one was found.
        nodes: how many sub-domains were bounded for each.
        notes: sentences that say why examples stayed open, each once.
    """

    bounds: Bounds
    methods: list[str | None]
    adversarial: Tensor
    broken: Tensor
    nodes: list[int]
    notes: list[str] = field(default_factory=list)


def settle(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    classes: int,
    nodes: int,
    memory_bytes: int = 2 << 30,
    on_nodes: Callable[[int], None] | None = None,
) -> Settled:
    """Prove or break each example within a budget of `nodes` sub-domains.

    Args:
        model: the classifier, in eval mode; it is not changed.
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        threat: the perturbations; L-inf.
        classes: the number of classes K.
        nodes: the budget of each example; the whole ball is bounded in any case, once for each other class.
        memory_bytes: what the matrices of one example may take.
        on_nodes: called with the number of sub-domains that have just been bounded.

    Raises:
        ModelError: if the model is in training mode. Whatever else goes wrong is a note, and the example stays open.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> _ = model[3].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]])), model[3].bias.data.zero_()
        >>> images, labels = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1), torch.tensor([0, 0])
        >>> found = settle(model, images, labels, threat=ThreatModel.parse("linf", "1/5"), classes=2, nodes=100)
        >>> found.methods, found.broken.tolist()
        (['complete-bab', None], [False, False])
    """
    require_eval(model)
    found = Settled(
        nothing_known(labels, classes, None),
        [None] * len(labels),
        images.clone(),
        torch.zeros(len(labels), dtype=torch.bool, device=labels.device),
        [0] * len(labels),
    )
    try:
        settler = _Settler(model, images[:1], threat, classes, nodes, memory_bytes, on_nodes or (lambda _: None))
        correct = correctly_classified(model, images, labels, settler.network.device)
    except BoundsError as error:
        return _nothing(found, str(error))
    for row in correct.nonzero().flatten().tolist():
        _settle_row(settler, found, images[row : row + 1], int(labels[row]), row)
    return found


def _settle_row(settler: _Settler, found: Settled, image: Tensor, label: int, row: int) -> None:
    """Settle one example; what goes wrong becomes a note."""
    try:
        search, method, tolerance = settler.settle(image, label)
    except BoundsError as error:
        _note(found, str(error))
        return
    except Exception as error:  # third-party models and solvers: the run goes on without a proof
        memory = out_of_memory(error)
        why = "its matrices do not fit in memory here" if memory else first_line(error)
        _note(found, f"Complete verification of an example failed: {why}.")
        return
    found.nodes[row] = search.nodes
    if search.adversarial is not None:
        found.adversarial[row], found.broken[row] = search.adversarial.to(found.adversarial), True
        return
    targets = [target for target in range(settler.classes) if target != label]
    margins = search.margins.new_full((1, settler.classes), torch.inf)
    margins[0, targets] = search.margins
    found.bounds.enter(torch.tensor([row]), margins, search.margins.new_tensor([tolerance]))
    if bool(found.bounds.certified[row]):
        found.methods[row] = method
    elif search.reason is not None:
        _note(found, f"Complete verification left examples open because {search.reason}.")


class _Settler:
    """One network, one threat model, one budget."""

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        threat: ThreatModel,
        classes: int,
        nodes: int,
        memory_bytes: int,
        tell: Callable[[int], None],
    ) -> None:
        if threat.norm != "linf":
            raise BoundsError("Complete verification is for L-inf balls only.")
        self.model, self.threat, self.classes, self.tell = model, threat, classes, tell
        self.effort, self.memory_bytes = Effort(nodes=nodes), memory_bytes
        self.network = ReluNetwork(model, image)

    def settle(self, image: Tensor, label: int) -> tuple[Search, str, float]:
        """The search of one example (1, C, H, W), the method that ended it, and the example's tolerance."""
        image = image.to(self.network.device)
        lower, upper = self.threat.outer_box(image)
        labels = torch.tensor([label], device=image.device)
        points = _drawn(image, lower, upper)
        exact, used = self._logits(points)
        seen, tolerances = seen_margins(torch.split(exact, 1), torch.split(used, 1), labels, least=TOLERANCE)
        tolerance = float(tolerances[0])
        targets = tuple(target for target in range(self.classes) if target != label)
        problem = reduce_to_box(
            self.network,
            lower.flatten().double(),
            upper.flatten().double(),
            label=label,
            targets=targets,
            classes=self.classes,
            iterations=_NEURON_ITERATIONS,
            memory_bytes=self.memory_bytes,
        )
        self._require_same(problem, label, points, exact)
        least = seen[0, list(targets)]

        def breaks(points: Tensor) -> Tensor | None:
            return self._confirm(points, image, labels, problem)

        search, method = self._search(problem, tolerance, breaks)
        if bool((search.margins > least + tolerance).any()):
            raise BoundsError("Complete verification contradicts the network's own logits, so nothing of it is used.")
        return search, method, tolerance

    def _search(
        self, problem: Problem, tolerance: float, breaks: Callable[[Tensor], Tensor | None]
    ) -> tuple[Search, str]:
        network = problem.network
        enough = _program_cost(len(network), len(network.lower))
        effort = replace(self.effort, nodes=min(self.effort.nodes, enough))
        search = branch_and_bound(problem, tolerance=tolerance, effort=effort, breaks=breaks, tell=self.tell)
        if not search.exhausted or self.effort.nodes <= enough:
            return search, BRANCHING
        search.reason, search.exhausted = None, False
        for row in (search.margins <= tolerance).nonzero().flatten().tolist():
            left = self.effort.nodes - search.nodes
            solved = solve(problem, row, cutoff=2 * tolerance, nodes=left)
            used = min(max(1, solved.nodes), left)
            search.nodes += used
            self.tell(used)
            if not solved.proved:
                search.adversarial = None if solved.point is None else breaks(solved.point[None])
                search.reason = NEAR_ZERO if solved.point is not None else EXHAUSTED
                return search, PROGRAM
            search.margins[row] = 2 * tolerance
            if search.nodes >= self.effort.nodes and bool((search.margins <= tolerance).any()):
                search.reason = EXHAUSTED
                break
        return search, PROGRAM

    def _confirm(self, points: Tensor, image: Tensor, labels: Tensor, problem: Problem) -> Tensor | None:
        """An image of the ball that the network itself misclassifies, from points of the box or near them."""
        start = points.float().view(-1, *image.shape[1:])
        images, same = image.expand_as(start), labels.expand(len(start))
        near = self.threat.project(start, images)
        size = self.threat.radius / _POLISH_STEPS
        moved = ascend(
            self.model, images, same, threat=self.threat, start=near, steps=_POLISH_STEPS, step_size=size, loss="margin"
        )
        tried = torch.cat([moved, near])
        exact, logits = self._logits(tried)
        self._require_same(problem, int(labels[0]), tried, exact)
        own = logits[:, labels[0]]
        lead = logits.index_fill(1, labels, -torch.inf).amax(dim=1) - own
        # The deepest one is the likeliest to hold in any other batch.
        deepest = int(lead.argmax())
        return tried[deepest] if float(lead[deepest]) > 0 else None

    def _logits(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (N, K) at points (N, C, H, W) of the network that was read, and of the model itself.

        Raises:
            BoundsError: if they are those of different functions.
        """
        with torch.no_grad():
            exact, used = self.network.logits(points), self.model(points)
        # Not "larger than": NaN is no agreement either.
        if used.shape != exact.shape or not bool(((exact - used).abs() <= SAME_FUNCTION * _scale(exact)).all()):
            raise BoundsError(_OTHER_FUNCTION)
        return exact, used

    def _require_same(self, problem: Problem, label: int, points: Tensor, exact: Tensor) -> None:
        """Refuse a reduction to the box that has other margins than the logits (N, K) at points (N, C, H, W) of it."""
        with torch.no_grad():
            reduced = problem.network.evaluate(problem.margins, points.flatten(1).double())
        margins = exact[:, [label]] - exact[:, list(problem.targets)]
        if not bool(((margins - reduced).abs() <= SAME_FUNCTION * _scale(exact)).all()):
            raise BoundsError(_OTHER_FUNCTION)


def _scale(logits: Tensor) -> Tensor:
    return logits.abs().amax(dim=1, keepdim=True).clamp(min=1.0)


def _drawn(image: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The image, the box's two ends, points drawn in the box and corners drawn of it: always the same for one image."""
    draws = torch.rand(
        _COMPARED, *image.shape[1:], generator=generator("complete verification", content_hash(image[0].cpu().numpy()))
    )
    draws[::2] = draws[::2].round()
    # Between two float32 numbers, `lerp` may round past the second one.
    inside = torch.minimum(torch.maximum(torch.lerp(lower, upper, draws.to(lower)), lower), upper)
    return torch.cat([image, lower, upper, inside])


def known_method(name: object) -> str | None:
    """The one of `METHODS` that `name` names, or None: what another process says is checked before it is believed.

    >>> known_method("complete-bab"), known_method("wishful-thinking")
    ('complete-bab', None)
    """
    return next((method for method in METHODS if method == name), None)


def _program_cost(neurons: int, pixels: int) -> int:
    """How much branch and bound, in sub-domains, one mixed-integer program is expected to cost.

    Branch and bound goes first and stops there, if its budget reaches so far: whichever of the two is cheaper, no more
    than twice its cost is spent.

    >>> _program_cost(72, 64), _program_cost(50, 64), _program_cost(700, 3072) > 10**15
    (25000, 2095, True)
    """
    size = (neurons + pixels) / (_PROGRAM_NEURONS + _PROGRAM_PIXELS)
    growth = 10.0 ** ((min(neurons, _HOPELESS_NEURONS) - _PROGRAM_NEURONS) / _TENFOLD)
    return max(1, int(_PROGRAM_NODES * size * growth))


def _note(found: Settled, sentence: str) -> None:
    if sentence not in found.notes:
        found.notes.append(sentence)


def _nothing(found: Settled, reason: str) -> Settled:
    bounds = replace(found.bounds, reason=reason)
    return Settled(bounds, found.methods, found.adversarial, found.broken, found.nodes, [reason])
