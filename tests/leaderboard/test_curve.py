"""The curve's numbers and its drawing: what follows from how far each example is decided."""

from __future__ import annotations

import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustboard.leaderboard.curve import Curve, Reach
from robustboard.leaderboard.curve_chart import curve_svg

GRID = [("1/40", 0.025), ("1/20", 0.05), ("1/10", 0.1)]


def make(reaches: list[Reach], *, title: str = "PGD", grid: list[tuple[str, float]] = GRID) -> Curve:
    return Curve(
        track={"id": "digits-linf@1", "hash": "3f" * 32, "norm": "linf", "eps": "1/20"},
        defense={"name": "pgd-at", "title": title, "checkpoint_sha256": "ab" * 32},
        grid=grid,
        reaches=reaches,
        work={"judged": 6, "judged_without_reuse": 8, "attacked": 3, "attacked_without_reuse": 2},
        audit={"broken_bounded": 1, "certified_attacked": 2},
        seeds={"training": 0},
        bound_methods=["crown"],
        notes=[],
    )


REACHES = [
    Reach("00" * 32, 0, True, 2, None),
    Reach("11" * 32, 1, True, 0, 2),
    Reach("22" * 32, 2, True, None, 0),
    Reach("33" * 32, 3, False, None, None),
]


def test_the_points_count_what_reaches_each_radius() -> None:
    curve = make(REACHES)
    assert curve.clean.value == 0.75
    assert [(p.certified.value, p.robust.value, p.undecided) for p in curve.points] == [
        (0.5, 0.5, 0),
        (0.25, 0.5, 0.25),
        (0.25, 0.25, 0),
    ]


@st.composite
def reach(draw: st.DrawFn) -> Reach:
    if not draw(st.booleans()):
        return Reach("ab" * 32, 0, False, None, None)
    certified = draw(st.integers(-1, 2))
    broken = draw(st.integers(certified + 1, 3))
    return Reach("ab" * 32, 0, True, certified if certified >= 0 else None, broken if broken < 3 else None)


@given(st.lists(reach(), min_size=1, max_size=40))
def test_the_sandwich_holds_at_every_radius_and_narrows_downwards(reaches: list[Reach]) -> None:
    curve = make(reaches)
    robust = [curve.clean.value, *(point.robust.value for point in curve.points)]
    certified = [curve.clean.value, *(point.certified.value for point in curve.points)]
    assert all(low <= high for low, high in zip(certified, robust, strict=True))
    assert (np.diff(robust) <= 0).all()
    assert (np.diff(certified) <= 0).all()


def test_the_json_says_how_far_each_example_is_decided() -> None:
    content = json.loads(make(REACHES).to_json())
    assert [one["certified_to"] for one in content["examples"]] == ["1/10", "1/40", None, None]
    assert [one["broken_from"] for one in content["examples"]] == [None, "1/10", "1/40", None]
    assert content["work"]["saved"] == {"judged": 0.25, "attacked": 0.0}
    assert [point["eps"] for point in content["points"]] == ["1/40", "1/20", "1/10"]


def _svg(curve: Curve) -> ElementTree.Element:
    return ElementTree.fromstring(curve_svg(curve))


def test_the_layers_fill_the_drawing_from_certified_to_misclassified() -> None:
    space = "{http://www.w3.org/2000/svg}"
    paths = _svg(make(REACHES)).findall(f"{space}path")
    assert [path.get("class") for path in paths] == ["certified", "undecided", "broken", "misclassified"]
    outlines = [re.findall(r"([\d.]+),([\d.]+)", path.get("d") or "") for path in paths]
    for below, above in itertools.pairwise(outlines):
        half = len(below) // 2
        assert below[:half] == above[half:][::-1], "one layer's upper edge is the next one's lower edge"
    assert len({y for _, y in outlines[0][4:]}) == 1, "the lowest edge is the axis"


def test_every_radius_is_marked_with_its_interval_and_named() -> None:
    text = curve_svg(make(REACHES))
    for eps, _ in GRID:
        assert f"certified at ε = {eps}" in text
        assert f"robust at ε = {eps}" in text
    assert text.count('class="own"') == 1
    assert curve_svg(make(REACHES)) == text


def test_labels_that_would_overlap_are_left_out() -> None:
    grid = [(f"{step}/1000", step / 1000) for step in range(1, 101)]
    labels = [element.text for element in _svg(make(REACHES, grid=grid)).iter()]
    shown = [text for text in labels if text and re.fullmatch(r"\d+/1000", text)]
    assert 5 <= len(shown) <= 20


@pytest.mark.parametrize("title", ["<script>alert(1)</script>", "a & b", '"quoted"'])
def test_a_title_is_text_and_nothing_else(title: str) -> None:
    root = _svg(make(REACHES, title=title))
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert any((element.text or "").startswith(title) for element in root.iter())
