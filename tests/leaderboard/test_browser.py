"""The site in a real browser, opened from the disk: inert, sortable, readable, at every width."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from robustboard.leaderboard.record import Record
from robustboard.leaderboard.site import build_site

pytestmark = pytest.mark.browser

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        sentence = f"there is no browser at {CHROMIUM}; install Debian's chromium"
        if os.environ.get("ROBUSTBOARD_REQUIRE_DATA") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_site(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Build a site and open it; any console message, script error or request away from its file fails the test."""
    problems: list[str] = []
    contexts = []

    def visit(records: list[Record], *, title: str = "RobustBoard", **options: Any) -> Page:
        index = build_site(records, tmp_path / "site", title=title)
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                problems.append(f"request: {request.url}")
                if not request.url.startswith((index.as_uri(), "data:image/svg+xml"))
                else None
            ),
        )
        page.goto(index.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def names(page: Page) -> list[str]:
    return page.locator("table.board").first.locator("tbody .entry .name").all_inner_texts()


RANKED = [
    "Adversarial training with PGD",
    "TRADES: trading off accuracy for robustness",
    "CROWN-IBP",
    "Standard training",
]


def test_the_headings_sort_from_the_keyboard(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board)
    assert names(page) == RANKED
    heading = page.get_by_role("columnheader", name="Certified").first
    heading.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert names(page) == [RANKED[2], RANKED[1], RANKED[0], RANKED[3]]
    assert heading.get_attribute("aria-sort") == "descending"
    assert page.get_by_role("status").inner_text() == "Sorted by Certified, descending"
    page.keyboard.press("Space")
    assert names(page) == [RANKED[3], RANKED[0], RANKED[1], RANKED[2]]
    assert heading.get_attribute("aria-sort") == "ascending"
    assert page.locator("[aria-sort]").count() == 1, "a table is sorted by one column at a time"


def test_the_defense_column_sorts_by_name(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board)
    page.get_by_role("columnheader", name="Defense").first.get_by_role("button").click()
    assert names(page) == sorted(RANKED, key=str.lower)


def test_every_control_is_reached_with_tab_and_shows_its_focus(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board)
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.tagName, e.innerText.trim(), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0] }"
        )
        if seen[0] == "BODY":
            break
        reached.append(seen)
    assert all(visible for _, _, visible in reached), reached
    texts = [" ".join(text.split()) for _, text, _ in reached]
    assert reached[0][1] == "Skip to the boards"
    for wanted in ("CSV of digits-linf@1", "Clean", "Details of CROWN-IBP", "The same as a table"):
        assert wanted in texts


def test_details_open_from_the_keyboard(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board)
    page.locator("tbody .more summary").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("12 broken examples bounded").first.is_visible()


def test_without_javascript_the_sorted_table_is_there(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board, java_script_enabled=False)
    assert names(page) == RANKED
    assert page.locator("table.board > thead").first.inner_text().split("\t")[0].strip() == "Rank"
    page.locator("tbody .more summary").first.click()
    assert page.get_by_text("12 broken examples bounded").first.is_visible()


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1100, 1280, 1600])
def test_no_width_scrolls_the_page_sideways(width: int, small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board, viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_phone_sorts_by_a_menu(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board, viewport=PHONE)
    page.get_by_label("Sort by").first.select_option(label="Certified")
    assert names(page) == [RANKED[2], RANKED[1], RANKED[0], RANKED[3]]
    assert page.get_by_role("row").count() > 8, "the cards are still a table to a screen reader"


def test_the_heading_row_stays_in_sight_on_a_desktop(scored: Callable[..., Record], open_site: Open) -> None:
    page = open_site([scored(f"d{place}", {"n": 40, "seed": place}) for place in range(30)])
    page.evaluate("document.querySelectorAll('table.board tbody')[20].scrollIntoView({behavior: 'instant'})")
    box = page.get_by_role("columnheader", name="Clean").first.bounding_box()
    assert box is not None
    assert 0 <= box["y"] < 5


CONTRAST = """
() => {
  const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const read = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = read(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c } };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.closest('svg, script, style')) continue;
    const [a, b] = [light(read(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.className || e.tagName]);
  }
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(scheme: str, small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) > 200
    assert [found for found in ratios if found[0] < 4.5] == []
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")
    assert (int(grounds[0]) < 64) == (scheme == "dark")


def test_the_bars_fill_their_width_in_the_order_of_the_sandwich(small_board: list[Record], open_site: Open) -> None:
    page = open_site(small_board)
    for place, bar in enumerate(page.locator("svg.bar").all()):
        rects = bar.evaluate(
            "svg => [...svg.querySelectorAll('rect')].map(r => [r.className.baseVal, r.getBBox().x, r.getBBox().width])"
        )
        total = bar.evaluate("svg => svg.getBoundingClientRect().width")
        order = ["certified", "undecided", "broken", "misclassified"]
        assert [kind for kind, _, _ in rects] == [kind for kind in order if kind in {kind for kind, _, _ in rects}]
        assert rects[-1][1] + rects[-1][2] == pytest.approx(total, abs=0.5)
        for before, after in itertools.pairwise(rects):
            assert before[1] + before[2] == pytest.approx(after[1], abs=0.5)
        certified = sum(width for kind, _, width in rects if kind == "certified") / total
        assert certified == pytest.approx(small_board[place].metrics["certified"].value, abs=0.002)


def test_hostile_records_are_inert_and_do_not_break_the_page(small_board: list[Record], open_site: Open) -> None:
    hostile = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)>\u202e" + "A" * 10_000
    first = small_board[0]
    # The schema refuses such lengths; the page must not depend on it.
    defense = first.defense.model_copy(
        update={"title": hostile, "paper": "javascript:alert(1)", "summary": hostile, "authors": (hostile,)}
    )
    record = first.model_copy(update={"defense": defense, "notes": (hostile,), "diagnostics": {hostile: hostile}})
    for viewport in (PHONE, DESKTOP):
        page = open_site([record, *small_board[1:]], title=hostile[:300], viewport=viewport)
        page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert page.locator("img").count() == 0
        assert page.locator("a[href^=javascript]").count() == 0
        assert page.locator("tbody .entry .name").first.bounding_box()["height"] < 120  # type: ignore[index]
