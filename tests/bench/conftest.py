"""Small submissions and tracks: real files, real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

GOOD_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x.flatten(1))

def build():
    return Net()
"""

MANIFEST = """
[defense]
name = "{name}"
title = "A linear network"
year = 2020
[model]
factory = "model.py:build"
weights = "weights.npz"
"""


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


@pytest.fixture
def make_submission(tmp_path: Path) -> Callable[..., Path]:
    """Write a defense.toml with its model and weights; returns its path."""

    def make(model: str = GOOD_MODEL, *, name: str = "linear", weights: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.py").write_text(model)
        (folder / "defense.toml").write_text(MANIFEST.format(name=name))
        np.savez(folder / "weights.npz", **(quadrant_weights() if weights is None else weights))
        return folder / "defense.toml"

    return make


@pytest.fixture
def quadrant_track(tmp_path: Path) -> Path:
    """A four-line track on the quadrant images at 1/20, without the slow parts of the protocol."""
    images, labels = quadrants()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    path = tmp_path / "track.toml"
    path.write_text(
        'id = "quadrants-linf@1"\ndataset = {npz = "data.npz"}\nthreat = {norm = "linf", eps = "1/20"}\nn = 40\n'
    )
    return path
