"""The rules of MixTrain's claims give each verdict they can, and the experiments measure what their keys say."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from robustboard.bench.claims.claim import Measurement, PaperClaim, number
from robustboard.bench.claims.interval_gain import relative_gain
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.bench.claims.mixtrain import CLAIMS, verified_accuracy
from robustboard.bench.claims.training_cost import StepClock, times_to_equal
from robustboard.defenses.adapter import NoProgress

BY_ID: Mapping[str, PaperClaim] = {claim.id: claim for claim in CLAIMS}


def found(**values: float) -> dict[str, Measurement]:
    return {key.replace("_", " "): number(key, value, 1) for key, value in values.items()}


def test_every_claim_is_about_mixtrain() -> None:
    assert len(BY_ID) == len(CLAIMS) == 6
    assert all(claim.defense == "mixtrain" and claim.id.startswith("mixtrain-") for claim in CLAIMS)


@pytest.mark.parametrize(
    ("identity", "target"), [("mixtrain-verified-mnist-0.1", 0.952), ("mixtrain-verified-mnist-0.3", 0.601)]
)
def test_verified_accuracy_must_reach_the_paper_s_within_its_interval(identity: str, target: float) -> None:
    judge = BY_ID[identity].judge
    inside = Measurement("verified", target - 0.02, 500, target - 0.04, target)
    below = Measurement("verified", target - 0.02, 5000, target - 0.03, target - 0.01)
    assert judge({"verified": inside}) == "reproduced"
    assert judge({"verified": below}) == "not reproduced"


@pytest.mark.parametrize(
    ("step", "whole", "verdict"),
    [(80, 15, "reproduced"), (80, 4, "not transferred"), (14.9, 20, "not reproduced"), (3, 2, "not reproduced")],
)
def test_fifteen_times_for_a_step_and_to_equal_accuracy(step: float, whole: float, verdict: str) -> None:
    measured = {"symbolic": number("step", step, 1), "full over mixtrain": number("whole", whole, 1)}
    assert BY_ID["mixtrain-cost-of-verified-training"].judge(measured) == verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(3.0, "reproduced"), (2.9, "not reproduced")])
def test_three_times_against_forty_steps(ratio: float, verdict: str) -> None:
    measured = {"pgd-40": number("step", ratio, 1)}
    assert BY_ID["mixtrain-cost-of-adversarial-training"].judge(measured) == verdict


@pytest.mark.parametrize(
    ("gain", "protocol", "verdict"),
    [
        (0.5, (0.2, 0.2), "reproduced"),
        (0.5, (0.4, 0.2), "reproduced"),
        (0.5, (0.4, 0.3), "broken under the protocol"),
        (0.37, (0.4, 0.4), "not reproduced"),
        (0.37, (0.1, 0.1), "not reproduced"),
    ],
)
def test_the_interval_attack_must_beat_pgd_and_the_protocol(
    gain: float, protocol: tuple[float, float], verdict: str
) -> None:
    measured = {"gain": number("gain", gain, 1)}
    for name, value in zip(("first", "second"), protocol, strict=True):
        measured[f"{name} interval"] = number("interval", 0.3, 1)
        measured[f"{name} interval-margin"] = number("not read", 0.9, 1)
        measured[f"{name} protocol"] = number("protocol", value, 1)
    assert BY_ID["mixtrain-interval-attack"].judge(measured) == verdict


def test_the_summary_s_error_is_refuted_by_the_table() -> None:
    claim = BY_ID["mixtrain-imagenet-200"]
    measured = claim.measure(Laboratory(Path("unused")))
    assert claim.judge(measured) == "refuted by the paper"
    assert claim.judge({"published": number("if it were so", 0.952, 1)}) == "reproduced"


def test_relative_gain_is_a_mean_over_networks_with_an_interval() -> None:
    """From 10 to 15 and from 20 to 24 broken: a half and a fifth more; resampled examples stay paired."""
    places = np.arange(100)
    pairs = [(places < 10, places < 15), (places < 20, places < 24)]
    gain = relative_gain("gain", pairs, 0)
    assert gain.value == pytest.approx((0.5 + 0.2) / 2)
    assert 0 < gain.low < gain.value < gain.high < 1.5
    assert relative_gain("gain", pairs, 0) == gain
    assert relative_gain("gain", [(places < 0, places < 3)], 0).value == 3.0
    same = relative_gain("gain", [(places < 10, places < 10)], 0)
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_the_clock_leaves_out_what_lies_between_epochs() -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    clock = StepClock(NoProgress())
    work(0.05)
    clock.begin("train", 2)
    work(0.05)
    clock.advance()
    work(0.2)
    clock.note(epoch=1)
    work(0.05)
    clock.advance()
    assert clock.seconds == pytest.approx(0.1, abs=0.03)


needs_bounds = pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")


@needs_bounds
@pytest.mark.slow
def test_the_experiments_run_on_digits(tmp_path: Path) -> None:
    """On a small problem: verified <= surviving <= accuracy, certified and robust enclose, and a cost is a ratio."""
    lab = Laboratory(tmp_path)
    rates = verified_accuracy(lab, "digits-linf@1", images=80, judged=60, epochs=15)
    values = {key: measurement.value for key, measurement in rates.items()}
    assert 0.3 < values["verified"] <= values["surviving"] <= values["accuracy"]
    assert values["certified"] <= values["robust"]
    costs = times_to_equal(lab, lengths=(2, 4))
    assert costs["full over mixtrain"].value == pytest.approx(
        costs["full seconds"].value / costs["mixtrain seconds"].value
    )
    assert costs["pgd-at verified"].value < costs["mixtrain verified"].value
