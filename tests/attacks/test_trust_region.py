"""The trust-region minimum is the minimum: against a grid, the S-procedure's LMI, optimality conditions, hard cases."""

from __future__ import annotations

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from torch import Tensor

from robustboard.attacks.trust_region import TrustRegion, minimum

NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-12, -1e-9]), st.floats(-10, 10))
RADII = st.one_of(st.sampled_from([0.0, 1e-150, 1e-3, 1.0]), st.floats(1e-150, 20))


def vectors(count: int) -> st.SearchStrategy[Tensor]:
    return hnp.arrays(np.float64, count, elements=NUMBERS).map(torch.from_numpy)


def quadratic(curvatures: Tensor, slopes: Tensor, points: Tensor) -> Tensor:
    return (curvatures * points.square() + slopes * points).sum(-1)


def size(curvatures: Tensor, slopes: Tensor, radius: float) -> float:
    """What the terms on the sphere amount to, which float error is relative to, above the denormal numbers."""
    return float(curvatures.abs().amax()) * radius**2 + float(slopes.abs().sum()) * radius + 1e-290


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(curvatures=vectors(2), slopes=vectors(2), radius=RADII)
def test_no_point_of_a_fine_grid_is_lower_in_two_dimensions(curvatures: Tensor, slopes: Tensor, radius: float) -> None:
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    lengths = radius * torch.linspace(0, 1, 61, dtype=torch.float64)
    grid = lengths[:, None, None] * torch.stack([angles.cos(), angles.sin()], dim=1)
    lowest = float(quadratic(curvatures, slopes, grid).amin())
    found = minimum(curvatures, slopes, radius)
    scale = size(curvatures, slopes, radius)
    assert found.bound <= lowest + 1e-14 * scale
    assert found.value >= lowest - 0.03 * scale, "the grid is finer than this"
    assert found.point.norm() <= radius * (1 + 1e-15)


@settings(max_examples=300, deadline=None)
@given(curvatures=vectors(4), slopes=vectors(4), radius=RADII)
def test_bound_and_value_meet_whatever_the_problem(curvatures: Tensor, slopes: Tensor, radius: float) -> None:
    """Ties, zeros, hard cases and nearly hard ones: the dual value is never above a value that a point has."""
    found = minimum(curvatures, slopes, radius)
    scale = size(curvatures, slopes, radius)
    assert found.bound <= found.value
    assert found.value - found.bound <= 1e-13 * scale
    torch.testing.assert_close(quadratic(curvatures, slopes, found.point), found.value, rtol=0, atol=1e-15 * scale)


@pytest.mark.parametrize("rank", [1, 3, 30, 300])
def test_the_optimality_conditions_of_more_and_sorensen_hold(rank: int) -> None:
    """(e + lambda) t = -g / 2 with e + lambda >= 0, lambda >= 0 and lambda (radius - |t|) = 0."""
    curvatures, slopes, radius = drawn(200, rank), drawn(200, rank, seed=1), 1.5
    point = minimum(curvatures, slopes, radius).point
    multipliers = -slopes / (2 * point) - curvatures
    chosen = multipliers.gather(1, point.abs().argmax(dim=1, keepdim=True))
    torch.testing.assert_close((curvatures + chosen) * point, -slopes / 2, rtol=1e-6, atol=1e-6)
    assert bool((chosen >= -1e-9).all())
    assert bool((curvatures.amin(1, keepdim=True) + chosen >= -1e-9).all())
    slack = radius - torch.linalg.vector_norm(point, dim=1)
    assert float((chosen.squeeze(1) * slack).abs().amax()) <= 1e-9
    assert bool((slack >= -1e-15).all())


def test_local_searches_of_scipy_find_nothing_lower() -> None:
    generator = np.random.default_rng(0)
    for _ in range(12):
        e, g, radius = generator.normal(size=5), generator.normal(size=5), generator.uniform(0.2, 3)
        found = minimum(torch.from_numpy(e), torch.from_numpy(g), radius)
        ends = [
            minimize(
                lambda t, e=e, g=g: float(e @ t**2 + g @ t),
                generator.normal(size=5) * radius / 3,
                jac=lambda t, e=e, g=g: 2 * e * t + g,
                constraints={"type": "ineq", "fun": lambda t, r=radius: r**2 - t @ t, "jac": lambda t: -2 * t},
            ).fun
            for _ in range(6)
        ]
        assert found.bound.item() <= min(ends) + 1e-5, "scipy may leave the ball by some 1e-7"
        assert found.value.item() == pytest.approx(min(ends), abs=1e-4)


def test_the_margin_of_the_s_procedure_is_the_minimum() -> None:
    """The LMI of Kuelbs et al. 2024: the largest w with [[lambda I + F, g/2], [g^T/2, -w - lambda r^2]] >= 0."""
    for seed in range(5):
        factor, slope, radius = drawn(5, 5, seed=seed).numpy(), drawn(5, seed=seed + 50).numpy(), 0.3 + 0.3 * seed
        form = (factor + factor.T) / 2
        w, multiplier = cp.Variable(), cp.Variable(nonneg=True)
        corner = cp.reshape(-w - multiplier * radius**2, (1, 1), order="F")
        matrix = cp.bmat([[multiplier * np.eye(5) + form, slope[:, None] / 2], [slope[None] / 2, corner]])
        problem = cp.Problem(cp.Maximize(w), [(matrix + matrix.T) / 2 >> 0])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        curvatures, axes = np.linalg.eigh(form)
        found = minimum(torch.from_numpy(curvatures), torch.from_numpy(axes.T @ slope), radius)
        assert found.bound.item() == pytest.approx(w.value, abs=1e-6)
        assert found.value.item() == pytest.approx(w.value, abs=1e-6)


def test_the_hard_case_reaches_the_sphere_along_the_flattest_axis() -> None:
    """With g = (0, 1) and e = (-1, 2), lambda = 1: t = (+-sqrt(r^2 - 1/36), -1/6), by hand."""
    found = minimum(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0]), 2.0)
    assert found.point[1].item() == pytest.approx(-1 / 6)
    assert found.point[0].abs().item() == pytest.approx(math.sqrt(4 - 1 / 36))
    assert found.value.item() == pytest.approx(-(4 - 1 / 36) + 2 / 36 - 1 / 6)
    assert found.bound.item() == pytest.approx(found.value.item(), abs=1e-13)


@pytest.mark.parametrize("tiny", [1e-190, 1e-30, 1e-16, 1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_nearly_hard_cases_are_as_exact(tiny: float, copies: int) -> None:
    """A slope of `tiny` along every axis of the least curvature: its sign decides the side, and no digit is lost."""
    curvatures = torch.tensor([-1.0] * copies + [0.5, 3.0], dtype=torch.float64)
    slopes = torch.tensor([*[tiny, -tiny, tiny][:copies], 0.7, -0.2], dtype=torch.float64)
    found = minimum(curvatures, slopes, 1.3)
    assert 0 <= float(found.value - found.bound) <= 1e-13
    if copies == 1:
        assert found.point[0] < 0
    assert found.point.norm().item() == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("curvatures", "slopes", "radius", "value"),
    [
        ([1.0, 2.0], [0.2, 0.4], 5.0, -0.01 - 0.02),
        ([0.0, 0.0], [3.0, 4.0], 2.0, -10.0),
        ([0.0, 0.0], [0.0, 0.0], 2.0, 0.0),
        ([-3.0], [0.0], 2.0, -12.0),
        ([-3.0], [1.0], 0.0, 0.0),
        ([0.0, 1.0], [0.0, 1.0], 9.0, -0.25),
    ],
    ids=["inside", "linear", "nothing", "concave", "a point", "flat axis"],
)
def test_cases_that_can_be_done_by_hand(
    curvatures: list[float], slopes: list[float], radius: float, value: float
) -> None:
    found = minimum(torch.tensor(curvatures), torch.tensor(slopes), radius)
    assert found.value.item() == pytest.approx(value, abs=1e-7)
    assert found.bound.item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("power", [-150, -30, 0, 30, 100])
def test_the_units_do_not_matter(power: int) -> None:
    curvatures, slopes, factor = drawn(20, 6), drawn(20, 6, seed=1), 10.0**power
    plain = minimum(curvatures, slopes, 1.5)
    scaled = minimum(factor * curvatures, factor * slopes, 1.5)
    torch.testing.assert_close(scaled.value / factor, plain.value)
    stretched = minimum(curvatures, slopes * factor, 1.5 * factor)
    torch.testing.assert_close(stretched.value / factor / factor, plain.value)


def test_problems_are_solved_one_by_one_and_broadcast() -> None:
    curvatures, slopes = drawn(3, 1, 7), drawn(3, 5, 7, seed=1)
    radii = drawn(5, seed=2).abs()
    together = minimum(curvatures, slopes, radii)
    assert (together.value.shape, together.point.shape, together.bound.shape) == ((3, 5), (3, 5, 7), (3, 5))
    for pair in range(3):
        for example in range(5):
            alone = minimum(curvatures[pair, 0], slopes[pair, example], radii[example])
            assert torch.equal(alone.bound, together.bound[pair, example])
            assert torch.equal(alone.point, together.point[pair, example])


def test_the_minimum_falls_as_the_ball_grows() -> None:
    curvatures, slopes = drawn(100, 8), drawn(100, 8, seed=1)
    bounds = torch.stack([minimum(curvatures, slopes, radius).bound for radius in (0.1, 0.2, 0.5, 1.0, 3.0)])
    assert bool((bounds.diff(dim=0) < 0).all())


def test_float32_problems_are_solved_in_float64_without_a_graph() -> None:
    slopes = drawn(4).float().requires_grad_()
    found: TrustRegion = minimum(drawn(4, seed=1).float(), slopes, 1.0)
    assert {part.dtype for part in (found.value, found.point, found.bound)} == {torch.float64}
    assert not found.value.requires_grad
