"""The semidefinite programs of robust polynomial networks against trust regions, and their decomposition."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch

from robustboard.attacks.quadratic import RELU_FIT, QuadraticNetwork, margin_forms
from robustboard.attacks.trust_region import minimum
from robustboard.defenses.boundary_distance import boundary_distance
from robustboard.defenses.convex_programs import (
    Ball,
    Floats,
    Labels,
    Loss,
    MultiClass,
    Solution,
    solve,
    solve_accurately,
    stays_above,
)
from robustboard.defenses.neural_decomposition import decompose, quadratic_network
from robustboard.errors import DefenseError

BETA, RADIUS = 1e-2, 0.1
A, B, C = RELU_FIT


def problem(classes: int, count: int = 20) -> tuple[Floats, Labels]:
    """Features (N, 4) of norm about one and labels that no linear function separates."""
    draws = np.random.default_rng(0)
    features = draws.normal(size=(count, 4))
    features /= np.linalg.norm(features, axis=1).mean()
    score = 8 * features[:, 0] * features[:, 1] + features[:, 2]
    return features, np.digitize(score, [0.0] if classes == 2 else [-0.5, 0.5]).astype(np.int64)


def network_of(solution: Solution) -> QuadraticNetwork:
    return quadratic_network(solution.positive, solution.negative).requires_grad_(requires_grad=False)


def least_margins(network: QuadraticNetwork, features: Floats, pairs: list[tuple[int, int]], radius: float) -> Floats:
    """The exact worst margins (P, N) over the L2 ball, by the trust region."""
    forms, x = margin_forms(network, torch.tensor(pairs)), torch.from_numpy(features)
    found = minimum(forms.curvatures.unsqueeze(1), forms.slopes(x), radius)
    return (forms.values(x) + found.value).numpy()


def pairwise(network: QuadraticNetwork, features: Floats, labels: Labels, classes: int, radius: float) -> Floats:
    """The exact worst margins (N, K - 1) of each example's class over the others."""
    pairs = list(itertools.permutations(range(classes), 2))
    margins = least_margins(network, features, pairs, radius)
    rows = [[place for place, (own, _) in enumerate(pairs) if own == label] for label in labels]
    return np.array([margins[chosen, n] for n, chosen in enumerate(rows)])


def single(network: QuadraticNetwork, output: int) -> QuadraticNetwork:
    """The network -f / 2, f / 2 of one output f."""
    column = network.outputs[:, [output]]
    return QuadraticNetwork(network.directions, torch.cat([-column / 2, column / 2], dim=1)).requires_grad_(
        requires_grad=False
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard case"])
def test_the_matrix_inequality_is_the_trust_region(seed: int, hard: bool) -> None:
    """The largest w that the S-lemma's inequality admits is the exact minimum, with negative curvatures too."""
    draws = np.random.default_rng(seed)
    root = draws.normal(size=(4, 4))
    curvature, slope = root + root.T, draws.normal(size=4)
    values, vectors = np.linalg.eigh(curvature)
    if hard:
        slope -= (slope @ vectors[:, 0]) * vectors[:, 0]
    worst = cp.Variable()
    ball = Ball("l2", 0.7)
    solve_accurately(cp.Problem(cp.Maximize(worst), stays_above(worst, 0.3, slope, curvature, ball)), "clarabel")
    exact = minimum(torch.from_numpy(values), torch.from_numpy(vectors.T @ slope), 0.7)
    assert float(worst.value) == pytest.approx(0.3 + float(exact.value), abs=1e-5)


def box_bound(slope: Floats, curvature: Floats, eps: float) -> float:
    worst = cp.Variable()
    ball = Ball("linf", eps)
    solve_accurately(cp.Problem(cp.Maximize(worst), stays_above(worst, 0.0, slope, curvature, ball)), "clarabel")
    return float(worst.value)


@pytest.mark.parametrize("seed", range(3))
def test_the_box_inequality_is_sound_and_beats_the_enclosing_ball(seed: int) -> None:
    draws = np.random.default_rng(seed)
    root = draws.normal(size=(4, 4))
    curvature, slope, eps = root + root.T, draws.normal(size=4), 0.5
    bound = box_bound(slope, curvature, eps)
    corners = eps * np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    points = np.concatenate([corners, draws.uniform(-eps, eps, size=(2000, 4))])
    reached = np.einsum("ni,ij,nj->n", points, curvature, points) + points @ slope
    assert bound <= reached.min() + 1e-6
    values, vectors = np.linalg.eigh(curvature)
    ball = minimum(torch.from_numpy(values), torch.from_numpy(vectors.T @ slope), eps * 2.0)
    assert bound > float(ball.value) + 1e-3


def test_the_box_inequality_is_exact_for_a_diagonal_curvature() -> None:
    curvatures, slope = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.3, -3.0])
    grid = np.linspace(-0.5, 0.5, 2001)
    exact = sum((e * grid**2 + g * grid).min() for e, g in zip(curvatures, slope, strict=True))
    assert box_bound(slope, np.diag(curvatures), 0.5) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("classes", "multi_class"), [(2, "pairwise"), (3, "pairwise"), (3, "one-vs-all")], ids=["binary", "pairs", "rest"]
)
def test_hinge_programs_minimise_the_exact_robust_objective(classes: int, multi_class: MultiClass) -> None:
    """The optimal value is the robust objective recomputed from the network, and tight margins are the exact ones."""
    features, labels = problem(classes)
    solution = solve(features, labels, classes=classes, beta=BETA, ball=Ball("l2", RADIUS), multi_class=multi_class)
    network = network_of(solution)
    if classes == 2 or multi_class == "pairwise":
        exact = pairwise(network, features, labels, classes, RADIUS)
        loss = np.maximum(0, 1 - exact).max(axis=1).mean()
    else:
        sides = [least_margins(single(network, k), features, [(1, 0), (0, 1)], RADIUS) for k in range(classes)]
        exact = np.stack([np.where(labels == k, sides[k][0], sides[k][1]) for k in range(classes)], axis=1)
        loss = np.maximum(0, 1 - exact).sum(axis=1).mean()
    size = solution.positive[:, -1, -1].sum() + solution.negative[:, -1, -1].sum()
    assert solution.objective == pytest.approx(loss + BETA * size, abs=1e-5)
    assert bool((solution.worst <= exact + 1e-4).all())
    # The margins that the loss sees are pushed up to their exact values; of a pair, only the worse one.
    seen = solution.worst == solution.worst.min(axis=1, keepdims=True) if multi_class == "pairwise" else exact < 1
    seen &= exact < 1 - 1e-3
    assert seen.any()
    np.testing.assert_allclose(solution.worst[seen], exact[seen], atol=1e-4)


def test_the_squared_program_minimises_the_worst_squared_deviation() -> None:
    features, labels = problem(2)
    solution = solve(features, labels, classes=2, beta=BETA, ball=Ball("l2", RADIUS), loss="squared")
    up, down = least_margins(network_of(solution), features, [(1, 0), (0, 1)], RADIUS)
    targets = np.where(labels == 1, 1.0, -1.0)
    largest = np.maximum(targets - up, -down - targets)
    size = solution.positive[0, -1, -1] + solution.negative[0, -1, -1]
    assert solution.objective == pytest.approx((largest**2).mean() + BETA * size, abs=1e-5)
    np.testing.assert_allclose(solution.worst[:, 0], largest, atol=1e-4)


def test_linf_programs_bound_the_worst_margin_better_than_the_ball_around_the_box() -> None:
    """Trained on the box, the program's margins hold on it, and are above those of the ball of radius eps sqrt(d)."""
    features, labels = problem(2)
    solution = solve(features, labels, classes=2, beta=BETA, ball=Ball("linf", RADIUS))
    network = network_of(solution)
    signs = np.where(labels == 1, 1.0, -1.0)
    draws = np.random.default_rng(1)
    steps = np.concatenate(
        [np.array(list(itertools.product([-1.0, 1.0], repeat=4))), draws.uniform(-1, 1, size=(200, 4))]
    )
    points = torch.from_numpy(features[:, None] + RADIUS * steps)
    logits = network(points.flatten(0, 1)).view(*points.shape[:2], 2)
    reached = (torch.from_numpy(signs)[:, None] * (logits[..., 1] - logits[..., 0])).min(dim=1).values.numpy()
    assert bool((solution.worst[:, 0] <= reached + 1e-4).all())
    around = pairwise(network, features, labels, 2, 2 * RADIUS)[:, 0]
    tight = solution.worst[:, 0] < 1 - 1e-3
    assert tight.any()
    assert bool((solution.worst[tight, 0] > around[tight] - 1e-4).all())
    assert solution.worst[tight, 0].mean() > around[tight].mean() + 0.05


def test_the_objective_grows_with_the_radius_and_with_the_robust_examples() -> None:
    features, labels = problem(2)

    def optimum(radius: float, robust: range | None = None) -> float:
        return solve(features, labels, classes=2, beta=BETA, ball=Ball("l2", radius), robust=robust).objective

    standard, some, every, wider = optimum(0.0), optimum(0.1, range(10)), optimum(0.1), optimum(0.2)
    assert optimum(0.1, range(0)) == pytest.approx(standard, abs=1e-6)
    assert standard < some < every < wider


def test_both_solvers_find_one_optimum() -> None:
    features, labels = problem(2, count=10)
    found = [
        solve(features, labels, classes=2, beta=0.1, ball=Ball("l2", RADIUS), solver=name).objective
        for name in ("clarabel", "scs")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_pairs_have_no_squared_loss() -> None:
    features, labels = problem(3)
    with pytest.raises(DefenseError, match=r"goes with one-vs-all, not with pairwise\.$"):
        solve(features, labels, classes=3, beta=BETA, ball=Ball("l2", RADIUS), loss="squared")


class Stalled:
    """A problem whose solver gives up."""

    status = cp.OPTIMAL_INACCURATE

    def solve(self, **options: object) -> None:
        pass


def test_what_is_not_solved_accurately_is_a_sentence() -> None:
    x = cp.Variable()
    with pytest.raises(DefenseError, match=r"status infeasible and no accurate optimum.*scalable form\.$"):
        solve_accurately(cp.Problem(cp.Minimize(x), [x >= 1, x <= 0]), "clarabel")
    with pytest.raises(DefenseError, match=r"status optimal_inaccurate.*raise beta"):
        solve_accurately(Stalled(), "scs")
    with pytest.raises(DefenseError, match=r"^The solver clarabel failed on the convex program \(SolverError"):
        solve_accurately(cp.Problem(cp.Minimize(x), [x >= 1, cp.Variable(boolean=True) >= x]), "clarabel")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_decomposition_gives_back_the_matrix(count: int) -> None:
    """Neurons of unit directions whose sum is the matrix, as many as its rank at most."""
    draws = np.random.default_rng(count)
    units = draws.normal(size=(count, 4))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    lifted = np.concatenate([units, np.ones((count, 1))], axis=1)
    matrix = np.einsum("j,ji,jk->ik", draws.uniform(0.1, 2.0, size=count), lifted, lifted)
    directions, weights = decompose(matrix)
    again = np.concatenate([directions, np.ones((len(directions), 1))], axis=1)
    np.testing.assert_allclose(np.einsum("j,ji,jk->ik", weights, again, again), matrix, atol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0, rtol=1e-12)
    assert weights.sum() == pytest.approx(matrix[-1, -1], rel=1e-9)
    assert len(weights) == np.linalg.matrix_rank(matrix)


def test_decomposition_survives_a_solver_s_residual() -> None:
    """Eigenvalues just below zero and a trace that is off by 1e-8 move the function by as little."""
    directions, weights = decompose(np.diag([1.0, 1e-9, -1e-9, 1.0 + 1e-8]))
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose((weights[:, None] * directions**2).sum(axis=0), [1, 0, 0], atol=1e-6)


def test_no_neuron_at_all_is_the_zero_network() -> None:
    network = quadratic_network(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)))
    assert network(torch.ones(2, 3, dtype=torch.float64)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("classes", "loss"), [(2, "hinge"), (2, "squared"), (3, "hinge")])
def test_the_network_is_the_program_s_function(classes: int, loss: Loss) -> None:
    """Same outputs as Z and Z', and the sum of |alpha| is the regulariser Z4 + Z4'."""
    features, labels = problem(classes)
    solution = solve(features, labels, classes=classes, beta=BETA, ball=Ball("l2", RADIUS), loss=loss)
    network = network_of(solution)
    effective = solution.positive - solution.negative
    expected = (
        A * np.einsum("ni,oij,nj->no", features, effective[:, :-1, :-1], features)
        + B * features @ effective[:, :-1, -1].T
        + C * effective[:, -1, -1]
    )
    found = network(torch.from_numpy(features)).numpy()
    if classes == 2:
        found = found[:, 1:] - found[:, :1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    size = solution.positive[:, -1, -1].sum() + solution.negative[:, -1, -1].sum()
    assert float(network.outputs.abs().sum()) == pytest.approx(size, rel=1e-5)
    np.testing.assert_allclose(network.directions.norm(dim=1).numpy(), 1.0, rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_distance_to_the_boundary_is_where_the_trust_region_reaches_zero(seed: int) -> None:
    """The semidefinite program against bisection of the radius at which the exact worst margin vanishes."""
    draws = np.random.default_rng(seed)
    root = draws.normal(size=(4, 4))
    curvature, slope, value = (root + root.T) / 4, draws.normal(size=4), 0.8
    values, vectors = np.linalg.eigh(curvature)
    curvatures, slopes = torch.from_numpy(values), torch.from_numpy(vectors.T @ slope)
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(minimum(curvatures, slopes, middle).value) > -value else (low, middle)
    assert boundary_distance(value, slope, curvature) == pytest.approx(high, rel=1e-4)


def test_a_margin_that_is_positive_everywhere_has_no_boundary() -> None:
    bowl, slope = np.eye(2), np.array([1.0, 0.0])
    assert boundary_distance(0.3, slope, bowl) == np.inf
    assert boundary_distance(0.2, slope, bowl) < 0.5
    with pytest.raises(DefenseError, match="correctly classified point"):
        boundary_distance(-0.1, slope, bowl)
