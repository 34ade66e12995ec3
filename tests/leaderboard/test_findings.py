"""Findings in a record: the worst verdict wins, flags decide nothing, and a page explains or shows what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from robustboard.leaderboard.findings import KEY, Diagnosis, Finding, read_diagnosis
from robustboard.leaderboard.record import Record
from robustboard.leaderboard.site import render_site

Build = Callable[..., Record]


def finding(verdict: str = "ok", *, decides: bool = True, name: str = "unbounded", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "looks_for": f"What {name} looks for.",
        "threshold": f"When {name} speaks.",
        "verdict": verdict,
        "decides": decides,
        "sentence": f"What {name} found.",
        "evidence": {"n": 64, "share": 0.5, "gradient": "present"},
    } | changes


def diagnosis(*findings: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "examples": 64, "findings": list(findings)}


@pytest.mark.parametrize(
    ("verdicts", "verdict", "status"),
    [
        ([], "ok", "ok"),
        ([("ok", True), ("not run", True)], "ok", "ok"),
        ([("suspicious", False)], "suspicious", "ok"),
        ([("suspicious", True), ("ok", True)], "suspicious", "suspicious"),
        ([("suspicious", True), ("invalid", True), ("suspicious", False)], "invalid", "invalid"),
    ],
)
def test_the_worst_verdict_wins_and_flags_decide_nothing(
    verdicts: list[tuple[str, bool]], verdict: str, status: str
) -> None:
    found = Diagnosis.model_validate(diagnosis(*(finding(one, decides=decides) for one, decides in verdicts)))
    assert (found.verdict, found.status) == (verdict, status)
    assert bool(found.reasons) == (status != "ok")
    assert len(found.flags) == sum(not decides for one, decides in verdicts if one != "ok")


def test_a_diagnosis_survives_the_record(scored: Build) -> None:
    content = diagnosis(finding(), finding("suspicious", decides=False, name="loss-gap"))
    record = scored(diagnostics={KEY: content})
    read = read_diagnosis(record.diagnostics)
    assert read is not None
    assert read.model_dump(mode="json") == content
    assert read.findings[0].evidence["n"] == 64
    assert isinstance(read.findings[0].evidence["n"], int)


@pytest.mark.parametrize("content", [{}, {KEY: []}, {KEY: {"version": 1}}, {KEY: diagnosis({"name": "only"})}])
def test_what_cannot_be_read_is_none(content: dict[str, Any]) -> None:
    assert read_diagnosis(content) is None


@pytest.mark.parametrize("changes", [{"verdict": "fine"}, {"evidence": {"n": float("nan")}}, {"sentence": "x" * 2001}])
def test_a_finding_is_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Finding.model_validate(finding(**changes))


def test_the_page_explains_every_finding(scored: Build) -> None:
    content = diagnosis(finding(), finding("suspicious", decides=False, name="loss-gap"))
    page = render_site([scored(diagnostics={KEY: content, "autoattack": []})])["index.html"].decode()
    for name in ("unbounded", "loss-gap"):
        for words in (f"What {name} looks for.", f"When {name} speaks.", f"What {name} found."):
            assert words in page
    assert '<span class="verdict">flagged</span>' in page
    assert '<span class="sign suspicious">flag</span>' in page
    assert "&#34;findings&#34;" not in page, "what is explained is not printed as JSON as well"


def test_a_page_without_flags_has_no_badge(scored: Build) -> None:
    page = render_site([scored(diagnostics={KEY: diagnosis(finding())})])["index.html"].decode()
    assert "flagged</span>" not in page


def test_hostile_findings_are_inert(scored: Build) -> None:
    attack = '"><script>alert(1)</script>'
    bad = finding("suspicious", decides=False, name=attack, looks_for=attack, sentence=attack, threshold=attack)
    page = render_site([scored(diagnostics={KEY: diagnosis(bad)})])["index.html"].decode()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4


def test_what_is_not_understood_is_shown_as_it_stands(scored: Build) -> None:
    page = render_site([scored(diagnostics={KEY: {"older": "form"}})])["index.html"].decode()
    assert "older" in page
