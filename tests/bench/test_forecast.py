"""The arithmetic of an estimate: each expected number follows from the protocol and is worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustboard.attacks.kernels import ensembles
from robustboard.bench.forecast import Measured, Pace, Plan, Shares, forecast, grown, share
from robustboard.bench.stopwatch import EnoughError, Laps

PLAN = Plan(n=1000, batch_size=200, classes=10, steps=40, runs=15, audited=120)
FREE = Pace(0.0, 0.0)
A_CALL, AN_EXAMPLE = Pace(1.0, 0.0), Pace(0.0, 1.0)
seconds = st.floats(1e-3, 1e3)


def predicted(shares: Shares, *, plan: Plan = PLAN, **paces: object) -> dict[str, float]:
    return forecast(plan, Measured(**{"predict": FREE, "step": FREE, "corrupt": FREE, **paces}), shares)


@given(seconds, seconds)
def test_a_pace_meets_the_larger_measurement_and_never_has_a_negative_part(short, long):
    """Noise can make eight examples look dearer than thirty."""
    pace = Pace.fitted((8, short), (32, long))
    assert pace.seconds(32) == pytest.approx(long)
    assert pace.call >= 0
    assert pace.example >= 0


@pytest.mark.parametrize(
    ("small", "large", "size", "expected"),
    [
        ((100, 1.0), (200, 2.0), 1000, 10.0),  # in proportion
        ((100, 2.0), (200, 3.0), 1000, 11.0),  # with a part that does not grow
        ((100, 1.0), (200, 8.0), 400, 64.0),  # with the cube
        ((100, 1.0), (200, 100.0), 400, 800.0),  # never faster than the cube: that is noise
        ((100, 3.0), (200, 2.0), 1000, 2.0),  # noise alone
        ((100, 0.0), (200, 2.0), 1000, 2.0),  # a stage that the smaller part did not have
    ],
)
def test_trainings_grow_as_their_two_parts_say(small, large, size, expected):
    assert grown(small, large, size) == pytest.approx(expected)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(100, 10_000))
def test_a_share_of_a_sample_is_never_none_nor_all_of_many_more(successes, failures, n):
    assert 0 < share(successes, successes + failures, n) < 1


def test_without_survivors_no_attack_and_no_bound_runs():
    found = predicted(Shares(1.0, 0.0, (0.0,)), step=A_CALL, bounds={"ibp": A_CALL})
    assert not set(found) & {*ensembles.STAGES["standard"], "bounds: ibp"}
    # One first look for each of five batches, then the diagnostics, which look at 64 examples all the same.
    assert found["pgd"] == 5 * 40
    assert found["diagnostics"] > 0


def test_each_bound_gets_what_those_before_it_left_open():
    paces = {"ibp": AN_EXAMPLE, "crown": AN_EXAMPLE, "alpha-crown": AN_EXAMPLE}
    found = predicted(Shares(0.9, 0.5, (0.8, 0.2, 0.1)), bounds=paces)
    assert [found[f"bounds: {method}"] for method in paces] == pytest.approx([450, 360, 90])


def test_attacks_run_on_what_is_open_toward_what_is_not_excluded():
    found = predicted(Shares(1.0, 0.5, (0.2,), targets=1 / 3), bounds={"ibp": FREE}, step=AN_EXAMPLE)
    assert found["apgd_ce"] == pytest.approx(100 * ensembles.FORWARDS["apgd_ce"])
    assert found["apgd_t"] == pytest.approx(100 * ensembles.FORWARDS["apgd_t"] / 3)
    # The first look breaks half and spends a quarter of a run on these; fourteen runs follow on what is left open.
    assert found["pgd"] == pytest.approx(40 * (500 + 0.25 * 500) + 14 * 40 * 100)


def test_the_audit_and_the_diagnostics_are_capped():
    """They do not grow with the examples, so that ten times as many do not make them dearer."""
    shares = Shares(1.0, 0.5, (0.5,))
    one = predicted(shares, bounds={"ibp": FREE}, step=AN_EXAMPLE)
    ten = predicted(shares, bounds={"ibp": FREE}, step=AN_EXAMPLE, plan=dataclasses.replace(PLAN, n=10_000))
    assert (one["audit"], one["diagnostics"]) == pytest.approx((ten["audit"], ten["diagnostics"]))
    assert one["audit"] == pytest.approx(120 * (102 + 101))
    assert ten["square"] == pytest.approx(10 * one["square"])


def test_complete_verification_gives_the_whole_budget_to_what_is_not_settled_soon():
    plan = dataclasses.replace(PLAN, complete=500)
    found = predicted(Shares(1.0, 0.1), plan=plan, settle=Pace(2.0, 0.01), settled=0.5)
    assert found["complete verification"] == pytest.approx(100 * (2.0 + 0.5 * 500 * 0.01))
    # The audit asks once about each of the 900 that PGD broke.
    assert found["audit"] == pytest.approx(900 * 2.0)


def test_the_reference_engine_attacks_what_is_certified_too():
    shares = Shares(1.0, 0.5, (0.1,))
    plan = dataclasses.replace(PLAN, reference=True)
    ours, theirs = (predicted(shares, bounds={"ibp": FREE}, step=AN_EXAMPLE, plan=p) for p in (PLAN, plan))
    assert theirs["apgd_t"] > 500 * 900
    assert ours["apgd_t"] == pytest.approx(50 * 909)
    assert "audit" not in theirs, "with everything attacked, there is nothing to audit but bounds, which are free here"


def test_options_that_repeat_attacks_cost_as_often_as_they_do():
    plan = dataclasses.replace(PLAN, attacked_corruptions=5, attacked_examples=100, attack_seeds=1)
    found = predicted(Shares(0.9, 1.0), step=AN_EXAMPLE, plan=plan)
    assert found["attacked corruptions"] == pytest.approx(5 * 15 * 40 * 90)
    three = predicted(Shares(0.9, 1.0), step=AN_EXAMPLE, plan=dataclasses.replace(plan, attack_seeds=3))
    assert three["attack seeds"] == pytest.approx(3 * found["attack seeds"])


def test_a_watched_training_is_ended_and_extrapolated(monkeypatch):
    """The first step takes five seconds, because it sets things up, and the others one: a hundred more take 100."""
    now = [100.0]
    monkeypatch.setattr("robustboard.bench.stopwatch.time.perf_counter", lambda: now[0])
    laps = Laps(limit=6.5)
    laps.begin("train", 100)

    def step(length: float) -> None:
        now[0] += length
        laps.advance()

    step(5)
    step(1)
    with pytest.raises(EnoughError):
        step(1)
    assert laps.extrapolated() == pytest.approx(5 + 100)


def test_the_stages_of_a_training_are_told_apart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("robustboard.bench.stopwatch.time.perf_counter", lambda: now[0])
    laps = Laps()
    for wait, stage in ((1, "train"), (2, "criticality"), (4, "train")):
        now[0] += wait
        laps.begin(stage, 10)
    assert laps.by_stage(15.0) == {"": 1.0, "train": 2.0 + 8.0, "criticality": 4.0}
