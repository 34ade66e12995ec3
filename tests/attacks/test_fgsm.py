from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.fgsm import fgsm
from robustboard.attacks.losses import applicable_losses
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError


class Linear(nn.Module):
    """Two logits, w . x and 0: everything about an attack on it is known in closed form."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weights).flatten(1).sum(dim=1)
        return torch.stack([score, torch.zeros_like(score)], dim=1)


WEIGHTS = torch.tensor([[[0.5, -2.0], [1.0, 0.0]]])


def test_linf_step_is_the_sign_of_the_weights() -> None:
    """On a linear model FGSM is exact: x - eps sign(w), and a pixel without influence stays."""
    images = torch.full((1, 1, 2, 2), 0.5)
    adversarial = fgsm(Linear(WEIGHTS), images, torch.tensor([0]), threat=ThreatModel.parse("linf", "1/4"))
    assert torch.equal(adversarial, images - 0.25 * WEIGHTS.sign())


def test_l2_step_is_the_normalised_gradient() -> None:
    images = torch.full((1, 1, 2, 2), 0.5)
    adversarial = fgsm(Linear(WEIGHTS), images, torch.tensor([0]), threat=ThreatModel.parse("l2", "1/4"))
    assert torch.allclose(adversarial, images - 0.25 * WEIGHTS / WEIGHTS.norm(), atol=1e-6)


def test_l2_step_keeps_its_length_when_the_gradient_nearly_vanishes() -> None:
    """Gradients of 1e-30 have squares of zero; a step that shrank with them would pass for robustness."""
    images = torch.full((1, 1, 2, 2), 0.5)
    threat = ThreatModel.parse("l2", "1/4")
    adversarial = fgsm(Linear(WEIGHTS * 1e-30), images, torch.tensor([0]), threat=threat)
    assert threat.distance(adversarial, images).item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("classes", "loss"), [(classes, loss) for classes in (2, 3, 10) for loss in applicable_losses(classes)]
)
def test_it_hurts_and_stays_inside(toy: Any, toy_of: Any, norm: str, classes: int, loss: str) -> None:
    """Every loss and norm, two classes included: accuracy falls and nothing leaves the ball."""
    net = toy if classes == 10 else toy_of[classes]
    threat = ThreatModel.parse(norm, "1/5" if norm == "linf" else "3/2")
    adversarial = fgsm(net.model, net.images, net.labels, threat=threat, loss=loss)
    assert threat.contains(adversarial, net.images).all()
    assert sum(net.still_correct(adversarial)) < 0.8 * len(net.labels)


def test_parameters_get_no_gradient(toy: Any) -> None:
    """An attack inside a training step must not add to the step's own gradients."""
    fgsm(toy.model, toy.images, toy.labels, threat=ThreatModel.parse("linf", "1/10"))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.model.parameters())


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(TrackError, match="ce, margin, dlr"):
        fgsm(
            Linear(WEIGHTS),
            torch.zeros(1, 1, 2, 2),
            torch.tensor([0]),
            threat=ThreatModel.parse("linf", "1/4"),
            loss="hinge",
        )


@pytest.mark.parametrize("weights", [WEIGHTS * torch.nan, WEIGHTS * 3e38])
def test_gradients_that_are_no_numbers_are_refused(weights: Tensor) -> None:
    with pytest.raises(ModelError, match="input gradients are not finite"):
        fgsm(
            Linear(weights),
            torch.ones(1, 1, 2, 2),
            torch.tensor([0]),
            threat=ThreatModel.parse("linf", "1/4"),
        )
