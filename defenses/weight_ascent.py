"""Gradient ascent of one weight tensor inside a relative ball, the rest of the network fixed.

The search behind module robust criticality (Zhu et al. 2023, arXiv 2308.02533, algorithm 1 and the authors' code).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Split
from robustboard.defenses.training import device_of

# Rounding must not carry a projected weight out of the ball.
_INWARD = 1 - 1e-6
_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """How the worst weights are searched; the defaults are the authors' code's but for the projection.

    Attributes:
        radius: eps, the ball's radius over the norm of the module's weights.
        epochs: passes over the examples, at most.
        lr: of plain gradient ascent.
        batch_size: examples in a step, at most.
        variant: `code` or `paper`.
        projection: after every `epoch` (algorithm 1 and the code), or after every `step` (sec. 3.3). Small networks run
            far out of the ball within an epoch, so that steps find worse weights; see docs/tuning.md.
    """

    radius: float = 0.1
    epochs: int = 10
    lr: float = 1.0
    batch_size: int = 512
    variant: Literal["code", "paper"] = "code"
    projection: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, not {self.epochs} and {self.batch_size}")
        if self.radius <= 0 or self.lr <= 0:
            raise ValueError(f"radius and lr must be positive, not {self.radius:g} and {self.lr:g}")


@dataclass(frozen=True)
class Ball:
    """What adversarial examples may become while the weights move.

    Attributes:
        images: the clean images, in the order of the examples.
        threat: the ball around each.
        steps: of PGD after every pass over the examples, a quarter of the radius each.
    """

    images: Tensor
    threat: ThreatModel
    steps: int = 3


class WeightSearch:
    """Losses and ascent steps as functions of one weight tensor.

    Args:
        network: in eval mode; it is never changed.
        weight: one of its parameters.
        examples: what the loss is taken on.
        ball: lets `attack` move the examples.
    """

    def __init__(self, network: nn.Module, weight: nn.Parameter, examples: Split, *, ball: Ball | None = None) -> None:
        self.start = weight.detach()
        self._norm = float(torch.linalg.vector_norm(self.start.double()))
        # What comes before the module answers the same at every step: its activations are computed once.
        before, self._network = (nn.Identity(), network) if ball else _split(network, weight)
        self._ball = ball
        self._name = next(name for name, value in self._network.named_parameters() if value is weight)
        device = device_of(network)
        self._labels = examples.labels.to(device)
        with torch.no_grad():
            parts = torch.split(examples.images, _BATCH)
            self._inputs = torch.cat([before(part.to(device, copy=True)) for part in parts])

    def distance(self, weight: Tensor) -> float:
        """||weight - start|| / ||start||."""
        return float(torch.linalg.vector_norm(weight.double() - self.start.double())) / self._norm

    def evaluate(self, weight: Tensor) -> tuple[float, float]:
        """The mean cross-entropy and the accuracy on all examples."""
        loss, correct = 0.0, 0
        with torch.no_grad():
            for inputs, labels in zip(
                torch.split(self._inputs, _BATCH), torch.split(self._labels, _BATCH), strict=True
            ):
                # A copy, as the first layer may work in place.
                logits = self._logits(weight, inputs.clone())
                loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                correct += int((logits.argmax(dim=1) == labels).sum())
        return loss / len(self._labels), correct / len(self._labels)

    def climb(self, weight: Tensor, order: Tensor, ascent: Ascent) -> tuple[Tensor, float, bool]:
        """One pass of ascent: the projected weight, how far it went before, and whether it is fit to go on from.

        A step to weights that are not finite is not made, and ends the search at the last that are.
        """
        reach, usable = 0.0, True
        for chosen in torch.split(order.to(self._inputs.device), ascent.batch_size):
            gradient = self._gradient(weight, chosen)
            stepped = weight + ascent.lr * gradient
            if not bool(stepped.isfinite().all()):
                usable = False
                break
            weight = stepped
            if ascent.projection == "step":
                reach = max(reach, self.distance(weight))
                weight = self._project(weight, ascent.radius)
        reach = max(reach, self.distance(weight))
        return self._project(weight, ascent.radius), reach, usable

    def attack(self, weight: Tensor) -> None:
        """Let the examples follow the weights, if they may."""
        if self._ball is None:
            return
        at, moved, threat = _At(self._network, self._name, weight), [], self._ball.threat
        for first in range(0, len(self._inputs), _BATCH):
            chosen = slice(first, first + _BATCH)
            images = self._ball.images[chosen].to(self._inputs.device)
            moved.append(
                ascend(
                    at,
                    images,
                    self._labels[chosen],
                    threat=threat,
                    start=self._inputs[chosen].clone(),
                    steps=self._ball.steps,
                    step_size=threat.radius / 4,
                ).detach()
            )
        self._inputs = torch.cat(moved)

    def _project(self, weight: Tensor, radius: float) -> Tensor:
        distance = self.distance(weight)
        if distance <= radius:
            return weight
        start = self.start.double()
        return (start + (weight.double() - start) * (_INWARD * radius / distance)).to(weight.dtype)

    def _gradient(self, weight: Tensor, chosen: Tensor) -> Tensor:
        with torch.enable_grad():
            moving = weight.clone().requires_grad_()
            loss = functional.cross_entropy(self._logits(moving, self._inputs[chosen]), self._labels[chosen])
        return torch.autograd.grad(loss, moving)[0]

    def _logits(self, weight: Tensor, inputs: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._network, {self._name: weight}, (inputs,))
        return logits


class _At(nn.Module):
    """The network at other weights of one module."""

    def __init__(self, network: nn.Module, name: str, weight: Tensor) -> None:
        super().__init__()
        self._network, self._name, self._weight = network, name, weight
        self.training = network.training

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = functional_call(self._network, {self._name: self._weight}, (images,))
        return logits


def _split(network: nn.Module, weight: nn.Parameter) -> tuple[nn.Module, nn.Module]:
    """The network as two halves, nothing of `weight` in the first; only plain chains are cut."""
    if type(network) is not nn.Sequential or network._forward_hooks or network._forward_pre_hooks:
        return nn.Identity(), network
    layers = list(network)
    first = next(place for place, layer in enumerate(layers) if any(value is weight for value in layer.parameters()))
    return nn.Sequential(*layers[:first]), nn.Sequential(*layers[first:])
