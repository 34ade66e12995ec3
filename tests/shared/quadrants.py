"""Images whose class is their brightest quadrant, and a network that reads them: their true robustness is known."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def quadrants(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Grey 4x4 images whose class is the brightest quadrant, and their labels: a linear network reads them.

    With `quadrant_weights`, the smallest perturbation that changes the class is half the brightness that the quadrant
    has over the next: the first image breaks just beyond 1/20 (at 13.5/255), the second between half of it and all.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 4
    images = rng.integers(60, 90, size=(count, 1, 4, 4), dtype=np.uint8)
    images[:2] = 100 + np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1)
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(int(label), 2)
        brighter = {0: 27, 1: 19}.get(place, int(rng.integers(10, 160)))
        image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += np.uint8(brighter)
    return images, labels.astype(np.int64)


def quadrant_weights() -> dict[str, np.ndarray]:
    """The weights of the linear network that compares the quadrants' brightness."""
    weight = np.zeros((4, 4, 4), dtype=np.float32)
    for label in range(4):
        row, column = divmod(label, 2)
        weight[label, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 4.0
    return {"layer.weight": weight.reshape(4, 16), "layer.bias": np.zeros(4, dtype=np.float32)}


class QuadrantNet(nn.Module):
    """The linear network that compares the quadrants' brightness: its true robustness is a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.load_state_dict({name: torch.from_numpy(value) for name, value in quadrant_weights().items()})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 4) of images (N, 1, 4, 4)."""
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits
