"""The gated convex form of ReLU networks: exact where its constraints hold, and the ReLU network that it stands for."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.threat import Norm, ThreatModel
from robustboard.defenses.convex_features import FeatureMap, fitted
from robustboard.defenses.convex_programs import Ball, Loss, MultiClass
from robustboard.defenses.convex_relu import GatedNetwork, drawn_gates, robust_loss
from robustboard.defenses.convex_relu_program import GatedSolution, solve_gated
from robustboard.defenses.worst_margins import one_against_rest, pairs_of
from robustboard.errors import DefenseError

RADIUS, BETA = 0.03, 1e-3


def problem(classes: int, count: int = 20) -> tuple[Tensor, Tensor]:
    draws = np.random.default_rng(0)
    x = draws.normal(size=(count, 3))
    score = x[:, 0] + x[:, 1] ** 2
    labels = np.digitize(score, [0.7] if classes == 2 else [0.3, 1.2])
    return torch.from_numpy(x), torch.from_numpy(labels)


def gates_of(x: Tensor, count: int = 8) -> Tensor:
    return drawn_gates(x, count, torch.Generator().manual_seed(0))


def gated(solution: GatedSolution, gates: Tensor, classes: int) -> GatedNetwork:
    model = GatedNetwork(FeatureMap(torch.zeros(gates.shape[1], dtype=torch.float64), 1.0), gates, classes=classes)
    with torch.no_grad():
        model.positive.copy_(torch.from_numpy(solution.positive))
        model.negative.copy_(torch.from_numpy(solution.negative))
    return model


CASES: list[tuple[int, MultiClass, Loss, Norm]] = [
    (2, "pairwise", "hinge", "linf"),
    (2, "one-vs-all", "squared", "l2"),
    (3, "pairwise", "hinge", "l2"),
    (3, "one-vs-all", "hinge", "linf"),
]


@pytest.mark.parametrize(("classes", "multi_class", "loss", "norm"), CASES)
def test_the_program_minimises_the_robust_loss_under_its_constraints(
    classes: int, multi_class: MultiClass, loss: Loss, norm: Norm
) -> None:
    """Its value is the loss that the penalty form computes, no constraint fails, and the gated net is the ReLU net."""
    x, labels = problem(classes)
    gates = gates_of(x)
    solution = solve_gated(
        x.numpy(), labels.numpy(), gates.numpy(), classes=classes, beta=BETA, ball=Ball(norm, RADIUS),
        multi_class=multi_class, loss=loss,
    )  # fmt: skip
    model = gated(solution, gates, classes)
    comparisons = (pairs_of if multi_class == "pairwise" else one_against_rest)(labels, classes, x)
    with torch.no_grad():
        worst = robust_loss(model, x, comparisons, norm=norm, radius=RADIUS, squared=loss == "squared")
        assert solution.objective == pytest.approx((worst + BETA * model.size()).item(), abs=1e-6)
        assert model.violation(x, norm=norm, radius=RADIUS).item() < 1e-6
        network = model.deployed()
        torch.testing.assert_close(network(x), model(x), atol=1e-3, rtol=0)
        # Gates stay as they are over the whole ball, the ReLU network's own ones.
        draws = torch.Generator().manual_seed(1)
        steps = torch.rand(20, *x.shape, generator=draws, dtype=x.dtype) * 2 - 1
        steps = steps if norm == "linf" else steps / steps.norm(dim=-1, keepdim=True)
        features = torch.einsum("noq,snq->sno", model.effective(x), x + RADIUS * steps)
        expected = torch.cat([-features / 2, features / 2], dim=-1) if classes == 2 else features
        torch.testing.assert_close(
            network((x + RADIUS * steps).flatten(0, 1)), expected.flatten(0, 1), atol=1e-3, rtol=0
        )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_robust_hinge_is_the_exact_worst_case_of_the_relu_network(norm: Norm) -> None:
    """The worst step reaches the program's loss, and no point of the ball goes below it."""
    x, labels = problem(2)
    gates = gates_of(x)
    solution = solve_gated(x.numpy(), labels.numpy(), gates.numpy(), classes=2, beta=BETA, ball=Ball(norm, RADIUS))
    model = gated(solution, gates, 2)
    network = model.deployed()
    with torch.no_grad():
        claimed = robust_loss(model, x, pairs_of(labels, 2, x), norm=norm, radius=RADIUS).item()
        signs = torch.where(labels == 1, 1.0, -1.0).double()
        direction = model.effective(x)[:, 0] * signs[:, None]
        step = direction.sign() if norm == "linf" else direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
        corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=x.dtype)
        corners = corners if norm == "linf" else corners / 3**0.5

        def loss(points: Tensor) -> float:
            logits = network(points)
            return (1 - signs * (logits[:, 1] - logits[:, 0])).clamp(min=0).mean().item()

        assert loss(x - RADIUS * step) == pytest.approx(claimed, abs=1e-4)
        assert all(loss(x + RADIUS * corner) <= claimed + 1e-4 for corner in corners)


def test_the_regulariser_is_half_of_the_squared_weights() -> None:
    """The weight decay of the ReLU network, which is what makes the gated program its convex form."""
    x, _ = problem(3)
    gates = gates_of(x)
    model = GatedNetwork(FeatureMap(torch.zeros(3, dtype=torch.float64), 1.0), gates, classes=3)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.positive.copy_(torch.randn(model.positive.shape, generator=draws))
        model.negative.copy_(torch.randn(model.negative.shape, generator=draws))
        network = model.deployed()
        first, last = network[1], network[3]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        decay = (first.weight.square().sum() + last.weight.square().sum()) / 2
    assert model.size().item() == pytest.approx(decay.item(), rel=1e-9)
    assert bool((first.bias == 0).all())


def test_the_penalty_form_approaches_the_program_from_below() -> None:
    """The heavier the penalty, the less is violated, and the penalised optimum rises towards the program's value."""
    x, labels = problem(2)
    gates = gates_of(x)
    optimum = solve_gated(
        x.numpy(), labels.numpy(), gates.numpy(), classes=2, beta=1e-2, ball=Ball("linf", RADIUS)
    ).objective
    comparisons = pairs_of(labels, 2, x)
    violations, totals = [], []
    for penalty in (0.3, 1.0, 3.0):
        model = GatedNetwork(FeatureMap(torch.zeros(3, dtype=torch.float64), 1.0), gates, classes=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
        total = violation = torch.zeros(())
        for _ in range(600):
            worst = robust_loss(model, x, comparisons, norm="linf", radius=RADIUS) + 1e-2 * model.size()
            violation = model.violation(x, norm="linf", radius=RADIUS)
            total = worst + penalty * violation
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        violations.append(violation.item())
        totals.append(total.item())
    assert violations[0] > violations[1] > violations[2]
    assert totals[0] < totals[1] < totals[2]
    assert totals[2] == pytest.approx(optimum, rel=0.1)


def test_the_feature_map_is_folded_into_the_relu_network() -> None:
    images = torch.rand(12, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    features = fitted(images, components=3)
    x = features(images)
    model = GatedNetwork(features, gates_of(x), classes=3)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.positive.copy_(torch.randn(model.positive.shape, generator=draws))
        vectors = model.positive.transpose(1, 2).flatten(0, 1)
        owners = torch.arange(len(vectors)) % 3
        expected = torch.stack([(x @ vectors[owners == k].T).relu().sum(dim=1) for k in range(3)], dim=1)
        torch.testing.assert_close(model.deployed()(images), expected, atol=1e-5, rtol=1e-5)


def test_gates_differ_in_their_patterns() -> None:
    """On one line through the origin there are two patterns, and of four draws only they are left."""
    x = torch.linspace(-1, 1, 4).unsqueeze(1)
    gates = drawn_gates(x, 20, torch.Generator().manual_seed(0))
    assert sorted(gates.sign().flatten().tolist()) == [-1.0, 1.0]


def test_pairs_have_no_squared_loss() -> None:
    x, labels = problem(3)
    with pytest.raises(DefenseError, match="goes with one-vs-all"):
        solve_gated(
            x.numpy(), labels.numpy(), gates_of(x).numpy(), classes=3, beta=BETA, ball=Ball("l2", 0.1), loss="squared"
        )


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
def test_the_deployed_network_has_interval_and_linear_bounds() -> None:
    """auto_LiRPA bounds it, and no point of the box goes below."""
    from robustboard.attacks.bounds import certify

    images = torch.rand(12, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    features = fitted(images)
    model = GatedNetwork(features, gates_of(features(images)), classes=3)
    with torch.no_grad():
        model.positive.copy_(0.1 * torch.randn(model.positive.shape, generator=torch.Generator().manual_seed(1)))
    network = model.deployed().eval().requires_grad_(requires_grad=False)
    labels, threat = network(images).argmax(dim=1), ThreatModel.parse("linf", "1/50")
    draws = torch.Generator().manual_seed(2)
    points = threat.project(images + 0.02 * torch.randn(50, *images.shape, generator=draws).sign(), images)
    logits = network(points.flatten(0, 1)).view(50, 12, 3)
    reached = (logits.gather(2, labels.expand(50, -1)[..., None]) - logits).amin(dim=0)
    for method in ("ibp", "crown"):
        bounds = certify(network, images, labels, threat=threat, method=method, classes=3)
        assert bounds.reason is None
        others = torch.arange(3) != labels[:, None]
        assert bool((bounds.margins[others] <= reached[others] + 1e-5).all())
        assert bool(bounds.certified.any())
