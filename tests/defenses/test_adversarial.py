"""Adversarial training on a radius that grows: clean at first, the track's own radius after the ramp."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Split, TrainingData
from robustboard.defenses.adversarial import AdversarialHyper, FgsmTraining, PgdTraining, Trades, grown
from robustboard.defenses.architectures import build
from robustboard.defenses.batches import Batch
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "3/10")
METHODS = [FgsmTraining, PgdTraining, Trades]


def batch(done: float) -> Batch:
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6) % 3, done, generator("draws"))


def data() -> TrainingData:
    some = batch(0.0)
    return TrainingData("tiny", Split(some.images, some.labels), Split(some.images, some.labels), 3)


def network() -> nn.Sequential:
    return build("mlp-9", image_shape=(1, 4, 4), classes=3, seed=0)


def loss(method: type[Any], done: float, threat: ThreatModel = LINF, **changes: float) -> float:
    model, defense = network(), method()
    hyper = dataclasses.replace(defense.hyper(data(), LINF), **changes)
    return float(defense.objective(model, hyper, data(), threat)(batch(done)).detach())


@pytest.mark.parametrize("method", METHODS)
def test_a_ramp_begins_with_clean_images(method: type[Any]) -> None:
    some = batch(0.0)
    clean = functional.cross_entropy(network()(some.images), some.labels).item()
    assert loss(method, 0.0, ramp=0.5) == clean


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", [0.5, 0.7, 0.99])
def test_after_the_ramp_it_is_training_at_the_full_radius(method: type[Any], done: float) -> None:
    assert loss(method, done, ramp=0.5) == loss(method, 0.0, ramp=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_half_way_up_it_is_training_at_half_the_radius_with_half_the_step(method: type[Any]) -> None:
    half = {"step_size": method().hyper(data(), LINF).step_size / 2} if method is not FgsmTraining else {}
    smaller = loss(method, 0.0, LINF.scaled(Fraction(1, 2)), ramp=0.0, **half)
    assert loss(method, 0.25, ramp=0.5) == pytest.approx(smaller, rel=1e-5)
    assert smaller < loss(method, 0.9, ramp=0.5)


def test_the_grown_ball_holds_what_it_says() -> None:
    """A tenth of the ramp in floating point still is a ball of positive exact radius, inside the track's."""
    assert grown(LINF, 1.0) is LINF
    for growth in (1e-9, 0.1, 1 / 3, 0.999999):
        ball = grown(LINF, growth)
        assert 0 < ball.eps < LINF.eps
        assert float(ball.eps) == pytest.approx(growth * 0.3, rel=1e-12)


@pytest.mark.parametrize("ramp", [-0.1, 1.1])
def test_a_ramp_is_a_share_of_the_training(ramp: float) -> None:
    with pytest.raises(ValueError, match="share of the training"):
        AdversarialHyper(architecture="mlp-9", epochs=1, ramp=ramp)
    with pytest.raises(DefenseError, match="pgd-at: ramp must be a share of the training"):
        PgdTraining({"ramp": ramp}).hyper(data(), LINF)
