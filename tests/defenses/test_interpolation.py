"""The line between two networks, the rule that picks a point of it, and the test behind that rule."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustboard.defenses.interpolation import Outcome, Selection, choose, interpolate, next_attack
from robustboard.defenses.noninferiority import is_noninferior, score_statistic


def state(seed: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    values = {
        name: torch.rand(value.shape, generator=draws) if value.is_floating_point() else torch.tensor(seed)
        for name, value in model.state_dict().items()
    }
    return {**values, "3.bias": torch.full((3,), 0.1)}


def test_the_ends_of_the_line_are_the_two_networks_to_the_bit() -> None:
    start, end = state(1), state(2)
    for alpha, wanted in ((0.0, start), (1.0, end)):
        found = interpolate(start, end, alpha)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@given(st.floats(0, 1))
def test_points_between_are_the_weighted_mean_buffers_too_and_what_agrees_stays(alpha: float) -> None:
    start, end = state(1), state(2)
    found = interpolate(start, end, alpha)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert torch.allclose(found[name], (1 - alpha) * start[name] + alpha * end[name], atol=1e-6)
    assert torch.equal(found["3.bias"], start["3.bias"])


def test_a_point_is_a_copy() -> None:
    start, end = state(1), state(2)
    for value in (*interpolate(start, end, 0.0).values(), *interpolate(start, end, 1.0).values()):
        value.zero_()
    assert all(torch.equal(value, state(1)[name]) for name, value in start.items())
    assert all(torch.equal(value, state(2)[name]) for name, value in end.items())


def flags(true: int, total: int = 1000) -> torch.Tensor:
    return torch.arange(total) < true


def outcomes(*rows: tuple[int, int]) -> list[Outcome]:
    """Outcomes on 1000 examples from (clean, robust) counts, at 0, 1/10, ...; what is lost is lost for good."""
    return [Outcome(place / 10, flags(clean), flags(robust)) for place, (clean, robust) in enumerate(rows)]


PAIRED = Selection(rule="paired", margin=0.01, level=0.05)
MEAN = Selection(rule="mean", margin=0.01)

# At N = 1000, margin 0.01 and level 0.05 the test allows 4 lost examples and no more.
RULES = [
    ("nothing changes", [(900, 500)] * 4, PAIRED, 0.0),
    ("the best clean accuracy", [(900, 500), (905, 500), (909, 500), (907, 500)], PAIRED, 0.2),
    ("ties go to the parent's side", [(900, 500), (909, 500), (905, 500), (909, 500)], PAIRED, 0.1),
    ("clean accuracy falls", [(900, 500), (899, 500), (890, 510)], PAIRED, 0.0),
    ("no admissible point", [(900, 500), (950, 480), (990, 470)], PAIRED, 0.0),
    ("just enough evidence", [(900, 500), (901, 496)], PAIRED, 0.1),
    ("one loss too many", [(900, 500), (901, 495)], PAIRED, 0.0),
    ("a failed test ends the tests", [(900, 500), (901, 500), (905, 480), (909, 500)], PAIRED, 0.1),
    ("robust accuracy rises as well", [(900, 500), (905, 510), (908, 505)], PAIRED, 0.2),
    ("mean: within the margin to the last example", [(900, 500), (901, 490)], MEAN, 0.1),
    ("mean: one beyond it", [(900, 500), (901, 489)], MEAN, 0.0),
    ("mean: every point stands for itself", [(900, 500), (901, 500), (905, 480), (909, 500)], MEAN, 0.3),
    ("mean: ties go to the parent's side", [(900, 500), (905, 500), (905, 500)], MEAN, 0.1),
    ("the parent alone", [(900, 500)], PAIRED, 0.0),
]


@pytest.mark.parametrize(("rows", "selection", "alpha"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_the_rule(rows: list[tuple[int, int]], selection: Selection, alpha: float) -> None:
    assert choose(outcomes(*rows), selection).alpha == alpha


def test_what_was_not_attacked_cannot_be_chosen() -> None:
    points = outcomes((900, 500), (950, 500))
    assert choose([points[0], Outcome(0.1, points[1].clean)], PAIRED).alpha == 0.0


@given(
    st.lists(st.tuples(st.integers(890, 910), st.integers(485, 505)), min_size=1, max_size=6),
    st.sampled_from([PAIRED, MEAN]),
)
def test_attacking_only_what_matters_changes_no_choice(rows: list[tuple[int, int]], selection: Selection) -> None:
    """The points that `next_attack` asks for give the choice that all points would."""
    everything = outcomes(*rows)
    known = [Outcome(point.alpha, point.clean) for point in everything]
    while (place := next_attack(known, selection)) is not None:
        assert known[place].robust is None
        known[place] = everything[place]
    assert choose(known, selection).alpha == choose(everything, selection).alpha


def test_nothing_is_attacked_if_no_point_is_better() -> None:
    assert next_attack([Outcome(0.0, flags(900)), Outcome(1.0, flags(900))], PAIRED) is None


@pytest.mark.parametrize(
    "change", [{"grid": 0}, {"attack_steps": 0}, {"margin": 0.0}, {"margin": 1.0}, {"level": 0.0}, {"level": 1.0}]
)
def test_settings_without_meaning_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Selection(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lost", "won", "pairs", "margin"),
    [(5, 3, 100, 0.02), (2, 9, 50, 0.1), (20, 3, 60, 0.05), (0, 4, 40, 0.1), (7, 0, 80, 0.05)],
)
def test_the_score_statistic_is_that_of_the_likelihood(lost: int, won: int, pairs: int, margin: float) -> None:
    """The nuisance probability maximises the likelihood on the border, found here on a grid."""
    same = pairs - lost - won
    q = np.linspace(1e-9, (1 - margin) / 2 - 1e-9, 400_001)
    likelihood = lost * np.log(q + margin) + won * np.log(q) + same * np.log(1 - margin - 2 * q)
    best = q[likelihood.argmax()]
    variance = pairs * (2 * best + margin - margin**2)
    expected = (won - lost + pairs * margin) / math.sqrt(variance)
    assert score_statistic(lost, won, pairs, margin=margin) == pytest.approx(expected, abs=1e-4)


def test_the_level_is_kept_at_the_border() -> None:
    """If the true fall is the margin, the test says yes about as often as its level, by enumeration."""
    pairs, margin, level, q = 60, 0.1, 0.05, 0.05
    lost_p, won_p = q + margin, q
    yes = 0.0
    for lost in range(pairs + 1):
        for won in range(pairs + 1 - lost):
            if score_statistic(lost, won, pairs, margin=margin) < NormalDist().inv_cdf(1 - level):
                continue
            same = pairs - lost - won
            ways = math.comb(pairs, lost) * math.comb(pairs - lost, won)
            yes += ways * lost_p**lost * won_p**won * (1 - lost_p - won_p) ** same
    assert 0.5 * level < yes < 1.3 * level


@given(st.integers(0, 20), st.integers(0, 20), st.integers(41, 200), st.floats(0.01, 0.3))
def test_evidence_grows_with_what_is_kept(lost: int, won: int, pairs: int, margin: float) -> None:
    statistic = score_statistic(lost, won, pairs, margin=margin)
    assert score_statistic(lost + 1, won, pairs, margin=margin) < statistic
    assert score_statistic(lost, won, pairs, margin=min(0.9, 2 * margin)) > statistic


def test_no_examples_are_no_evidence() -> None:
    none = torch.zeros(0, dtype=torch.bool)
    assert not is_noninferior(none, none, margin=0.5, level=0.5)
