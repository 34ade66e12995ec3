"""Attack comparisons: what a scale, a dead gradient and an honest network make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.attack_comparisons import RESCALED, compare_losses, single_step, unbounded
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel

THREAT = ThreatModel.parse("linf", "1/10")


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.factor * self.inner(images)
        return logits


class Rounded(Scaled):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner((images * 8).round() / 8)
        return logits


def _losses(model: nn.Module, part: Any) -> dict[str, int]:
    found = compare_losses(
        model, part.images, part.labels, threat=THREAT, keys=part.keys, seed=0, steps=20, step_size=THREAT.radius / 8
    )
    return {name: int(left.sum()) for name, left in found.items()}


def test_only_cross_entropy_is_drowned_by_the_scale(toy: Any) -> None:
    part = toy.part(60)
    plain, loud = _losses(part.model, part), _losses(Scaled(part.model, 1000.0), part)
    assert set(plain) == {"ce", "margin", "dlr", RESCALED}
    assert max(plain.values()) - min(plain.values()) <= 9
    assert loud["ce"] >= 50
    # A power of ten is not exact in float32, so that a single example may differ.
    for name in ("margin", "dlr", RESCALED):
        assert abs(loud[name] - plain[name]) <= 2


def test_losses_follow_pgd(toy: Any) -> None:
    """Each entry is what the attack itself, with that loss alone, leaves standing."""
    part = toy.part(40)
    found = pgd(
        part.model,
        part.images,
        part.labels,
        threat=THREAT,
        keys=part.keys,
        seed=0,
        steps=20,
        restarts=1,
        step_size=THREAT.radius / 8,
        losses=("margin",),
    )
    assert _losses(part.model, part)["margin"] == sum(part.still_correct(found))


def test_two_classes_have_no_dlr(toy_of: Any) -> None:
    assert set(_losses(toy_of[2].model, toy_of[2].part(10))) == {"ce", "margin", RESCALED}


@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/10"), ("l2", "1/2")])
def test_nothing_honest_survives_an_unbounded_attack(toy: Any, norm: str, eps: str) -> None:
    part, threat = toy.part(40), ThreatModel.parse(norm, eps)
    left = unbounded(part.model, part.images, part.labels, threat=threat, keys=part.keys, seed=0, steps=40)
    assert int(left.sum()) == 0


def test_without_a_gradient_the_unbounded_attack_stands_still(toy: Any) -> None:
    part = toy.part(40)
    blind = Rounded(part.model, 1.0)
    left = unbounded(blind, part.images, part.labels, threat=THREAT, keys=part.keys, seed=0, steps=40)
    assert int(left.sum()) >= 35
    assert int(single_step(blind, part.images, part.labels, threat=THREAT).sum()) >= 35
    with torch.no_grad():
        sees = single_step(part.model, part.images, part.labels, threat=THREAT)
    assert int(sees.sum()) <= 25
