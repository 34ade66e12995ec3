"""Ranks of features whose dimensions are known by construction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustboard.defenses.architectures import build
from robustboard.defenses.feature_rank import (
    cross_entropy_margin_bound,
    feature_rank,
    idle_share,
    last_layer,
    penultimate_features,
)
from robustboard.errors import DefenseError


def spread_out(deviations: list[float], mean: list[float], *, count: int = 400) -> Tensor:
    """Features with exactly these deviations along random orthogonal directions, and exactly this mean along them."""
    draws = torch.Generator().manual_seed(0)
    d = len(deviations)
    points = torch.randn(count, d, generator=draws, dtype=torch.float64)
    points -= points.mean(dim=0)
    white = torch.linalg.qr(points).Q * math.sqrt(count)
    directions = torch.linalg.qr(torch.randn(d, d, generator=draws, dtype=torch.float64)).Q
    return (white * torch.tensor(deviations) + torch.tensor(mean)) @ directions.T


def test_components_rank_and_offset_are_those_put_in() -> None:
    """Variances 90, 6, 3.5 and 0.5: two hold 96 %, three 99.5 %; of the mean only the last direction lies outside."""
    features = spread_out([math.sqrt(v) for v in (90, 6, 3.5, 0.5)], [7.0, -3.0, 2.0, 4.0])
    found = feature_rank(features)
    assert (found.dimensions, found.k_95, found.k_99) == (4, 2, 3)
    assert found.stable_rank == pytest.approx(100 / 90)
    assert found.offset == pytest.approx(16.0)


def test_rank_does_not_depend_on_scale_or_position() -> None:
    features = spread_out([3.0, 2.0, 0.1], [0.0, 0.0, 5.0])
    first, moved = feature_rank(features), feature_rank(100 * features + 17)
    assert (first.k_95, first.k_99) == (moved.k_95, moved.k_99)
    assert first.stable_rank == pytest.approx(moved.stable_rank)


def test_features_that_do_not_vary_have_no_rank() -> None:
    found = feature_rank(torch.full((5, 3), 2.0))
    assert (found.k_95, found.k_99, found.stable_rank, found.offset) == (0, 0, 0.0, 12.0)


@pytest.mark.parametrize("features", [torch.empty(0, 4), torch.tensor([[1.0, math.nan]])], ids=["none", "nan"])
def test_what_cannot_be_measured_is_refused_in_a_sentence(features: Tensor) -> None:
    with pytest.raises(DefenseError, match=r"only where there are some, all of them finite\."):
        feature_rank(features)


def test_weight_that_the_features_do_not_use_is_idle() -> None:
    """Of three directions of which two vary, a weight of (3, 4, 5) along them is idle to one half."""
    features = spread_out([3.0, 2.0, 1e-6], [0.0, 0.0, 5.0])
    draws = torch.Generator().manual_seed(0)
    torch.randn(400, 3, generator=draws, dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(3, 3, generator=draws, dtype=torch.float64)).Q
    weight = directions @ torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    assert idle_share(weight, features) == pytest.approx(0.5)
    assert idle_share(100 * weight, 7 * features + 1) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "width"), [("mlp-20-7", 7), ("lenet", 84), ("resnet18", 512)])
def test_penultimate_features_make_the_logits(name: str, width: int) -> None:
    model = build(name, image_shape=(1, 16, 16), classes=3, seed=0).train()
    images = torch.rand(7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    features = penultimate_features(model, images, batch_size=3)
    assert features.shape == (7, width)
    assert model.training
    head = last_layer(model)
    with torch.no_grad():
        torch.testing.assert_close(head(features), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_network_without_a_linear_layer_is_refused_in_a_sentence() -> None:
    with pytest.raises(DefenseError, match="no linear layer"):
        penultimate_features(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), torch.rand(2, 1, 4, 4))


def test_the_bound_falls_with_offset_and_distance_and_never_exceeds_gamma() -> None:
    assert cross_entropy_margin_bound(0.7, bias=0.0, offset=9.0) == pytest.approx(0.7)
    assert cross_entropy_margin_bound(0.7, bias=2.0, offset=0.0) == pytest.approx(0.7)
    bounds = [cross_entropy_margin_bound(0.7, bias=1.0, offset=offset) for offset in (1.0, 4.0, 16.0)]
    assert 0.7 > bounds[0] > bounds[1] > bounds[2]
    # The reference's numbers: gamma .50954, B -.3881 at unit margin of the augmented machine (.44438), Delta = 1 in 8.
    assert cross_entropy_margin_bound(0.50954, bias=-0.3881, offset=8.0) == pytest.approx(0.44470, abs=5e-5)
