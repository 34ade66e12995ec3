"""Small submissions and tracks: real files, real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from quadrants import quadrant_weights, quadrants

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
