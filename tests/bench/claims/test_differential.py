"""The rules of the claims on differential training: every verdict that each can return, and its threshold."""

from __future__ import annotations

import pytest

from robustboard.bench.claims.claim import Measurement, number
from robustboard.bench.claims.differential import (
    CLAIMS,
    judge_accuracies,
    judge_attack_rates,
    judge_ranks,
    judge_theorems,
)
from robustboard.bench.claims.linear_margins import by_differences, hard_margin_machine, margin, plane_off_origin


def measured(**values: float) -> dict[str, Measurement]:
    return {key.replace("__", " ").replace("_", "-"): number(key, value, 10) for key, value in values.items()}


def rates(
    log: float, squared: float, *, log_robust: float = 0.02, squared_robust: float = 0.02
) -> dict[str, Measurement]:
    """Against cross-entropy PGD has success 0.9 on both parts, and the protocol 1 - 0.05 / 0.95."""
    found = {}
    for part in ("train", "test"):
        for loss, value in (("cross-entropy", 0.9), ("log", log), ("squared", squared)):
            found[f"{loss} {part} 8/255"] = number("success", value, 10)
    for loss, robust in (("cross-entropy", 0.05), ("log", log_robust), ("squared", squared_robust)):
        found[f"{loss} clean"] = number("clean", 0.95, 10)
        found[f"{loss} robust"] = number("robust", robust, 10)
    return found


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (rates(0.9, 0.46), "not reproduced"),
        (rates(0.45, 0.9), "broken under the protocol"),
        (rates(0.45, 0.9, squared_robust=0.9), "broken under the protocol"),
        (rates(0.9, 0.2, squared_robust=0.6), "reproduced"),
        (rates(0.2, 0.2, log_robust=0.6), "reproduced"),
    ],
)
def test_success_must_be_halved_under_pgd_and_under_the_protocol(found: dict[str, Measurement], verdict: str) -> None:
    assert judge_attack_rates(found, eps="8/255", otherwise="not reproduced") == verdict


def test_one_part_is_not_enough() -> None:
    found = rates(0.9, 0.1, squared_robust=0.9)
    found["squared train 8/255"] = number("success", 0.8, 10)
    assert judge_attack_rates(found, eps="8/255", otherwise="not transferred") == "not transferred"


@pytest.mark.parametrize(("log", "squared", "verdict"), [(-5, -2, "reproduced"), (-2.1, -3, "not reproduced")])
def test_two_points_of_accuracy_may_be_lost(log: float, squared: float, verdict: str) -> None:
    assert judge_accuracies(measured(log__gain=log, squared__gain=squared)) == verdict


@pytest.mark.parametrize(("components", "verdict"), [(21, "reproduced"), (22, "not reproduced")])
def test_a_quarter_of_the_components_is_low(components: int, verdict: str) -> None:
    assert judge_ranks({"cross-entropy k_99": number("k", components, 10)}) == verdict


@pytest.mark.parametrize(
    ("differential", "bound", "verdict"),
    [(0.995, 1.0, "reproduced"), (0.985, 1.0, "not reproduced"), (1.0, 1.02, "not reproduced")],
)
def test_theory_must_hold_to_a_hundredth(differential: float, bound: float, verdict: str) -> None:
    assert judge_theorems(measured(differential=differential, bound=bound)) == verdict


def test_the_experiment_s_data_are_separable_and_off_the_origin() -> None:
    points, labels = plane_off_origin(3, 8)
    assert margin(*hard_margin_machine(points, labels), points, labels) >= 0.5
    assert bool((points[:, 2:] == 1).all())
    weight, offset = by_differences(points, labels, steps=200)
    assert margin(weight, offset, points, labels) > 0


def test_claims_are_told_apart_and_name_their_data() -> None:
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS) == 5
    for claim in CLAIMS:
        assert claim.id.startswith(f"{claim.defense}-")
        assert claim.data
        assert claim.rule
