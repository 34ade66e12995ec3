"""Branch and bound and the mixed-integer program against the exact minimum over every activation pattern."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from robustboard.attacks.complete import branching
from robustboard.attacks.complete.branching import Effort, branch_and_bound
from robustboard.attacks.complete.mixed_integer import Solved, solve
from robustboard.attacks.complete.relaxation import Ranges, Rows

TOLERANCE = 1e-3
SEEDS = range(12)
HARD = 7


def margins_at(tiny, point):
    """Class 0's margins by the model itself, in float64."""
    with torch.no_grad():
        logits = copy.deepcopy(tiny.model).double()(point[None])[0]
    return logits[0] - logits[1:]


def search(tiny, **effort):
    """The search, with whatever looks like a counter-example checked by the model."""

    def breaks(points):
        return next((point for point in points if float(margins_at(tiny, point).min()) < 0), None)

    return branch_and_bound(tiny.problem, tolerance=TOLERANCE, effort=Effort(**effort), breaks=breaks)


def moved(tiny, amount):
    """The same problem with every margin of class 0 moved by about `amount`."""
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        before = float(model[-1].bias[0])
        model[-1].bias[0] += amount
        amount = float(model[-1].bias[0]) - before
    margins = tiny.problem.margins
    margins = Rows(margins.inputs, margins.hidden, margins.offset + amount)
    return replace(tiny, model=model, problem=replace(tiny.problem, margins=margins))


def make_hard(tiny):
    """A robust problem that takes a search: the least margin at sampled points is moved to a tenth."""
    hard = tiny(HARD, widths=(6, 24, 24, 2), radius=0.5)
    shares = torch.rand(20_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = hard.lower + (hard.upper - hard.lower) * shares
    return moved(hard, 0.1 - float(hard.problem.network.evaluate(hard.problem.margins, points).min()))


def exact(tiny):
    return [tiny.minimum(target) for target in tiny.problem.targets]


@pytest.fixture(scope="module")
def answers(tiny):
    """Each problem with its exact minima."""
    return [(problem, exact(problem)) for problem in (tiny(seed, radius=0.3 + 0.05 * (seed % 4)) for seed in SEEDS)]


def test_the_problems_hold_both_answers(answers):
    robust = [min(minima) > TOLERANCE for _, minima in answers]
    assert 4 <= sum(robust) <= len(robust) - 4
    assert sum(len(problem.problem.network) >= 3 for problem, _ in answers) >= 8


def test_branch_and_bound_finds_the_truth(answers):
    for tiny, minima in answers:
        found = search(tiny, nodes=5000)
        if min(minima) > TOLERANCE:
            assert found.adversarial is None
            assert found.reason is None
            assert (found.margins > TOLERANCE).all()
            assert (found.margins <= torch.tensor(minima) + 1e-7).all(), "a lower bound is below the minimum"
        else:
            assert found.adversarial is not None
            assert not (found.margins > TOLERANCE).all()


@pytest.mark.parametrize("seed", range(16))
def test_a_margin_near_zero_is_on_the_right_side(tiny, seed):
    """The least margin is moved to just above the tolerance or just below zero, where clipping cuts the most."""
    widths = ((3, 4, 4, 3), (2, 7, 3), (3, 3, 3, 2, 3), (2, 4, 4, 2))[seed % 4]
    problem = tiny(seed, widths=widths, radius=0.3 + 0.1 * (seed % 5))
    least = (0.004, -0.004, 0.02, -0.02)[seed // 4 % 4]
    minima = torch.tensor(exact(problem), dtype=torch.float64)
    amount = least - float(minima.min())
    found = search(moved(problem, amount), nodes=5000)
    assert bool((found.margins > TOLERANCE).all()) == (least > 0)
    assert (found.adversarial is None) == (least > 0)
    if least > 0:
        assert (found.margins <= minima + amount + 1e-6).all(), "a lower bound is below the minimum"


def test_the_program_finds_the_truth(answers):
    for tiny, minima in answers:
        for row, minimum in enumerate(minima):
            solved = solve(tiny.problem, row, cutoff=TOLERANCE, nodes=10_000)
            assert solved.proved == (minimum > TOLERANCE)
            if not solved.proved:
                assert float(margins_at(tiny, solved.point)[row]) <= TOLERANCE + 1e-5


def test_split_phases_are_linear_programs(answers):
    """The minimum over all patterns of split neurons is the minimum of the whole."""
    tiny, minima = next((one, two) for one, two in answers if 2 <= len(one.problem.network) <= 4)
    count = len(tiny.problem.network)
    patterns = torch.cartesian_prod(*[torch.tensor([-1, 1], dtype=torch.int8)] * count).view(-1, count)
    network = tiny.problem.network
    parts = [
        Ranges(network.low.masked_fill(phase > 0, 0.0), network.high.masked_fill(phase < 0, 0.0)) for phase in patterns
    ]
    for cutoff, proved in ((minima[0] - 0.01, True), (minima[0] + 0.01, False)):
        answers_of_parts = [solve(tiny.problem, 0, ranges=part, cutoff=cutoff, nodes=1).proved for part in parts]
        assert all(answers_of_parts) == proved


def test_an_exhausted_budget_is_no_answer(tiny):
    hard = make_hard(tiny)
    full = search(hard, nodes=20_000)
    assert full.nodes > 20, "the problem must need some search for a small budget to matter"
    part = search(hard, nodes=10)
    assert part.nodes <= 10
    assert part.exhausted
    assert "used up" in part.reason
    assert part.adversarial is None
    assert not (part.margins > TOLERANCE).all()


def test_equal_questions_have_equal_answers(tiny):
    hard = make_hard(tiny)
    first, second = search(hard, nodes=300), search(hard, nodes=300)
    assert first.nodes == second.nodes > 60
    assert torch.equal(first.margins, second.margins)


def test_the_width_of_the_search_changes_no_answer(answers):
    for tiny, minima in answers[:8]:
        answer = {width: search(tiny, nodes=5000, width=width) for width in (1, 64)}
        assert {found.adversarial is None for found in answer.values()} == {min(minima) > TOLERANCE}


@pytest.mark.parametrize(("factor", "bias"), [(1e15, 0.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_program_that_the_solver_cannot_read_proves_nothing(tiny, factor, bias):
    """scipy gives HiGHS's "model error" the same status as "infeasible"."""
    problem = tiny(0).problem
    margins = Rows(factor * problem.margins.inputs, problem.margins.hidden, problem.margins.offset + bias)
    margins.inputs[:, 0] += factor
    solved = solve(replace(problem, margins=margins), 0, cutoff=TOLERANCE, nodes=100)
    assert not solved.proved


def test_a_counter_example_of_one_leaf_survives_the_next(tiny, monkeypatch):
    """Two sub-domains without free neurons are asked about in one round, and only the first one has a point."""
    problem = tiny(HARD, widths=(4, 20, 20, 2), radius=0.5).problem
    found = torch.ones(4, dtype=torch.float64)
    answers = [Solved(proved=False, point=found, nodes=1), Solved(proved=False, point=None, nodes=1)]
    asked = []
    monkeypatch.setattr(branching, "solve", lambda *_, **__: asked.append(1) or answers[len(asked) - 1])
    searcher = branching._Searcher(problem, TOLERANCE, Effort(nodes=100), lambda points: points[0], lambda _: None)
    ranges = Ranges(torch.zeros(len(problem.network)), torch.ones(len(problem.network)))
    slopes = torch.zeros(len(problem.network))
    searcher.waiting = [branching._Domain(float(age), age, 0, ranges, slopes, slopes) for age in range(2)]
    searcher._round()
    assert torch.equal(searcher.search.adversarial, found)
    assert len(asked) == 1
    assert [domain.age for domain in searcher.waiting] == [1]
