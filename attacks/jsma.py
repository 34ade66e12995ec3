"""The Jacobian-based saliency map attack: few features, each changed a lot (Papernot et al. 2016, arXiv 1511.07528).

The targeted attack with pairs of features, algorithms 1 and 3. The derivative is that of the softmax (what defensive
distillation was tested with), of the softmax of the logits over a temperature (what breaks it again), or of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustboard.attacks.guards import NO_GRADIENT, require_eval, require_finite, require_logits
from robustboard.attacks.saliency import best_pairs, largest_pairs
from robustboard.errors import ModelError, TrackError

Forward = Literal["softmax", "logits"]


@dataclass(frozen=True)
class JsmaResult:
    """What the attempts came to, in their order.

    Attributes:
        images: the last image of each attempt, (N, C, H, W), inside [0, 1].
        success: whether it is classified as the target, boolean (N,).
        changed: how many features differ from the clean image, int64 (N,).
    """

    images: Tensor
    success: Tensor
    changed: Tensor


def default_pairs(features: int) -> int:
    """The paper's budget: as many pairs as make up 14.5 % of the features, rounded down.

    >>> default_pairs(28 * 28)
    56
    """
    return features * 145 // 2000


def jsma(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    forward: Forward = "softmax",
    temperature: float = 1.0,
    theta: float = 1.0,
    pairs: int | None = None,
    batch_size: int = 512,
) -> JsmaResult:
    """Push each image into its target class by changing pairs of features.

    In every step the pair p, q is chosen that maximises -(a_p + a_q)(b_p + b_q), where a is the derivative of the
    target's output and b the sum of the other outputs' derivatives, among the pairs with a_p + a_q > 0 > b_p + b_q (for
    a negative `theta` with both signs turned). Both features move by `theta`; one that has reached the end of [0, 1]
    cannot be chosen again, and one that stands there from the start never is. An attempt ends when the image is
    classified as the target, when the budget is spent, or when no pair is admissible. Nothing is random.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, one row an attempt, on the model's device.
        targets: the class to reach, int64 (N,).
        forward: whose derivative is taken. The outputs of a softmax sum to one, so that b = -a and one backward pass a
            step is enough; for the logits there are two.
        temperature: the logits are divided by it before the softmax; those of `forward="logits"` are not.
        theta: the change of a feature, in pixel units of [0, 1], positive or negative; the papers' is 1.
        pairs: the largest number of steps; None is `default_pairs`.
        batch_size: attempts in a forward pass, at most.

    Raises:
        TrackError: for a setting that is not allowed.
        ModelError: if the model is in training mode, or its logits or input gradients are missing or not finite.
    """
    require_eval(model)
    features = math.prod(images.shape[1:])
    steps = default_pairs(features) if pairs is None else pairs
    _require_settings(forward, temperature, theta, steps, features)
    walk = _Walk(model, forward, temperature, theta, steps)
    batches = zip(torch.split(images, batch_size), torch.split(targets, batch_size), strict=True)
    parts = [walk.run(*batch) for batch in batches if len(batch[0])]
    if not parts:
        return JsmaResult(images.clone(), torch.zeros_like(targets, dtype=torch.bool), torch.zeros_like(targets))
    found, success = (torch.cat(column) for column in zip(*parts, strict=True))
    return JsmaResult(found, success, (found != images).flatten(1).sum(dim=1))


@dataclass(frozen=True)
class _Walk:
    """The steps of a batch of attempts."""

    model: nn.Module
    forward: Forward
    temperature: float
    theta: float
    steps: int

    def run(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The last image of each attempt, and whether it is classified as the target."""
        found = images.clone()
        success = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        active = torch.arange(len(images), device=images.device)
        for _ in range(self.steps):
            points = found[active]
            reached, gains, falls = self._derivatives(points, targets[active])
            success[active[reached]] = True
            free = (points < 1 if self.theta > 0 else points > 0).flatten(1)
            chosen, admissible = largest_pairs(gains, free) if falls is None else best_pairs(gains, falls, free)
            going = admissible & ~reached
            active, points, chosen = active[going], points[going], chosen[going]
            if not len(active):
                return found, success
            flat = points.flatten(1)
            moved = (flat.gather(1, chosen) + self.theta).clamp(0.0, 1.0)
            found[active] = flat.scatter(1, chosen, moved).view_as(points)
        with torch.no_grad():
            success[active] = self._logits(found[active], targets[active]).argmax(dim=1) == targets[active]
        return found, success

    def _derivatives(self, points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which points have reached their targets, a, and -b (None where it is a); negated for a negative theta."""
        sign = math.copysign(1.0, self.theta)
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            logits = self._logits(points, targets)
            reached = logits.detach().argmax(dim=1) == targets
            if self.forward == "softmax":
                outputs = (logits / self.temperature).softmax(dim=1)
                return reached, sign * _gradient(_own(outputs, targets).sum(), points), None
            own = _own(logits, targets)
            gains = _gradient(own.sum(), points)
            rises = _gradient((logits.sum(dim=1) - own).sum(), points)
        return reached, sign * gains, -sign * rises

    def _logits(self, points: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.model(points)
        require_logits(logits.detach(), targets)
        return logits


def _own(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.gather(1, targets.unsqueeze(1)).squeeze(1)


def _gradient(total: Tensor, points: Tensor) -> Tensor:
    """The derivative of a sum over the batch, (N, D)."""
    found = None
    if total.requires_grad:
        (found,) = torch.autograd.grad(total, points, retain_graph=True, allow_unused=True)
    if found is None:
        raise ModelError(NO_GRADIENT)
    require_finite(found, "input gradients")
    return found.flatten(1)


def _require_settings(forward: str, temperature: float, theta: float, steps: int, features: int) -> None:
    if forward not in ("softmax", "logits"):
        raise TrackError(f"JSMA takes the derivative of softmax or logits, not of {forward!r}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise TrackError(f"JSMA's temperature must be positive, not {temperature:g}.")
    if not 0 < abs(theta) <= 1:
        raise TrackError(f"JSMA's theta must lie in [-1, 1] and not be zero, not {theta:g}.")
    if steps < 1 or features < 2:
        raise TrackError(f"JSMA changes pairs of features, so {steps} pairs of {features} features are too few.")
