"""What a model's input gradients are worth to an adversary: missing, not finite, dead, saturated, or plainly wrong.

A gradient attack sees a model through the derivative of a loss with respect to the input. Where that is exactly zero
the attack stands still, and where it is not the derivative of the forward pass the attack walks astray; both look like
robustness (Athalye et al. 2018, arXiv 1802.00420, sec. 3 and 4; Carlini et al. 2019, arXiv 1902.06705, sec. 3 and 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.guards import require_finite
from robustboard.attacks.losses import Loss, cross_entropy, margin_loss

_STEP = 1e-3
# A clamp takes the gradient at its bound and nowhere else, so the smallest step will do that float32 can tell. A longer
# one may cross thresholds that a network has learned: FGSM training on MNIST ends in first-layer neurons that black
# pixels leave just below zero, and that one part in a hundred thousand brings to life.
_FACE_STEP = 1e-6
"""The half-width of a difference, and how far a pixel is moved off the face of the box, in pixel units of [0, 1]."""

_ROUNDING = 4e-6
"""The error of a float32 logit as a share of the logits' scale, generously: some thirty units in the last place."""


class FiniteGradients(nn.Module):
    """A model whose input always gets a gradient, and a finite one: zero where its own is missing or not a number.

    It answers as the model does. Attacks can be run on it where they would refuse the model, and what survives them is
    no more than an upper limit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits (N, K)."""
        if not images.requires_grad or not torch.is_grad_enabled():
            logits: Tensor = self.model(images)
            return logits
        seen: Tensor = _Finite.apply(images)
        logits = self.model(seen)
        # An addend of value zero and derivative zero ties an answer that hangs on nothing to its input.
        return logits + 0.0 * seen.flatten(1).sum(dim=1, keepdim=True)


class _Finite(torch.autograd.Function):
    """The identity, whose derivative is what comes back with zeros for what is not finite."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        del ctx
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class GradientHealth:
    """Shares of the examples, each in [0, 1].

    Attributes:
        zero_margin: whose gradient of the margin is exactly zero in every pixel.
        zero_ce: of cross-entropy only, so that the loss is to blame and not the model.
        not_finite: where either has an entry that is not a finite number.
    """

    zero_margin: float
    zero_ce: float
    not_finite: float


def gradient_health(model: nn.Module, images: Tensor, labels: Tensor) -> GradientHealth:
    """How many examples give an attack no gradient to follow.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: with N of at least one.
        labels: int64 (N,).
    """
    margin = input_gradients(model, images, labels, loss=margin_loss).flatten(1)
    entropy = input_gradients(model, images, labels, loss=cross_entropy).flatten(1)
    finite = margin.isfinite().all(dim=1) & entropy.isfinite().all(dim=1)
    dead, drowned = (margin == 0).all(dim=1), (entropy == 0).all(dim=1)
    return GradientHealth(_share(dead), _share(drowned & ~dead), _share(~finite))


@dataclass(frozen=True)
class LogitScale:
    """How large the logits are.

    Attributes:
        mean_largest: the mean over examples of the largest absolute logit.
        median_gap: the median of the top logit less the second.
        certain: the share of examples whose softmax is exactly one in float32.
    """

    mean_largest: float
    median_gap: float
    certain: float


def logit_scale(model: nn.Module, images: Tensor) -> LogitScale:
    """The size of a model's logits on `images` (N, C, H, W), and how often its softmax rounds to certainty.

    Raises:
        ModelError: if a logit is not finite.
    """
    with torch.no_grad():
        logits = model(images)
    require_finite(logits, "logits")
    top = logits.topk(2, dim=1).values
    certain = logits.softmax(dim=1).amax(dim=1) == 1
    largest, gap = logits.abs().amax(dim=1).mean(), (top[:, 0] - top[:, 1]).median()
    # Of finite logits near float32's end a sum or difference is not.
    return LogitScale(float(largest.nan_to_num()), float(gap.nan_to_num()), _share(certain))


@dataclass(frozen=True)
class FaceGradients:
    """Pixels on the faces of the box, at exactly 0 or 1.

    Attributes:
        alive: how many have a gradient once they are moved a millionth into the box.
        dead: how many of these have none at the face itself.
    """

    alive: int
    dead: int


def face_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> FaceGradients:
    """Whether pixels at exactly 0 or 1 lose their gradient, as behind a clamp inside the model.

    The derivative of `clamp(x, 0, 1)` at its own bounds is zero in torch, so that an attack from a clean image never
    moves a black or white pixel. Shapes as in `gradient_health`.
    """
    face = (images == 0) | (images == 1)
    inside = torch.where(face, images.clamp(_FACE_STEP, 1 - _FACE_STEP), images)
    at_face = input_gradients(model, images, labels, loss=margin_loss)
    near = input_gradients(model, inside, labels, loss=margin_loss)
    alive = face & (near != 0)
    return FaceGradients(int(alive.sum()), int((alive & (at_face == 0)).sum()))


def finite_differences(
    model: nn.Module, images: Tensor, labels: Tensor, *, keys: Sequence[str], seed: int
) -> tuple[Tensor, Tensor]:
    """How far autograd's derivative of the margin departs from that of the forward pass, for each example.

    Along two directions, the sign of autograd's own gradient and random signs, the slope is taken from central
    differences of a thousandth, inside the box. A departure is |slope - autograd's| over the larger of both; what
    float32 rounding alone could be is not counted.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        labels: int64 (N,).
        keys: a content hash an example.
        seed: of the random directions.

    Returns:
        The departures, float64 (N,) along the gradient and (N,) along the random signs, from 0 to 2.
    """
    middle = images * (1 - 4 * _STEP) + 2 * _STEP
    gradient = input_gradients(model, middle, labels, loss=margin_loss)
    random = keyed.uniform(keys, images.shape[1:], seed, "finite differences").sign().to(images.device)
    found = [_departure(model, middle, labels, gradient, direction) for direction in (gradient.sign(), random)]
    return found[0], found[1]


def input_gradients(model: nn.Module, images: Tensor, labels: Tensor, *, loss: Loss) -> Tensor:
    """The gradient of each example's loss in its own image, (N, C, H, W); zero where nothing reaches the input."""
    points = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        total = loss(model(points), labels).sum()
    found = torch.autograd.grad(total, points, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(images) if found is None else found


def _departure(model: nn.Module, middle: Tensor, labels: Tensor, gradient: Tensor, direction: Tensor) -> Tensor:
    with torch.no_grad():
        above, below = (model(middle + sign * _STEP * direction) for sign in (1, -1))
    claimed = (gradient.double() * direction.double()).flatten(1).sum(dim=1)
    measured = (margin_loss(above.double(), labels) - margin_loss(below.double(), labels)) / (2 * _STEP)
    rounding = _ROUNDING * above.double().abs().amax(dim=1) / (2 * _STEP)
    excess = ((measured - claimed).abs() - rounding).clamp(min=0)
    departure: Tensor = excess / torch.maximum(measured.abs(), claimed.abs()).clamp(min=1e-300)
    return departure


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
