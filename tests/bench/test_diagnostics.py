"""The judging of evidence: thresholds hold to the example, the table is frozen, and a flag never sets a status."""

from __future__ import annotations

import hashlib
import json

import pytest

from robustboard.attacks import binarization, gradient_checks
from robustboard.bench import measures, surrogates
from robustboard.bench.diagnostics import BY_NAME, EXAMPLES, FEWEST, TABLE, VERSION, judge_all
from robustboard.leaderboard.findings import Finding

SOUND = {
    "randomness": {"n": 16, "change": 0.0},
    "batch-dependence": {"n": 16, "change": 1e-7},
    "autograd-mode": {"n": 64, "change": 0.0},
    "missing-gradients": {"n": 16, "gradient": "present", "not finite": 0},
    "zero-gradients": {"n": 64, "zero margin": 0},
    "pixels-at-the-faces": {"alive": 1000, "dead": 0},
    "finite-differences": {"n": 64, "differ": 0},
    "saturated-softmax": {"n": 64, "mean largest logit": 18.0, "median gap": 12.0, "certain": 10, "zero ce": 0},
    "loss-gap": {"n": 64, "ce": 20, "margin": 20, "dlr": 20, "rescaled ce": 20},
    "single-step": {"n": 64, "single step": 22, "many steps": 20},
    "black-box": {"n": 64, "queries": 1000, "square": 30, "square only": 0},
    "transfer": {"n": 64, "transfer": 30, "transfer only": 0},
    "unbounded": {"n": 64, "survived": 0},
    "more-work": {"n": 64, "undecided": 10, "broken": 0},
    "binarization": {"n": 64, "tasks": 64, "found": 64, "random": 5},
}


def _verdict(name, **changes):
    return BY_NAME[name].judge({**SOUND[name], **changes}).verdict


def test_sound_evidence_is_ok_everywhere():
    diagnosis = judge_all(SOUND, examples=64)
    assert [finding.name for finding in diagnosis.findings] == list(SOUND)
    assert {finding.verdict for finding in diagnosis.findings} == {"ok"}
    assert (diagnosis.verdict, diagnosis.status, diagnosis.reasons, diagnosis.flags) == ("ok", "ok", (), ())


@pytest.mark.parametrize(
    ("name", "at", "beyond", "verdict"),
    [
        ("randomness", {"change": 0.0}, {"change": 1e-9}, "invalid"),
        ("batch-dependence", {"change": 1e-3}, {"change": 1.1e-3}, "invalid"),
        ("autograd-mode", {"change": 1e-3}, {"change": 1.1e-3}, "invalid"),
        ("missing-gradients", {"gradient": "present"}, {"gradient": "missing"}, "invalid"),
        ("missing-gradients", {"gradient": "present"}, {"gradient": "not finite"}, "invalid"),
        ("missing-gradients", {"not finite": 0}, {"not finite": 1}, "invalid"),
        ("zero-gradients", {"zero margin": 3}, {"zero margin": 4}, "suspicious"),
        ("pixels-at-the-faces", {"dead": 500}, {"dead": 501}, "suspicious"),
        ("finite-differences", {"differ": 16}, {"differ": 17}, "suspicious"),
        ("saturated-softmax", {"zero ce": 3}, {"zero ce": 4}, "suspicious"),
        ("saturated-softmax", {"certain": 57}, {"certain": 58}, "suspicious"),
        ("loss-gap", {"ce": 26}, {"ce": 27}, "suspicious"),
        ("loss-gap", {"dlr": 14}, {"dlr": 13}, "suspicious"),
        ("single-step", {"single step": 17}, {"single step": 16}, "suspicious"),
        ("black-box", {"square only": 3}, {"square only": 4}, "suspicious"),
        ("transfer", {"transfer only": 3}, {"transfer only": 4}, "suspicious"),
        ("unbounded", {"survived": 3}, {"survived": 4}, "suspicious"),
        ("more-work", {"broken": 3}, {"broken": 4}, "suspicious"),
        ("binarization", {"found": 58}, {"found": 57}, "suspicious"),
    ],
)
def test_thresholds_hold_to_the_example(name, at, beyond, verdict):
    assert _verdict(name, **at) == "ok"
    assert _verdict(name, **beyond) == verdict


def test_every_diagnostic_has_a_threshold_test():
    """A new entry of the table must say where it begins to speak."""
    marks = test_thresholds_hold_to_the_example.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(BY_NAME)


def test_a_share_needs_examples():
    assert _verdict("unbounded", n=4, survived=FEWEST - 1) == "ok"
    assert _verdict("unbounded", n=4, survived=FEWEST) == "suspicious"


def test_tasks_that_random_points_solve_are_not_judged():
    assert _verdict("binarization", found=0, random=32) == "suspicious"
    assert _verdict("binarization", found=0, random=33) == "ok"


def test_losses_that_do_not_apply_are_not_missed():
    evidence = {name: value for name, value in SOUND["loss-gap"].items() if name != "dlr"}
    assert BY_NAME["loss-gap"].judge(evidence).verdict == "ok"
    assert "dlr" not in BY_NAME["loss-gap"].judge(evidence).sentence


@pytest.mark.parametrize("diagnostic", TABLE, ids=lambda one: one.name)
def test_every_entry_explains_itself(diagnostic):
    """A reader who never saw the code reads these sentences on the board."""
    for words in (diagnostic.looks_for, diagnostic.threshold, diagnostic.judge(SOUND[diagnostic.name]).sentence):
        assert words[0].isupper()
        assert words.endswith((".", ")."))
    head = "Flagged" if not diagnostic.decides else "Invalid" if diagnostic.verdict == "invalid" else "Suspicious"
    assert diagnostic.threshold.startswith(head)


def test_flags_do_not_set_the_status_and_decisions_do():
    flagged = judge_all({**SOUND, "loss-gap": {**SOUND["loss-gap"], "ce": 60}}, examples=64)
    assert (flagged.verdict, flagged.status, flagged.reasons) == ("suspicious", "ok", ())
    assert len(flagged.flags) == 1
    assert "60 with ce" in flagged.flags[0]
    masked = judge_all({**SOUND, "unbounded": {"n": 64, "survived": 60}}, examples=64)
    assert (masked.verdict, masked.status) == ("suspicious", "suspicious")
    assert "60 of 64" in masked.reasons[0]


def test_the_reasons_are_those_of_the_worst_verdict():
    """What breaks the contract explains the rest, which would only bury it."""
    evidence = {
        **SOUND,
        "randomness": {"n": 16, "change": 0.2},
        "single-step": {**SOUND["single-step"], "many steps": 60},
    }
    diagnosis = judge_all(evidence, examples=64)
    assert diagnosis.status == "invalid"
    assert len(diagnosis.reasons) == 1
    assert "draws at random" in diagnosis.reasons[0]


def test_what_was_not_run_says_why_and_accuses_nobody():
    finding = BY_NAME["transfer"].not_run("There are no training images.")
    assert (finding.verdict, finding.sentence) == ("not run", "There are no training images.")
    assert judge_all({**SOUND, "transfer": finding}, examples=64).status == "ok"


def test_a_model_that_does_not_bear_a_measurement_is_suspicious():
    finding = BY_NAME["unbounded"].failed("The model's logits are not finite numbers.")
    assert isinstance(finding, Finding)
    assert judge_all({**SOUND, "unbounded": finding}, examples=64).status == "suspicious"


def test_thresholds_and_budgets_are_frozen():
    """Another threshold or budget is another version: then this digest changes with it, and only then."""
    content = sorted([one.name, one.threshold, one.limit, one.verdict, one.decides] for one in TABLE)
    budgets = [
        {
            name: value
            for name, value in vars(module).items()
            if name.isupper() and isinstance(value, int | float | tuple)
        }
        for module in (measures, surrogates, binarization, gradient_checks)
    ]
    text = json.dumps([content, budgets, EXAMPLES, FEWEST], sort_keys=True)
    assert (VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (2, "1019bd4c0f7108a1")
