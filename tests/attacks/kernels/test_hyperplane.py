from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pyautoattack.fab_projections import projection_l2, projection_linf
from scipy.optimize import brentq, linprog
from torch import Tensor

from robustboard.attacks.kernels.hyperplane import displacement
from robustboard.attacks.threat import Norm

NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])
ROWS, PIXELS = 30, 24
Vector = npt.NDArray[np.float64]


def problems(seed: int, *, reachable: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Points with many pixels on the walls, normals with entries of zero, and planes near and at the limit."""
    draw = torch.Generator().manual_seed(seed)
    points = (torch.rand(2, ROWS, PIXELS, generator=draw) * 2 - 0.5).clamp(0, 1)
    normals = torch.randn(ROWS, PIXELS, generator=draw) * torch.rand(ROWS, PIXELS, generator=draw) ** 3
    normals[torch.rand(ROWS, PIXELS, generator=draw) < 0.1] = 0.0
    down = (points * normals.clamp(min=0) - (1 - points) * normals.clamp(max=0)).sum(dim=2)
    up = normals.abs().sum(dim=1) - down
    share = torch.rand(2, ROWS, generator=draw) * 2 - 1
    share = torch.where(share > 0, share * down, share * up)
    return points, normals, 0.999 * share if reachable else share + share.sign() * (down + up)


def exact_linf(point: Vector, normal: Vector, value: float) -> float:
    """The least L-inf distance, as a linear program in (way, distance)."""
    size = len(point)
    eye, column = np.eye(size), -np.ones((size, 1))
    result = linprog(
        np.r_[np.zeros(size), 1.0],
        A_ub=np.block([[eye, column], [-eye, column]]),
        b_ub=np.zeros(2 * size),
        A_eq=np.r_[normal, 0.0][None],
        b_eq=[-value],
        bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
    )
    assert result.status == 0
    return float(result.fun)


def exact_l2(point: Vector, normal: Vector, value: float) -> float:
    """The least L2 distance: by the KKT conditions the way is clip(m * normal, -point, 1 - point) for one m."""

    def way(multiplier: float) -> Vector:
        return np.clip(multiplier * normal, -point, 1 - point)

    far = 1.0 / np.abs(normal[normal != 0]).min()
    root = brentq(lambda multiplier: float(normal @ way(multiplier)) + value, -far, far, xtol=1e-300, rtol=1e-15)
    return float(np.linalg.norm(way(root)))


@NORMS
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_shortest_way_there_inside_the_box(norm: Norm, seed: int) -> None:
    """Against a linear program and a root finder in float64: the same distance, on the plane, and in the box."""
    points, normals, values = problems(seed)
    ways = displacement(points, normals, values, norm)
    ends = points + ways
    assert bool(((ends > -1e-7) & (ends < 1 + 1e-7)).all())
    missed = torch.linalg.vecdot(ways.double(), normals.double()) + values
    assert missed.abs().max() < 2e-6
    solve = exact_linf if norm == "linf" else exact_l2
    for p in range(2):
        for r in range(ROWS):
            best = solve(points[p, r].double().numpy(), normals[r].double().numpy(), float(values[p, r]))
            found = float(torch.linalg.vector_norm(ways[p, r].double(), ord=torch.inf if norm == "linf" else 2))
            # Near the limit of the box the distance answers a rounding of the value many times over.
            assert found == pytest.approx(best, rel=2e-4, abs=2e-6)


@NORMS
def test_a_plane_out_of_reach_leads_to_the_nearest_corner(norm: Norm) -> None:
    points, normals, values = problems(0, reachable=False)
    corner = torch.where(normals * values.unsqueeze(2) > 0, 0.0, 1.0)
    corner = torch.where(normals == 0, points, corner)
    assert torch.allclose(points + displacement(points, normals, values, norm), corner, atol=1e-6)


@NORMS
def test_it_is_what_the_reference_projects(norm: Norm) -> None:
    """The authors' sorting projections give the same points to float32's precision."""
    points, normals, values = problems(4)
    theirs = projection_linf if norm == "linf" else projection_l2
    for place, value in zip(points, values, strict=True):
        level = (normals * place).sum(dim=1) - value
        expected = theirs(place, normals, level)
        found = displacement(place[None], normals, value[None], norm)[0]
        assert torch.allclose(found, expected, atol=2e-5)


@NORMS
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_scale_of_the_normal_does_not_matter(norm: Norm, factor: float) -> None:
    """A saturated network has gradients whose squares vanish in float32; the plane is where it was."""
    points, normals, values = problems(5)
    plain = displacement(points, normals, values, norm)
    assert torch.allclose(displacement(points, normals * factor, values * factor, norm), plain, atol=1e-5)


@NORMS
def test_nothing_moves_on_the_plane_or_without_a_normal(norm: Norm) -> None:
    points, normals, values = problems(6)
    nowhere = torch.zeros_like(points)
    assert torch.equal(displacement(points, normals, torch.zeros_like(values), norm), nowhere)
    assert torch.equal(displacement(points, torch.zeros_like(normals), values, norm), nowhere)


@NORMS
def test_a_row_does_not_depend_on_the_others(norm: Norm) -> None:
    """Rows that arrive early wait for the rest, and waiting changes not one bit."""
    points, normals, values = problems(7)
    together = displacement(points, normals, values, norm)
    for r in range(ROWS):
        alone = displacement(points[:, r : r + 1], normals[r : r + 1], values[:, r : r + 1], norm)
        assert torch.equal(alone[:, 0], together[:, r])
