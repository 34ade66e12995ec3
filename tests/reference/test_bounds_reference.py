"""CROWN, CROWN-IBP and IBP on networks of the verification literature, beside the numbers of others.

`cifar_cnn_a_adv` and `mnist_cnn_a_adv` (Dathathri et al. 2020, SDP-FO; Wang et al. 2021, beta-CROWN) on the 200 images
on which that literature reports. auto_LiRPA 0.3 and 0.7.1 agree on CROWN.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.bounds import certify
from robustboard.attacks.threat import ThreatModel

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1) / 255)
        self.register_buffer("std", torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1) / 255)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def network(weights: Path, channels: int, hidden: int) -> nn.Module:
    convolutions = [nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(hidden, 100), nn.ReLU(), nn.Linear(100, 10))
    with np.load(weights) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return (nn.Sequential(Normalise(), model) if channels == 3 else model).eval()


def examples(file: Path) -> tuple[Tensor, Tensor]:
    with np.load(file) as arrays:
        return torch.from_numpy(arrays["images"]).float() / 255, torch.from_numpy(arrays["labels"]).long()


@pytest.mark.parametrize(("method", "certified"), [("ibp", 0.0), ("crown-ibp", 0.0), ("crown", 0.355)])
def test_cifar_cnn_a_adv(data_file: Callable[[str], Path], method: str, certified: float) -> None:
    model = network(data_file("cifar_cnn_a_adv.npz"), 3, 2048)
    images, labels = examples(data_file("sdp_cifar_200.npz"))
    bounds = certify(model, images, labels, threat=ThreatModel.parse("linf", "2/255"), method=method, classes=10)
    assert bounds.reason is None
    assert bounds.certified.float().mean().item() == pytest.approx(certified)
    if method == "crown":
        correct = model(images).argmax(dim=1) == labels
        pairs = bounds.margins[correct]
        pairs = pairs[~pairs.isposinf()]
        assert correct.float().mean().item() == pytest.approx(0.7)
        assert (pairs > 0).float().mean().item() == pytest.approx(0.897, abs=5e-4), "image and target class pairs"


@pytest.mark.parametrize(("method", "certified"), [("ibp", 0.0), ("crown-ibp", 0.0), ("crown", 0.010)])
def test_mnist_cnn_a_adv(data_file: Callable[[str], Path], method: str, certified: float) -> None:
    model = network(data_file("mnist_cnn_a_adv.npz"), 1, 1568)
    images, labels = examples(data_file("sdp_mnist_200.npz"))
    bounds = certify(model, images, labels, threat=ThreatModel.parse("linf", "3/10"), method=method, classes=10)
    assert bounds.reason is None
    assert bounds.certified.float().mean().item() == pytest.approx(certified)
