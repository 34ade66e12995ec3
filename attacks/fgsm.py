"""The fast gradient sign method: one step, of the full radius (Goodfellow et al. 2015, arXiv 1412.6572, sec. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from robustboard.attacks.losses import Loss
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, *, threat: ThreatModel, loss: str | Loss = "ce") -> Tensor:
    """Images x + eps * sign(grad_x loss) for L-inf, x + eps * grad / |grad| for L2, kept inside the pixel box.

    Args:
        model: float32 images (N, C, H, W) in [0, 1] to logits (N, K); its mode is left as it is.
        images: the clean images.
        labels: int64 (N,).
        threat: the ball.
        loss: a name in `LOSSES`, or any function of (logits, labels) that gives (N,).

    Returns:
        Images inside the ball, detached.

    Raises:
        TrackError: for an unknown loss.
        ModelError: if the model's input gradients are not finite.
    """
    return ascend(model, images, labels, threat=threat, start=images, steps=1, step_size=threat.radius, loss=loss)
