"""Tiny trained networks that the tests of the attacks share: seconds to train, with room between clean and broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks import keyed


@dataclass(frozen=True)
class Toy:
    """A trained network and test examples, all of which it classifies correctly."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    classes: int

    def part(self, count: int) -> Toy:
        return Toy(self.model, self.images[:count], self.labels[:count], self.keys[:count], self.classes)

    def still_correct(self, images: Tensor) -> list[bool]:
        with torch.no_grad():
            return (self.model(images).argmax(dim=1) == self.labels).tolist()


def train_toy(classes: int) -> Toy:
    """A 64-100-50-K network on the digits below `classes`."""
    data = load_digits()
    chosen = data.target < classes
    images = torch.from_numpy((data.images[chosen] / 16).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(data.target[chosen]).long()
    split = len(images) * 4 // 5
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, classes)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            for batch in torch.randperm(split).split(128):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
    model.eval()
    images, labels = images[split:], labels[split:]
    with torch.no_grad():
        correct = model(images).argmax(dim=1) == labels
    images, labels = images[correct], labels[correct]
    return Toy(model, images, labels, tuple(keyed.content_hash(image.numpy()) for image in images), classes)


@pytest.fixture(scope="session")
def toy() -> Toy:
    """Ten classes, more than 300 examples."""
    return train_toy(10)


@pytest.fixture(scope="session")
def toy_of() -> dict[int, Toy]:
    """Networks of two, three and four classes, by that number."""
    return {classes: train_toy(classes) for classes in (2, 3, 4)}
