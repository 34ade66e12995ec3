"""Attacks set against each other: where a weaker one does better, the stronger one was blinded.

Each comparison is one of the signs by which masked gradients show (Athalye et al. 2018, arXiv 1802.00420, sec. 3.1;
Carlini et al. 2019, arXiv 1902.06705, sec. 5): one step beats many, a loss beats another that differs only in its
scale, an unbounded attack fails. Budgets are numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.fgsm import fgsm
from robustboard.attacks.losses import applicable_losses, margin_loss
from robustboard.attacks.pgd import ascend, pgd
from robustboard.attacks.threat import ThreatModel

RESCALED = "rescaled ce"
"""Cross-entropy of the logits over their mean absolute value: what it finds does not depend on their scale."""


def compare_losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    steps: int,
    step_size: float,
) -> Mapping[str, Tensor]:
    """Whether each example survives PGD with one loss alone, by loss: `ce`, `margin`, `dlr` and `rescaled ce`.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        labels: int64 (N,).
        threat: the ball.
        keys: a content hash an example.
        seed: of the random starts.
        steps: of each run.
        step_size: in pixel units of [0, 1].

    Returns:
        Booleans (N,) by loss; DLR only with three classes or more.

    Raises:
        ModelError: if the logits or input gradients are not finite.
    """
    with torch.no_grad():
        logits = model(images)
    scaled = _Rescaled(model, float(logits.abs().mean().clamp(min=torch.finfo(logits.dtype).tiny)))
    runs = [(name, model, name) for name in applicable_losses(logits.shape[1])] + [(RESCALED, scaled, "ce")]
    survived = {}
    for name, target, loss in runs:
        found = pgd(
            target,
            images,
            labels,
            threat=threat,
            keys=keys,
            seed=seed,
            steps=steps,
            restarts=1,
            step_size=step_size,
            losses=(loss,),
        )
        survived[name] = _correct(model, found, labels)
    return survived


def single_step(model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel) -> Tensor:
    """Whether each example survives one step of the full radius on the margin, (N,); shapes as in `compare_losses`."""
    return _correct(model, fgsm(model, images, labels, threat=threat, loss="margin"), labels)


def unbounded(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    steps: int,
) -> Tensor:
    """Whether each example survives ascent of the margin when any image of the box is allowed, (N,).

    The ascent starts inside the track's own ball, where the gradient must already point the way: a start far off would
    be misclassified by itself. Two hundred per cent of the box fit into its steps. Arguments as in `compare_losses`.
    """
    pixels = images[0].numel()
    free = ThreatModel("linf", Fraction(1)) if threat.norm == "linf" else ThreatModel("l2", Fraction(pixels))
    reach = 2.0 if threat.norm == "linf" else 2.0 * math.sqrt(pixels)
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    noise = draw(keys, images.shape[1:], seed, "unbounded").to(images.device)
    points = threat.start(images, noise)
    alive = _correct(model, points, labels)
    for _ in range(steps):
        if not bool(alive.any()):
            break
        points = ascend(
            model, images, labels, threat=free, start=points, steps=1, step_size=reach / steps, loss=margin_loss
        )
        alive &= _correct(model, points, labels)
    return alive


class _Rescaled(nn.Module):
    """A model whose logits are divided by a constant."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self._scale = model, scale
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits / self._scale


def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        right: Tensor = model(images).argmax(dim=1) == labels
    return right
