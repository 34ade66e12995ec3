"""The factored form: exact worst cases against brute force, Danskin's gradient, and the convex program's optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from robustboard.attacks.quadratic import margin_forms
from robustboard.attacks.trust_region import minimum
from robustboard.defenses.burer_monteiro import UnitNeurons, hinge_loss, squared_loss
from robustboard.defenses.convex_features import FeatureMap, fitted
from robustboard.defenses.convex_programs import Ball, solve
from robustboard.defenses.worst_margins import one_against_rest, pairs_of

RADIUS = 0.3


def plain(dimension: int) -> FeatureMap:
    return FeatureMap(torch.zeros(dimension, dtype=torch.float64), 1.0)


def neurons(classes: int, *, width: int = 7, scale: float = 3.0, features: FeatureMap | None = None) -> UnitNeurons:
    """A random network in float64; with a large scale its margins are curved and of both signs."""
    draws = torch.Generator().manual_seed(0)
    model = UnitNeurons(features or plain(5), width=width, classes=classes, draws=draws)
    with torch.no_grad():
        model.outputs.mul_(scale * width)
    return model


def batch(classes: int, count: int = 30) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, generator=draws, dtype=torch.float64), torch.arange(count) % classes


def exact_margins(model: UnitNeurons, x: Tensor, radius: float) -> dict[tuple[int, int], Tensor]:
    """The worst margin of every ordered pair at every input, each with a form of its own."""
    pairs = list(itertools.permutations(range(model.classes), 2))
    with torch.no_grad():
        forms = margin_forms(model.deployed(), torch.tensor(pairs))
        found = minimum(forms.curvatures.unsqueeze(1), forms.slopes(x), radius)
        return dict(zip(pairs, forms.values(x) + found.value, strict=True))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0], ids=["flat", "curved", "very curved"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_pairwise_hinge_is_the_worst_pair_at_its_worst_point(classes: int, scale: float) -> None:
    """The bounds that spare most trust regions never spare the one that counts."""
    model, (x, labels) = neurons(classes, scale=scale), batch(classes)
    table = exact_margins(model, x, RADIUS)
    expected = torch.stack(
        [
            max((1 - table[label, k][n]).clamp(min=0) for k in range(classes) if k != label)
            for n, label in enumerate(labels.tolist())
        ]
    ).mean()
    comparisons = pairs_of(labels, classes, x)
    loss = hinge_loss(model, x, comparisons, radius=RADIUS, worst_only=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def of_one_output(model: UnitNeurons, output: int) -> UnitNeurons:
    """The binary network of a single output."""
    alone = neurons(2)
    with torch.no_grad():
        alone.directions.copy_(model.directions)
        alone.outputs.copy_(model.outputs[:, [output]])
    return alone


def test_one_vs_all_losses_are_sums_over_outputs() -> None:
    """Hinge and squared, against trust regions of one output at a time."""
    model, (x, labels) = neurons(3), batch(3)
    hinge, squared = torch.zeros(()), torch.zeros(())
    for output in range(3):
        table = exact_margins(of_one_output(model, output), x, RADIUS)
        least, greatest = table[1, 0], -table[0, 1]
        own = labels == output
        hinge = hinge + (1 - torch.where(own, least, -greatest)).clamp(min=0).mean()
        target = torch.where(own, 1.0, -1.0)
        squared = squared + torch.maximum(target - least, greatest - target).square().mean()
    comparisons = one_against_rest(labels, 3, x)
    found = hinge_loss(model, x, comparisons, radius=RADIUS, worst_only=False)
    assert found.item() == pytest.approx(hinge.item(), rel=1e-9)
    assert squared_loss(model, x, comparisons, radius=RADIUS).item() == pytest.approx(squared.item(), rel=1e-9)


@pytest.mark.parametrize("squared", [False, True], ids=["hinge", "squared"])
def test_danskin_s_gradient_is_that_of_the_robust_loss(squared: bool) -> None:
    """Against central differences of the loss itself, whose worst points move with the weights."""
    model, (x, labels) = neurons(3, scale=1.0), batch(3, count=5)
    comparisons = one_against_rest(labels, 3, x) if squared else pairs_of(labels, 3, x)

    def loss() -> Tensor:
        if squared:
            return squared_loss(model, x, comparisons, radius=RADIUS)
        return hinge_loss(model, x, comparisons, radius=RADIUS, worst_only=True)

    gradients = torch.autograd.grad(loss(), [model.directions, model.outputs])
    for parameter, gradient in zip((model.directions, model.outputs), gradients, strict=True):
        flat, slopes = parameter.data.view(-1), gradient.flatten()
        for place in range(0, len(flat), 4):
            before, step = flat[place].item(), 1e-6
            values = []
            for moved in (before + step, before - step):
                flat[place] = moved
                values.append(loss().item())
            flat[place] = before
            assert slopes[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-6)


def test_worst_points_lie_in_the_ball_and_between_the_bounds() -> None:
    model, (x, labels) = neurons(4, width=3), batch(4)
    comparisons = pairs_of(labels, 4, x)
    margins = model.worst_margins(x, comparisons, RADIUS)
    example, number = torch.ones_like(comparisons.rows).nonzero(as_tuple=True)
    points, worst = margins.worst(example, number)
    assert points.shape == (30 * 3, 3)  # the span of three directions
    assert bool((points.norm(dim=1) <= RADIUS * (1 + 1e-9)).all())
    assert bool((margins.lower[example, number] <= worst + 1e-9).all())
    assert bool((worst <= margins.upper[example, number] + 1e-9).all())
    with torch.no_grad():
        torch.testing.assert_close(margins.at(example, number, points), worst)


def test_without_a_radius_the_loss_is_the_clean_one() -> None:
    model, (x, labels) = neurons(3), batch(3)
    logits = model(x)
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    expected = (1 - own[:, 0] + others).clamp(min=0).mean()
    found = hinge_loss(model, x, pairs_of(labels, 3, x), radius=0.0, worst_only=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("components", [None, 3], ids=["all coordinates", "principal components"])
def test_a_ball_of_pixels_is_a_ball_of_features(classes: int, components: int | None) -> None:
    """Folded into the pixels, the network has the same logits and the same worst case over the pixels' ball."""
    x, labels = batch(classes)
    features = fitted(x, norm=2.0, components=components)
    model = neurons(classes, features=features)
    with torch.no_grad():
        torch.testing.assert_close(model.deployed()(x), model(x))
        least = exact_margins(model, x, RADIUS)
        margins = model.worst_margins(x, pairs_of(labels, classes, x), RADIUS / float(features.scale))
        _, worst = margins.worst(torch.arange(len(x)), torch.zeros(len(x), dtype=torch.long))
    rivals = [1 if label == 0 else 0 for label in labels.tolist()]
    expected = torch.stack(
        [least[label, k][n] for n, (label, k) in enumerate(zip(labels.tolist(), rivals, strict=True))]
    )
    torch.testing.assert_close(worst, expected)


def test_features_have_the_norm_or_the_deviation_that_is_asked_for() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 2, 2, 2, 0, 0]) + 1
    assert fitted(x, norm=3.0, components=2)(x).square().sum(dim=1).mean().sqrt().item() == pytest.approx(3.0, rel=1e-5)
    deviations = fitted(x)(x).std(dim=0)
    assert deviations[:4].mean().item() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(fitted(x, components=6)(x), fitted(x)(x))
    assert fitted(torch.ones(3, 2))(torch.ones(3, 2)).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("classes", [2, 3])
def test_every_start_reaches_the_program_s_optimum(classes: int) -> None:
    """Within 2 %, by 400 steps of Adam, and never below: the program's value is the global optimum."""
    draws = np.random.default_rng(0)
    x = draws.normal(size=(20, 3)) / 1.7
    score = 8 * x[:, 0] * x[:, 1] + x[:, 2]
    labels = np.digitize(score, [0.0] if classes == 2 else [-0.5, 0.5]).astype(np.int64)
    beta, radius = 3e-2, 0.1
    optimum = solve(x, labels, classes=classes, beta=beta, ball=Ball("l2", radius)).objective
    inputs, comparisons = torch.from_numpy(x), pairs_of(torch.from_numpy(labels), classes, torch.from_numpy(x))
    for seed in range(3):
        model = UnitNeurons(plain(3), width=16, classes=classes, draws=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        reached = torch.inf
        for _ in range(400):
            loss = hinge_loss(model, inputs, comparisons, radius=radius, worst_only=True) + beta * model.size()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            reached = min(reached, loss.item())
        assert optimum - 1e-6 <= reached <= 1.02 * optimum
