"""The interval attack (Wang et al. 2019, arXiv 1906.02282): gradient ascent that symbolic bounds lead out of dead ends.

A gradient knows the network at one point. The interval gradient knows it over a region: bound all logit differences
over a box around the point by symbolic linear intervals, take the class that may win there, and move along the
coefficients of its bound. A box in which no class can win holds no adversarial example, so it grows until one might.
The order of ascents, moves and restarts is that of the authors' code; the paper's text was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.bound_memory import estimate
from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.guards import NO_GRADIENT, require_eval, require_finite, require_logits
from robustboard.attacks.losses import LOSSES, Loss, margin_loss
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

Step = Literal["corner", "scaled"]

# As for CROWN on a CPU: larger chunks are slower.
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Found:
    """What an interval attack found, and what it cost.

    Attributes:
        images: (N, C, H, W), for each example the first misclassified point, or else the one of largest margin loss;
            inside the ball.
        broken: bool (N,), whether it is misclassified.
        gradients: int64 (N,), gradients taken with respect to the example.
        regions: int64 (N,), regions around its points that were bounded.
    """

    images: Tensor
    broken: Tensor
    gradients: Tensor
    regions: Tensor


def rounds(restart: int) -> int:
    """How many ascents of a restart are followed by an interval step: the first two restarts are searched deeper."""
    return 3 if restart < 2 else 1


def ascents(restarts: int) -> int:
    """Ascents in so many restarts; PGD with that many restarts of its own has as many gradients to spend.

    >>> [ascents(restarts) for restarts in (1, 2, 3)]
    [4, 8, 10]
    """
    return sum(rounds(restart) + 1 for restart in range(restarts))


def interval_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    steps: int,
    restarts: int,
    step_size: float,
    loss: str = "ce",
    step: Step = "corner",
    smallest: float | None = None,
    growth: float = 3.0,
) -> Found:
    """Alternate gradient ascent with steps along the interval gradient.

    A restart begins at the clean image (the first) or at a random point of the ball, and is `rounds(restart)` times
    one ascent and one interval step, then a last ascent. An example leaves the search at the first point where it is
    misclassified; every point counts, as in `pgd`.

    Args:
        model: in eval mode, of operators that auto_LiRPA knows; images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: an L-inf ball.
        keys: a content hash an example, `keyed.content_hash`.
        seed: of the random starts.
        steps: gradient steps an ascent.
        restarts: see above; the paper's code has 50.
        step_size: the length of a gradient step in pixel units of [0, 1].
        loss: what the ascents maximise, a name in `LOSSES`: `"ce"`, or `"margin"` for the paper's C&W variant.
        step: how far an interval step goes: to the `corner` of the ball that the signs point at (the authors' code), or
            by the region's radius (`scaled`).
        smallest: the radius of the first region; eps / 30 by default, which is the authors' 0.01 at eps 0.3.
        growth: the factor by which a region grows in which no class can win, up to eps / 2.

    Raises:
        TrackError: for another norm, an unknown loss or step, or numbers out of range.
        ModelError: if the model is in training mode, or its logits or gradients are missing or not finite.
        BoundsError: if auto_LiRPA cannot bound the network.
    """
    smallest = threat.radius / 30 if smallest is None else smallest
    _require_setting(threat, steps, restarts, loss, step, smallest, growth)
    require_eval(model)
    if not len(images):
        nothing = torch.zeros(0, dtype=torch.long)
        return Found(images.clone(), nothing.bool(), nothing, nothing)
    search = _Search(model, images, labels, threat, LOSSES[loss], steps, step_size)
    regions = _Regions(model, images[:1], search.classes, threat, smallest=smallest, growth=growth)
    for restart in range(restarts):
        todo = search.unbroken()
        if not len(todo):
            break
        points = images[todo]
        if restart:
            noise = keyed.uniform([keys[i] for i in todo.tolist()], images.shape[1:], seed, "interval", restart)
            points = threat.start(points, noise.to(images.device))
        for _ in range(rounds(restart)):
            todo, points = search.ascend(todo, points)
            signs, reach = regions.uphill(points, labels[todo], search.regions, todo)
            length = torch.full_like(reach, 2 * threat.radius) if step == "corner" else reach
            points = threat.project(points + length.view(-1, 1, 1, 1) * signs, images[todo])
        search.ascend(todo, points)
    return Found(search.best, search.broken, search.gradients, search.regions)


class _Search:
    """The best point so far and the costs of each example, and ascents that improve it."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        objective: Loss,
        steps: int,
        step_size: float,
    ) -> None:
        self._model, self._images, self._labels, self._threat = model, images, labels, threat
        self._objective, self._steps, self._step_size = objective, steps, step_size
        with torch.no_grad():
            logits = model(images)
        require_logits(logits, labels)
        self.classes = logits.shape[1]
        self.best = images.clone()
        self.broken = logits.argmax(dim=1) != labels
        self._margins = margin_loss(logits, labels)
        self.gradients, self.regions = torch.zeros_like(labels), torch.zeros_like(labels)

    def unbroken(self) -> Tensor:
        """The indices of the examples that are still classified correctly everywhere, int64."""
        indices: Tensor = (~self.broken).nonzero().flatten()
        return indices

    def ascend(self, todo: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient steps from `points` for the examples `todo`; the examples left unbroken, and their last points."""
        project = self._threat.projector(self._images[todo])
        for _ in range(self._steps):
            if not len(todo):
                return todo, points
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                logits = self._model(points)
                total = self._objective(logits, self._labels[todo]).sum()
            if not total.requires_grad:
                raise ModelError(NO_GRADIENT)
            (gradient,) = torch.autograd.grad(total, points, allow_unused=True)
            if gradient is None:
                raise ModelError(NO_GRADIENT)
            self.gradients[todo] += 1
            left = self._note(todo, points.detach(), logits.detach())
            if len(left) < len(todo):
                todo, points, gradient = todo[left], points[left], gradient[left]
                project = project.of(left)
            require_finite(gradient, "input gradients")
            points = project(points.detach() + self._step_size * gradient.sign())
        if not len(todo):
            return todo, points
        with torch.no_grad():
            left = self._note(todo, points, self._model(points))
        return todo[left], points[left]

    def _note(self, todo: Tensor, points: Tensor, logits: Tensor) -> Tensor:
        """Keep what is better than before; the positions in `todo` that are still unbroken."""
        labels = self._labels[todo]
        require_logits(logits, labels)
        margins, broken = margin_loss(logits, labels), logits.argmax(dim=1) != labels
        better = broken | (margins > self._margins[todo])
        self.best[todo[better]] = points[better]
        self._margins[todo[better]] = margins[better]
        self.broken[todo[broken]] = True
        return (~broken).nonzero().flatten()


class _Regions:
    """Interval gradients of one network."""

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        classes: int,
        threat: ThreatModel,
        *,
        smallest: float,
        growth: float,
    ) -> None:
        self._network = BoundedNetwork(model, image, classes=classes, slope="same")
        self._chunk = max(1, _CHUNK_BYTES // estimate(self._network).crown)
        self._growth = growth
        self._largest = threat.radius / 2
        self._smallest = min(smallest, self._largest)

    def uphill(self, points: Tensor, labels: Tensor, counts: Tensor, todo: Tensor) -> tuple[Tensor, Tensor]:
        """Where each point should go: signs (N, C, H, W), and the radius (N,) of the region that says so.

        Both are zero where no class can win even in the largest region. `counts[todo]` goes up with every region.
        """
        signs, reach = torch.zeros_like(points), points.new_zeros(len(points))
        waiting, radius = torch.arange(len(points), device=points.device), self._smallest
        while len(waiting):
            counts[todo[waiting]] += 1
            rows, can_win = self._gradient(points[waiting], labels[waiting], radius)
            decided = waiting[can_win]
            signs[decided], reach[decided] = rows[can_win].sign(), radius
            waiting = waiting[~can_win] if radius < self._largest else waiting[:0]
            radius = min(radius * self._growth, self._largest)
        return signs, reach

    def _gradient(self, points: Tensor, labels: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """The coefficients of z_d - z_y for the class d that may win by most, and whether it may win at all."""
        found = []
        for place in range(0, len(points), self._chunk):
            part, own = points[place : place + self._chunk], labels[place : place + self._chunk]
            lower, upper = (part - radius).clamp(min=0.0), (part + radius).clamp(max=1.0)
            margins, rows = self._network.coefficients(own, lower=lower, upper=upper)
            least, other = margins.min(dim=1)
            found.append((-rows[torch.arange(len(own), device=rows.device), other], least < 0))
        return torch.cat([rows for rows, _ in found]), torch.cat([can_win for _, can_win in found])


def _require_setting(
    threat: ThreatModel, steps: int, restarts: int, loss: str, step: str, smallest: float, growth: float
) -> None:
    if threat.norm != "linf":
        raise TrackError(f"The interval attack moves in L-inf balls, not {threat.norm} ones; try pgd.")
    if steps < 1 or restarts < 1:
        raise TrackError(f"The interval attack needs at least one step and one restart, not {steps} and {restarts}.")
    if loss not in LOSSES:
        raise TrackError(f"The attack loss {loss!r} is unknown; choose from {', '.join(LOSSES)}.")
    if step not in get_args(Step):
        raise TrackError(f"The interval step {step!r} is not one of {', '.join(get_args(Step))}.")
    if smallest <= 0 or growth <= 1:
        raise TrackError(
            f"Regions need a positive smallest radius and growth above 1, not {smallest:g} and {growth:g}."
        )
