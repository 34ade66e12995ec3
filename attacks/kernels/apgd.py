"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, section 3), untargeted and targeted.

The step begins at twice the radius and is halved, at checkpoints that come ever closer, where an example's loss has
stopped rising; the search then resumes from its best point. The schedule is the paper's. What differs from the authors'
code: an example leaves at the pass that misclassifies it, the last pass takes no gradient, and the first checkpoint
compares with the loss at the start, where theirs compares with zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.guards import require_finite
from robustboard.attacks.kernels.survivors import Survivors
from robustboard.attacks.losses import cross_entropy, dlr, margin_loss
from robustboard.attacks.steepest import gradient_at, uphill
from robustboard.attacks.threat import ThreatModel

STEPS, TARGETS = 100, 9

_MOMENTUM = 0.75
_RISING = 0.75
# Of the steps: the first interval between checkpoints, how much each next one is shorter, and the shortest.
_FIRST, _SHORTER, _SHORTEST = 0.22, 0.03, 0.06
# Gathering what is left costs about as much as a step over the pixels.
_WORTH_COMPACTING = 1 / 16

Objective = Callable[[Tensor, Tensor], Tensor]
"""A loss to be maximised: logits (R, K) and what is wanted, a row an example, to (R,)."""


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    loss: str = "ce",
    steps: int = STEPS,
) -> Tensor:
    """Untargeted APGD from one random start.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        labels: int64 (N,).
        threat: the ball.
        keys: what each example's draws are keyed by, N content hashes.
        seed: of the draws.
        loss: `"ce"`, or `"dlr"`, which is the margin where there are only two classes.
        steps: forward and backward passes an example.

    Returns:
        (N, C, H, W): the misclassified image of the ball where one was found, the clean image elsewhere.

    Raises:
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    survivors = Survivors(model, images, labels)
    objective = cross_entropy if loss == "ce" else dlr if survivors.logits.shape[1] > 2 else margin_loss
    rows = survivors.left()
    if len(rows):
        words = (seed, f"apgd-{loss}")
        ascend_from(
            survivors, rows, labels[rows], objective, _starts(survivors, rows, threat, keys, words), threat, steps
        )
    return survivors.adversarial


def apgd_targeted(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    targets: Tensor | None = None,
    most: int = TARGETS,
    steps: int = STEPS,
) -> Tensor:
    """APGD towards each of the likeliest other classes in turn, by the targeted DLR loss.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        labels: int64 (N,).
        threat: the ball.
        keys: what each example's draws are keyed by, N content hashes.
        seed: of the draws.
        targets: bool (N, K), the classes that may still be reached; None for all.
        most: how many classes are tried.
        steps: forward and backward passes an example and class.

    Returns:
        As `apgd`. With fewer than four classes the loss is the margin, which the DLR scales.

    Raises:
        ModelError: as `apgd`.
    """
    survivors = Survivors(model, images, labels)
    for rows, classes in survivors.rounds(targets, most):
        starts = torch.empty_like(images[rows])
        for target in sorted(set(classes.tolist())):
            chosen = classes == target
            starts[chosen] = _starts(survivors, rows[chosen], threat, keys, (seed, "apgd-t", target))
        pairs = torch.stack([labels[rows], classes], dim=1)
        ascend_from(survivors, rows, pairs, _targeted_loss(survivors.logits.shape[1]), starts, threat, steps)
    return survivors.adversarial


def _targeted_loss(classes: int) -> Objective:
    def loss(logits: Tensor, pairs: Tensor) -> Tensor:
        own, target = logits.gather(1, pairs).unbind(dim=1)
        if classes < 4:
            return target - own
        top = logits.topk(4, dim=1).values
        return (target - own) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)

    return loss


def _starts(
    survivors: Survivors, rows: Tensor, threat: ThreatModel, keys: Sequence[str], words: Sequence[str | int]
) -> Tensor:
    """A random point of each example's sphere, in the box."""
    images = survivors.images[rows]
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    noise = draw([keys[row] for row in rows.tolist()], images.shape[1:], *words).to(images.device)
    if threat.norm == "linf":
        noise = noise / noise.flatten(1).abs().amax(dim=1).view(-1, *[1] * (images.dim() - 1))
    return threat.start(images, noise)


@dataclass
class _State:
    """One row an example that is still searched; all tensors are owned here."""

    rows: Tensor
    goal: Tensor
    images: Tensor
    points: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_at_check: Tensor
    halved: Tensor
    rises: Tensor
    step: Tensor

    def keep(self, chosen: Tensor) -> None:
        """Go on with the chosen examples alone."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name)[chosen])


def ascend_from(
    survivors: Survivors,
    rows: Tensor,
    goal: Tensor,
    objective: Objective,
    starts: Tensor,
    threat: ThreatModel,
    steps: int,
) -> None:
    """Run APGD on some examples from given starts; who is broken is noted and leaves.

    Args:
        survivors: whom the examples are of.
        rows: whom to attack, int64 (R,), unbroken.
        goal: the loss's second argument, (R,) or (R, ...).
        objective: the loss, of logits (R, K) and `goal`, (R,).
        starts: (R, C, H, W), in the ball.
        threat: the ball.
        steps: forward and backward passes an example; the start takes one more.

    Raises:
        ModelError: if the logits or input gradients are missing or not finite.
    """
    loss, gradient, held = _look(survivors, rows, starts, goal, objective)
    state = _State(
        rows=rows,
        goal=goal,
        images=survivors.images[rows],
        points=starts,
        before=starts,
        gradient=gradient,
        loss=loss,
        best=starts.clone(),
        best_gradient=gradient.clone(),
        best_loss=loss.clone(),
        best_at_check=loss.clone(),
        halved=torch.ones_like(held),
        rises=torch.zeros_like(loss),
        step=torch.full_like(loss, 2 * threat.radius),
    )
    state.keep(held)
    move = _Move(threat, state)
    interval = 0
    for index, length in enumerate(_lengths(steps)):
        if not len(state.rows):
            return
        state.points, state.before = move(state, first=index == 0), state.points
        last = index == steps - 1
        loss, gradient, held = _look(survivors, state.rows, state.points, state.goal, objective, last=last)
        if last:
            return
        state.rises += loss > state.loss
        state.loss, state.gradient = loss, gradient
        _keep_best(state)
        interval += 1
        if interval == length:
            _check(state, length)
            interval = 0
        if int((~held).sum()) > _WORTH_COMPACTING * len(held) or not bool(held.any()):
            state.keep(held)
            move.keep(held)


def _lengths(steps: int) -> Iterator[int]:
    """For each step the length of the interval that it is in."""
    length, shortest = max(int(_FIRST * steps), 1), max(int(_SHORTEST * steps), 1)
    done = 0
    while done < steps:
        for _ in range(min(length, steps - done)):
            yield length
        done += length
        length = max(length - max(int(_SHORTER * steps), 1), shortest)


def _look(
    survivors: Survivors, rows: Tensor, points: Tensor, goal: Tensor, objective: Objective, *, last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: losses, input gradients, and which of the points are still classified correctly."""
    points = points.detach()
    with torch.set_grad_enabled(not last):
        points.requires_grad_(not last)
        logits = survivors.model(points)
        losses = objective(logits, goal)
    held = survivors.note(rows, points, logits.detach())
    if last:
        return losses, points, held
    gradient = gradient_at(points, losses.sum())
    points.requires_grad_(False)
    require_finite(gradient, "input gradients")
    return losses.detach(), gradient, held


def _keep_best(state: _State) -> None:
    better = state.loss > state.best_loss
    state.best[better], state.best_gradient[better] = state.points[better], state.gradient[better]
    state.best_loss = torch.maximum(state.best_loss, state.loss)


def _check(state: _State, length: int) -> None:
    """At a checkpoint, halve the step of the examples that have stopped rising and take them back to their best."""
    stuck = ~state.halved & (state.best_at_check >= state.best_loss)
    state.halved = (state.rises <= _RISING * length) | stuck
    state.best_at_check = state.best_loss.clone()
    state.rises.zero_()
    state.step[state.halved] /= 2
    state.points[state.halved] = state.best[state.halved]
    state.gradient[state.halved] = state.best_gradient[state.halved]


class _Move:
    """The next points of a state's examples."""

    def __init__(self, threat: ThreatModel, state: _State) -> None:
        self._norm = threat.norm
        self._project = threat.projector(state.images)
        self._column = (-1, *[1] * (state.images.dim() - 1))

    def keep(self, chosen: Tensor) -> None:
        """Go on with the chosen examples alone."""
        self._project = self._project.of(chosen)

    def __call__(self, state: _State, *, first: bool) -> Tensor:
        points = state.points
        step = state.step.view(self._column)
        aim = self._project(points + step * uphill(state.gradient, self._norm))
        if first:
            return aim
        # x + 0.75 (z - x) + 0.25 (x - x_before)
        mixed = torch.lerp(points, aim, _MOMENTUM).add_(points - state.before, alpha=1 - _MOMENTUM)
        return self._project(mixed)
