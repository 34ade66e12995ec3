"""The third-party networks of the verification literature, as submissions on the images that it reports on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MODEL = """
import torch
from torch import nn

class CNNA(nn.Sequential):
    def __init__(self, channels, flat, mean, std):
        super().__init__(
            nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(flat, 100), nn.ReLU(), nn.Linear(100, 10),
        )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x):
        return super().forward((x - self.mean) / self.std)

def cifar():
    return CNNA(3, 2048, [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255])

def mnist():
    return CNNA(1, 1568, [0.0], [1.0])
"""

MANIFEST = """
[defense]
name = "{data}-cnn-a-adv"
title = "CNN-A, adversarially trained, {data}"
paper = "https://arxiv.org/abs/2010.11645"
year = 2020
kind = "empirical"
architecture = "CNN-A"
[model]
factory = "model.py:{data}"
weights = "{weights}"
"""

TRACK = """
id = "sdp-{data}-linf@1"
dataset = {{npz = "{images}"}}
threat = {{norm = "linf", eps = "{eps}"}}
n = 200
"""

EPS = {"cifar": "2/255", "mnist": "3/10"}


@pytest.fixture(scope="session")
def third_party(data_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the folder of one of the two networks, `cifar` or `mnist`: defense.toml and track.toml."""

    def make(data: str) -> Path:
        folder = tmp_path_factory.mktemp(data)
        for name in (f"{data}_cnn_a_adv.npz", f"sdp_{data}_200.npz"):
            (folder / name).write_bytes(data_file(name).read_bytes())
        (folder / "model.py").write_text(MODEL)
        (folder / "defense.toml").write_text(MANIFEST.format(data=data, weights=f"{data}_cnn_a_adv.npz"))
        (folder / "track.toml").write_text(TRACK.format(data=data, images=f"sdp_{data}_200.npz", eps=EPS[data]))
        return folder

    return make
