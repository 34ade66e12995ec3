"""What is proved of a network under training: margins that hold over a ball, and on how many images they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from robustboard.attacks.bound_memory import estimate
from robustboard.attacks.bounded_network import Ball, BoundedNetwork
from robustboard.attacks.keyed import content_hash, derive_seed
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Split, TrainingData
from robustboard.defenses.training import device_of

Bound = Literal["sym", "crown-ibp"]

# Larger chunks are slower on a CPU, once their coefficients outgrow the caches.
_CHUNK_BYTES = 64 << 20


class Verifier:
    """Margins of a network under training that hold over a part of the threat model's radius.

    Args:
        model: the network; gradients reach its parameters.
        data: for its shape and classes.
        threat: the ball.
        bound: how the margins are bounded.
    """

    def __init__(self, model: nn.Module, data: TrainingData, threat: ThreatModel, *, bound: Bound) -> None:
        self._method = "crown" if bound == "sym" else "crown-ibp"
        self._network = BoundedNetwork(
            model,
            data.train.images[:1].to(device_of(model)),
            classes=data.classes,
            slope="same" if bound == "sym" else "adaptive",
        )
        self._threat = threat

    def margins(self, images: Tensor, labels: Tensor, *, growth: float = 1.0) -> Tensor:
        """Lower bounds on z_y - z_j for the classes j != y, (N, K - 1), over `growth` times the radius."""
        radius = growth * self._threat.radius
        return self._network.margins(
            labels,
            lower=(images - radius).clamp(min=0.0),
            upper=(images + radius).clamp(max=1.0),
            method=self._method,
            ball=Ball(images, radius) if self._threat.norm == "l2" else None,
        )

    def verified(self, split: Split, *, on_examples: Callable[[int], None] | None = None) -> Tensor:
        """Which examples of a split are proved to be classified correctly over the whole radius, booleans (N,).

        Args:
            split: the examples.
            on_examples: called with the number of examples that have just been bounded.
        """
        chunk = max(1, _CHUNK_BYTES // estimate(self._network).of(self._method))
        flags = torch.zeros(len(split), dtype=torch.bool)
        with torch.no_grad():
            for place in range(0, len(split), chunk):
                images, labels = split.images[place : place + chunk], split.labels[place : place + chunk]
                margins = self.margins(images.to(self._network.device), labels.to(self._network.device))
                flags[place : place + chunk] = (margins > 0).all(dim=1).cpu()
                if on_examples is not None:
                    on_examples(len(images))
        return flags


def keyed_subset(split: Split, count: int) -> Split:
    """At most `count` examples of a split, chosen by the pixels alone."""
    drawn = [derive_seed("verified accuracy", content_hash(image)) for image in split.images.numpy()]
    places = sorted(range(len(split)), key=drawn.__getitem__)[:count]
    return Split(split.images[places], split.labels[places])
