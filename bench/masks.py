"""Deliberately broken models: each hides its gradients in one well-known way and is, in truth, as weak as before.

They are what the diagnostics are tried on. Every one wraps a trained network and answers as that network does, or very
nearly, so that nothing but the adversary's view of it is changed (Athalye et al. 2018, arXiv 1802.00420, sec. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import generator


class _Mask(nn.Module):
    """A trained network with something around it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def answer(self, images: Tensor) -> Tensor:
        """The network's own logits."""
        logits: Tensor = self.network(images)
        return logits


class InnerClamp(_Mask):
    """Clamps its input to [0, 1], where it is already: pixels at exactly 0 or 1 get no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.answer(images.clamp(0.0, 1.0))


class InputQuantisation(_Mask):
    """Rounds every pixel to one of nine grey levels: the derivative is zero wherever there is one."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.answer((images * 8).round() / 8)


class Noise(_Mask):
    """Adds fresh noise to every image it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.answer(images + 0.05 * torch.randn_like(images))


class LogitScale(_Mask):
    """Multiplies its logits by a thousand: the softmax, and the cross-entropy's gradient with it, round away."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return 1000.0 * self.answer(images)


class StopGradient(_Mask):
    """Lets no gradient of its answer through, and a random linear map's through instead."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        logits = self.answer(images).detach()
        flat = images.flatten(1)
        weight = torch.randn(flat.shape[1], logits.shape[1], generator=generator("stop-gradient")).to(images.device)
        decoy = flat @ weight
        return logits + (decoy - decoy.detach())


class Detached(_Mask):
    """Detaches its input: no gradient at all."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        return self.answer(images.detach())


class AutogradDetector(_Mask):
    """Takes an input that records gradients for an attack, and then names another class."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K)."""
        logits = self.answer(images)
        return logits.roll(1, dims=1) if images.requires_grad else logits


@dataclass(frozen=True)
class Mask:
    """A way to hide gradients, and the diagnostic that must see it.

    Attributes:
        wrap: the broken model around a trained network.
        seen_by: the diagnostic whose finding is the right reason.
    """

    wrap: Callable[[nn.Module], nn.Module]
    seen_by: str


MASKS: Mapping[str, Mask] = MappingProxyType(
    {
        "inner-clamp": Mask(InnerClamp, "pixels-at-the-faces"),
        "input-quantisation": Mask(InputQuantisation, "zero-gradients"),
        "noise": Mask(Noise, "randomness"),
        "logit-scale-1000": Mask(LogitScale, "saturated-softmax"),
        "stop-gradient": Mask(StopGradient, "finite-differences"),
        "detached-input": Mask(Detached, "missing-gradients"),
        "autograd-detector": Mask(AutogradDetector, "autograd-mode"),
    }
)
