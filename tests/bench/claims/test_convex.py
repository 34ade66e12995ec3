"""The rules of convex training's claims give each verdict they can, and the small problems are measured as they say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from robustboard.attacks.quadratic import QuadraticNetwork
from robustboard.bench.claims.breast_cancer import UnitBox, folds, margins, survives_linf
from robustboard.bench.claims.claim import Measurement, PaperClaim
from robustboard.bench.claims.convex import CLAIMS
from robustboard.bench.claims.convex_small_problems import RADIUS, factored_optimum, network_of, trained
from robustboard.defenses import registry

BY_ID: Mapping[str, PaperClaim] = {claim.id: claim for claim in CLAIMS}


def interval(low: float, high: float) -> Measurement:
    return Measurement("difference", (low + high) / 2, 100, low, high, "points")


def single(value: float) -> Measurement:
    return Measurement("number", value, 100, value, value, "number")


def test_every_claim_is_about_a_registered_defense() -> None:
    assert len(BY_ID) == len(CLAIMS) == 8
    assert {claim.defense for claim in CLAIMS} == {"convex"}
    assert "convex" in registry.names()
    assert all(claim.id.startswith("convex-") and claim.paper and claim.rule.endswith(".") for claim in CLAIMS)


UP, SMALL, NONE, DOWN = (6.0, 12.0), (1.0, 4.0), (-1.0, 12.0), (-9.0, -2.0)


@pytest.mark.parametrize(
    ("linf", "l2", "verdict"),
    [
        (UP, UP, "reproduced"),
        (UP, SMALL, "reproduced"),
        (SMALL, UP, "not reproduced"),
        (NONE, UP, "not reproduced"),
        (UP, NONE, "broken under the protocol"),
    ],
)
def test_breast_cancer(linf, l2, verdict) -> None:
    found = {"gain linf": interval(*linf), "gain l2": interval(*l2)}
    assert BY_ID["convex-breast-cancer"].judge(found) == verdict


@pytest.mark.parametrize(
    ("gain", "protocol", "verdict"),
    [
        (SMALL, SMALL, "reproduced"),
        (NONE, SMALL, "not reproduced"),
        (SMALL, NONE, "broken under the protocol"),
        (DOWN, DOWN, "not reproduced"),
    ],
)
def test_digits(gain, protocol, verdict) -> None:
    found = {"gain": interval(*gain), "protocol gain": interval(*protocol)}
    assert BY_ID["convex-digits"].judge(found) == verdict


@pytest.mark.parametrize(
    ("network", "least", "largest", "verdict"),
    [
        (1.0, 1.001, 1.019, "reproduced"),
        (1.002, 1.001, 1.01, "not reproduced"),
        (1.0, 0.99, 1.01, "not reproduced"),
        (1.0, 1.001, 1.03, "not reproduced"),
    ],
)
def test_global_optimum(network, least, largest, verdict) -> None:
    found = {"network": single(network), "least": single(least), "largest": single(largest)}
    assert BY_ID["convex-global-optimum"].judge(found) == verdict


@pytest.mark.parametrize(("gap", "verdict"), [(1e-4, "reproduced"), (1e-2, "not reproduced")])
def test_boundary_distance(gap, verdict) -> None:
    assert BY_ID["convex-boundary-distance"].judge({"gap": single(gap)}) == verdict


@pytest.mark.parametrize(
    ("identity", "clean", "robust"),
    [("convex-radius", "clean loss", "robust gain"), ("convex-beta", "clean gain", "robust loss")],
)
def test_trade_offs_need_both_sides(identity, clean, robust) -> None:
    for first, second, verdict in (
        (SMALL, SMALL, "reproduced"),
        (NONE, SMALL, "not reproduced"),
        (SMALL, DOWN, "not reproduced"),
    ):
        assert BY_ID[identity].judge({clean: interval(*first), robust: interval(*second)}) == verdict


@pytest.mark.parametrize(
    ("ratio", "gain", "verdict"),
    [(0.5, NONE, "reproduced"), (2.0, NONE, "not reproduced"), (0.5, DOWN, "not reproduced")],
)
def test_cost(ratio, gain, verdict) -> None:
    assert BY_ID["convex-cost"].judge({"ratio": single(ratio), "gain": interval(*gain)}) == verdict


@pytest.mark.parametrize(
    ("gain", "robust", "verdict"),
    [
        (NONE, 0.3, "not transferred"),
        (SMALL, 0.0, "broken under the protocol"),
        (SMALL, 0.06, "reproduced"),
    ],
)
def test_frozen_head(gain, robust, verdict) -> None:
    found = {"gain": interval(*gain), "convex robust": single(robust)}
    assert BY_ID["convex-frozen-head"].judge(found) == verdict


def test_folds_test_every_example_once_and_never_train_on_it() -> None:
    parts = folds(examples=40, components=3)
    assert sum(len(part.test) for part in parts) == 569
    for part in parts:
        assert part.train.shape == (40, 3)
        np.testing.assert_allclose(part.train.mean(axis=0), 0, atol=1e-9)
        gaps = np.abs(part.train[:, None] - part.test[None]).max(axis=2)
        assert gaps.min() > 0


def test_features_as_images_keep_the_network_and_its_balls() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    draws = torch.Generator().manual_seed(0)
    shape = {"generator": draws, "dtype": torch.float64}
    network = QuadraticNetwork(
        torch.randn(4, 3, **shape), torch.randn(4, 2, **shape), offsets=torch.randn(4, **shape)
    ).requires_grad_(requires_grad=False)
    unit = UnitBox(x, reach=0.5)
    images = unit.images(x)
    torch.testing.assert_close(
        unit.network(network)(images).double(), network(torch.from_numpy(x)), rtol=1e-3, atol=1e-3
    )
    step = (unit.images(x + np.array([0.5, 0.0, 0.0])) - images).norm(dim=-1).max().item()
    assert float(unit.threat("l2", 0.5).eps) == pytest.approx(step, rel=1e-3)
    assert bool(((unit.images(x - 0.5) > 0) & (unit.images(x + 0.5) < 1)).all())


def test_what_withstands_the_ball_withstands_pgd_in_the_box_inside() -> None:
    (fold,) = folds(examples=30, components=4, count=1)
    network = network_of(trained(fold, RADIUS))
    exact = margins(network, fold.test, fold.test_labels, radius=0.6) > 0
    left = survives_linf(network, fold.test, fold.test_labels, eps=0.3, seed=0, steps=20, restarts=1).numpy()
    assert 0 < exact.sum() <= left.sum() < len(left)
    assert not bool((exact & ~left).any())


def test_no_start_falls_below_the_program() -> None:
    (fold,) = folds(examples=20, components=2, count=1)
    optimum = trained(fold, RADIUS).objective
    reached = factored_optimum(fold, radius=RADIUS, width=6, seed=0, steps=50)
    assert reached > optimum
