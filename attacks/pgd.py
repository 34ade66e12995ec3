"""Projected gradient descent (Madry et al. 2018, arXiv 1706.06083, sec. 2.1).

`ascend` is the bare inner loop, for training. `pgd` is the attack: random starts keyed by the image, several losses,
the worst case over all of them for each example.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.guards import require_eval, require_finite, require_logits
from robustboard.attacks.losses import LOSSES, Loss, applicable_losses, margin_loss
from robustboard.attacks.steepest import gradient_at, uphill
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import TrackError


def ascend(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    start: Tensor,
    steps: int,
    step_size: float,
    loss: str | Loss = "ce",
) -> Tensor:
    """One run of projected gradient ascent from a given start, and its last point.

    Gradients are taken with respect to the input alone, and the model's mode is left as it is.

    Args:
        model: float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, which the ball is around.
        labels: int64 (N,).
        threat: the ball.
        start: where to begin, such as `threat.start(images, noise)`; same shape as `images`.
        steps: the number of steps, one forward and one backward pass each.
        step_size: the length of a step in pixel units of [0, 1].
        loss: a name in `LOSSES`, or any function of (logits, labels) that gives (N,).

    Returns:
        Images inside the ball, detached.

    Raises:
        TrackError: for an unknown loss.
        ModelError: if the model's input gradients are missing or not finite.
    """
    objective = _loss(loss) if isinstance(loss, str) else loss
    project = threat.projector(images)
    points = project(start.detach())
    gradient = torch.zeros_like(points)
    for _ in range(steps):
        with torch.enable_grad():
            points.requires_grad_()
            total = objective(model(points), labels).sum()
        gradient = gradient_at(points, total)
        points = project(points.detach() + step_size * uphill(gradient, threat.norm))
    require_finite(gradient, "input gradients")
    return points


def pgd(
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
    losses: Sequence[str] = ("ce", "margin", "dlr"),
    runs: Sequence[int] | None = None,
) -> Tensor:
    """The worst case over losses and random restarts, for each example.

    The start of a run depends on (seed, loss, restart, key) alone, so neither the batch nor the order matters. An
    example leaves the search at the first point where it is misclassified; until then every point counts, the clean
    image and the random starts included.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: the ball.
        keys: a content hash an example, `keyed.content_hash`.
        seed: of the random starts.
        steps: gradient steps a run.
        restarts: runs a loss, each from a random start of its own.
        step_size: the length of a step in pixel units of [0, 1].
        losses: names in `LOSSES`; those that the number of classes does not admit (DLR for two) are left out.
        runs: the places of those to run among all runs, which go loss by loss; None for all.

    Returns:
        For each example the first misclassified point, or else the point with the largest margin loss; every one
        satisfies `threat.contains`.

    Raises:
        TrackError: for an unknown loss, or no steps, restarts or applicable losses.
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    require_eval(model)
    if steps < 1 or restarts < 1:
        raise TrackError(f"PGD needs at least one step and one restart, not {steps} and {restarts}.")
    objectives = {name: _loss(name) for name in losses}
    if not len(images):
        return images.clone()
    search = _Search(model, images, labels, threat, step_size)
    usable = [name for name in objectives if name in applicable_losses(search.classes)]
    if not usable:
        raise TrackError(
            f"None of the losses {', '.join(losses) or '(none)'} suits {search.classes} classes; try margin."
        )
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    every = list(itertools.product(usable, range(restarts)))
    for name, restart in every if runs is None else [every[place] for place in runs]:
        todo = search.unbroken()
        if not len(todo):
            break
        noise = draw([keys[i] for i in todo.tolist()], images.shape[1:], seed, "pgd", name, restart)
        search.run(todo, threat.start(images[todo], noise.to(images.device)), objectives[name], steps)
    return search.best


class _Search:
    """The best point found so far for each example, and runs that improve it."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, step_size: float) -> None:
        self._model, self._images, self._labels = model, images, labels
        self._threat, self._step_size = threat, step_size
        self.best = images.clone()
        with torch.no_grad():
            logits = model(images)
        require_logits(logits, labels)
        self.classes = logits.shape[1]
        self._margins = margin_loss(logits, labels)
        self._broken = logits.argmax(dim=1) != labels

    def unbroken(self) -> Tensor:
        """The indices of the examples that are still classified correctly everywhere, int64."""
        indices: Tensor = (~self._broken).nonzero().flatten()
        return indices

    def run(self, todo: Tensor, points: Tensor, objective: Loss, steps: int) -> None:
        """Ascend from `points` for the examples `todo`; an example stops as soon as it is broken."""
        project, labels = self._threat.projector(self._images[todo]), self._labels[todo]
        for _ in range(steps):
            with torch.enable_grad():
                points.requires_grad_()
                logits = self._model(points)
                total = objective(logits, labels).sum()
            gradient = gradient_at(points, total)
            points = points.detach()
            left = self._note(todo, points, logits.detach(), labels)
            if len(left) < len(todo):
                todo, points, gradient, labels = todo[left], points[left], gradient[left], labels[left]
                if not len(todo):
                    return
                project = project.of(left)
            require_finite(gradient, "input gradients")
            points = project(points + self._step_size * uphill(gradient, self._threat.norm))
        with torch.no_grad():
            self._note(todo, points, self._model(points), labels)

    def _note(self, todo: Tensor, points: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Keep what is better than before; the positions in `todo` that are still unbroken."""
        require_logits(logits, labels)
        margins, broken = margin_loss(logits, labels), logits.argmax(dim=1) != labels
        better = broken | (margins > self._margins[todo])
        self.best[todo[better]] = points[better]
        self._margins[todo[better]] = margins[better]
        self._broken[todo[broken]] = True
        return (~broken).nonzero().flatten()


def _loss(name: str) -> Loss:
    if name not in LOSSES:
        raise TrackError(f"The attack loss {name!r} is unknown; choose from {', '.join(LOSSES)}.")
    return LOSSES[name]
