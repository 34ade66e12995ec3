"""The binarization test: solved on an honest network, failed where the attack is blind, and keyed by example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks import binarization as module
from robustboard.attacks.binarization import binarization_test
from robustboard.attacks.threat import ThreatModel


class Quantised(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner((images * 8).round() / 8)
        return logits


def _test(model: nn.Module, part: Any, *, norm: str = "linf", eps: str = "1/10") -> module.Binarization:
    threat = ThreatModel.parse(norm, eps)
    return binarization_test(
        model,
        part.images,
        threat=threat,
        keys=part.keys,
        seed=0,
        steps=20,
        restarts=2,
        step_size=threat.radius / 5,
    )


@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/10"), ("l2", "1/2")])
def test_an_attack_that_sees_solves_what_has_a_solution(toy: Any, norm: str, eps: str) -> None:
    found = _test(toy.model, toy.part(30), norm=norm, eps=eps)
    assert int(found.built.sum()) >= 28
    assert int((found.built & found.found).sum()) == int(found.built.sum())
    assert int((found.built & found.random).sum()) <= 10, "random points must not solve most tasks"


def test_a_blind_attack_fails(toy: Any) -> None:
    found = _test(Quantised(toy.model), toy.part(30))
    assert int(found.built.sum()) >= 28
    assert int((found.built & found.found).sum()) <= 3


def test_an_answer_that_never_changes_is_no_task(toy: Any) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.zeros(len(images), 10) + 0 * images.flatten(1).sum(1, keepdim=True)

    assert int(_test(Constant().eval(), toy.part(5)).built.sum()) == 0


def test_tasks_belong_to_examples(toy: Any) -> None:
    part = toy.part(12)
    everything = _test(Quantised(part.model), part)
    for place in (2, 7):
        alone = type(part)(
            part.model, part.images[place : place + 1], part.labels, part.keys[place : place + 1], part.classes
        )
        one = _test(Quantised(part.model), alone)
        for name in ("built", "found", "random"):
            assert bool(getattr(one, name)[0]) == bool(getattr(everything, name)[place])


def test_points_lie_where_they_should(toy: Any) -> None:
    """Surface points use the whole radius wherever the box allows it; inner points stay 5 % within."""
    image = toy.images[:1].clamp(0.4, 0.6)
    for norm, eps in (("linf", "1/10"), ("l2", "1/2")):
        threat = ThreatModel.parse(norm, eps)
        draws = torch.Generator().manual_seed(0)
        surface = module._points(image, threat, 20, draws, surface=True)
        inner = module._points(image, threat, 20, draws, surface=False)
        assert bool(threat.contains(surface, image.expand_as(surface)).all())
        assert threat.distance(surface, image.expand_as(surface)).min() >= 0.999 * threat.radius
        assert threat.distance(inner, image.expand_as(inner)).max() <= 0.951 * threat.radius
