"""What the baselines must reach on scikit-learn's digits at eps 1/10, so that a row of the board means something."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData

LINF = ThreatModel.parse("linf", "1/10")


@pytest.fixture(scope="module")
def digits() -> tuple[TrainingData, Tensor, Tensor]:
    """Training data, and 360 test images with labels."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = (torch.from_numpy(bundled.images) * 255 / 16).round().div(255).float().unsqueeze(1)
    labels = torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, held, rest = order[:360], order[360:500], order[500:]
    data = TrainingData("digits", Split(images[rest], labels[rest]), Split(images[held], labels[held]), 10)
    return data, images[test], labels[test]


def fit(name: str, data: TrainingData) -> nn.Module:
    return registry.create(name).fit(
        data, LINF, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(dim=1) == labels


def survives(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    keys = [str(place) for place in range(len(labels))]
    found = pgd(model, images, labels, threat=LINF, keys=keys, seed=0, steps=20, restarts=1, step_size=0.02)
    return right(model, found, labels).float().mean().item()


@pytest.mark.parametrize(
    ("name", "clean", "robust"),
    [
        ("pgd-at", 0.97, 0.82),
        pytest.param("trades", 0.97, 0.80, marks=pytest.mark.slow),
        pytest.param("fgsm-at", 0.97, 0.75, marks=pytest.mark.slow),
    ],
)
def test_adversarial_training_is_accurate_and_survives_pgd(
    name: str, clean: float, robust: float, digits: tuple[TrainingData, Tensor, Tensor]
) -> None:
    data, images, labels = digits
    model = fit(name, data)
    assert right(model, images, labels).float().mean().item() >= clean
    assert survives(model, images, labels) >= robust


def test_standard_training_is_accurate_and_breaks(digits: tuple[TrainingData, Tensor, Tensor]) -> None:
    """Without a defense most digits fall: what the others show is their doing."""
    data, images, labels = digits
    model = fit("standard", data)
    assert right(model, images, labels).float().mean().item() >= 0.95
    assert survives(model, images, labels) < 0.5


@pytest.mark.parametrize("name", [pytest.param("ibp", marks=pytest.mark.slow), "crown-ibp"])
def test_certified_training_certifies(name: str, digits: tuple[TrainingData, Tensor, Tensor]) -> None:
    data, images, labels = digits
    model = fit(name, data)
    lower, upper = LINF.outer_box(images)
    with torch.no_grad():
        bounded = BoundedNetwork(model, images[:1], classes=10)
        margins = bounded.margins(labels, lower=lower, upper=upper, method="crown-ibp")
    assert right(model, images, labels).float().mean().item() >= 0.95
    assert (margins > 0).all(dim=1).float().mean().item() >= 0.65


@pytest.mark.slow
def test_pgd_training_meets_its_floor_under_autoattack(digits: tuple[TrainingData, Tensor, Tensor]) -> None:
    """The board's floor: clean >= 0.97 and, under AutoAttack itself, robust >= 0.80."""
    from pyautoattack import AutoAttack

    data, images, labels = digits
    model = fit("pgd-at", data).requires_grad_(False)
    attack = AutoAttack(model, norm="Linf", eps=LINF.radius, seed=0, device="cpu", version="standard")
    found = attack.run_standard_evaluation(images, labels, batch_size=360)[0]
    assert right(model, found, labels).float().mean().item() >= 0.80
