"""Gradient checks: each sees its own kind of broken gradient, counts it right, and is silent on a sound network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.gradient_checks import (
    FiniteGradients,
    face_gradients,
    finite_differences,
    gradient_health,
    input_gradients,
    logit_scale,
)
from robustboard.attacks.losses import margin_loss
from robustboard.errors import ModelError


class Changed(nn.Module):
    """A network with its input and its logits changed."""

    def __init__(self, inner: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.inner = inner
        self._before, self._after = before or (lambda x: x), after or (lambda z: z)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._after(self.inner(self._before(images)))
        return logits


def test_a_sound_network_has_sound_gradients(toy: Any) -> None:
    health = gradient_health(toy.model, toy.images, toy.labels)
    assert (health.zero_margin, health.zero_ce, health.not_finite) == (0.0, 0.0, 0.0)
    faces = face_gradients(toy.model, toy.images, toy.labels)
    assert faces.alive > 1000
    assert faces.dead == 0
    steepest, random = finite_differences(toy.model, toy.images, toy.labels, keys=toy.keys, seed=0)
    assert float(((steepest > 0.1) | (random > 0.1)).double().mean()) < 0.05


def test_dead_gradients_are_counted(toy: Any) -> None:
    """Half the examples are rounded, the other half left alone: exactly that half is dead."""
    half = len(toy.images) // 2

    def rounded(x: Tensor) -> Tensor:
        return torch.cat([(x[:half] * 16).round() / 16, x[half:]])

    health = gradient_health(Changed(toy.model, rounded), toy.images, toy.labels)
    assert health.zero_margin == half / len(toy.images)
    assert health.zero_ce == 0.0, "cross-entropy is not to blame for a gradient that every loss lacks"


def test_large_logits_drown_cross_entropy_alone(toy: Any) -> None:
    loud = Changed(toy.model, after=lambda z: 1000 * z)
    health = gradient_health(loud, toy.images, toy.labels)
    assert health.zero_margin == 0.0
    assert health.zero_ce > 0.9
    quiet, scaled = logit_scale(toy.model, toy.images), logit_scale(loud, toy.images)
    assert scaled.mean_largest == pytest.approx(1000 * quiet.mean_largest, rel=1e-5)
    assert scaled.median_gap == pytest.approx(1000 * quiet.median_gap, rel=1e-5)
    assert scaled.certain > 0.99 > quiet.certain


def test_logit_scale_of_known_logits() -> None:
    logits = torch.tensor([[1.0, -4.0, 0.0], [200.0, 10.0, 0.0]])
    scale = logit_scale(Changed(nn.Identity(), after=lambda z: logits), torch.zeros(2, 3))
    assert scale.mean_largest == (4 + 200) / 2
    assert scale.median_gap in (1.0, 190.0), "torch's median of two is the lower one"
    assert scale.certain == 0.5


def test_a_gradient_that_is_not_a_number_is_counted(toy: Any) -> None:
    broken = Changed(toy.model, lambda x: x + 0 * (x - x).sqrt())
    assert gradient_health(broken, toy.images, toy.labels).not_finite == 1.0


def test_a_clamp_kills_the_faces_and_only_them(toy: Any) -> None:
    clamped = Changed(toy.model, lambda x: x.clamp(0, 1))
    faces = face_gradients(clamped, toy.images, toy.labels)
    assert faces.dead == faces.alive == face_gradients(toy.model, toy.images, toy.labels).alive
    inside = toy.images.clamp(0.01, 0.99)
    assert face_gradients(clamped, inside, toy.labels).alive == 0


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1000.0])
def test_finite_differences_do_not_depend_on_the_logits_scale(toy: Any, scale: float) -> None:
    model = Changed(toy.model, after=lambda z: scale * z)
    steepest, random = finite_differences(model, toy.images, toy.labels, keys=toy.keys, seed=0)
    assert float(((steepest > 0.5) | (random > 0.5)).double().mean()) < 0.02


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z + (z.roll(1, 1) - z.roll(1, 1).detach()) * 3,
        lambda z: z.detach() + 0 * z,
        lambda z: z.detach() - (z - z.detach()),
    ],
    ids=["decoy", "zero", "reversed"],
)
def test_a_false_derivative_departs(toy: Any, after: Any) -> None:
    model = Changed(toy.model, after=after)
    steepest, random = finite_differences(model, toy.images, toy.labels, keys=toy.keys, seed=0)
    assert float(((steepest > 0.5) | (random > 0.5)).double().mean()) > 0.8


def test_a_linear_network_is_exact() -> None:
    """The slope of a linear margin is known: no departure, whatever the direction."""
    layer = nn.Linear(16, 3).eval()
    model = nn.Sequential(nn.Flatten(), layer).eval()
    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    steepest, random = finite_differences(model, images, labels, keys=[str(i) for i in range(8)], seed=0)
    # The margin's second class may change within a step of a thousandth: a kink, on at most a few.
    assert float((steepest > 1e-2).double().mean()) <= 0.25
    assert float((random > 1e-2).double().mean()) <= 0.25


def test_directions_belong_to_the_example(toy: Any) -> None:
    part = toy.part(10)
    all_ten = finite_differences(part.model, part.images, part.labels, keys=part.keys, seed=0)[1]
    one = finite_differences(part.model, part.images[3:4], part.labels[3:4], keys=part.keys[3:4], seed=0)[1]
    assert float(one[0]) == pytest.approx(float(all_ten[3]), abs=1e-3)


def test_the_stand_in_answers_as_the_model_and_gives_zeros(toy: Any) -> None:
    part = toy.part(20)
    for broken in (
        Changed(part.model, lambda x: x.detach()),
        Changed(part.model, lambda x: x + 0 * (x - x).sqrt()),
    ):
        stand_in = FiniteGradients(broken)
        assert not stand_in.training
        with torch.no_grad():
            assert torch.equal(stand_in(part.images), broken(part.images))
        points = part.images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margin_loss(stand_in(points), part.labels).sum(), points)
        assert bool((gradient == 0).all())


def test_the_stand_in_keeps_a_sound_gradient(toy: Any) -> None:
    part = toy.part(20)
    own = input_gradients(part.model, part.images, part.labels, loss=margin_loss)
    shown = input_gradients(FiniteGradients(part.model), part.images, part.labels, loss=margin_loss)
    assert torch.equal(own, shown)


@pytest.mark.parametrize("size", [3e38, torch.nan])
def test_a_logit_scale_is_a_finite_number_or_refused(size: float) -> None:
    """Differences of the largest float32 numbers overflow, and a record holds finite numbers only."""

    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2].sign() * torch.tensor([1.0, -1.0]) * size

    images = torch.ones(3, 1, 2, 2)
    if size > 0:
        scale = logit_scale(Huge(), images)
        assert (scale.mean_largest, scale.median_gap) == (torch.finfo(torch.float32).max,) * 2
    else:
        with pytest.raises(ModelError, match="not finite numbers"):
            logit_scale(Huge(), images)


def test_a_threshold_that_was_learned_is_no_clamp(toy: Any) -> None:
    """FGSM training on MNIST ends in such a network: dead at black, alive a hundred-thousandth further in."""
    learned = Changed(toy.model, lambda x: (x - 5e-6).relu())
    assert face_gradients(learned, toy.images, toy.labels).dead == 0
    black = toy.images == 0
    assert not input_gradients(learned, toy.images, toy.labels, loss=margin_loss)[black].any()
