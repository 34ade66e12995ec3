"""The paper plan of docs/cluster.md: its tables follow from its inputs, and these are what the cited pages say."""

from __future__ import annotations

import re
from pathlib import Path

import plan
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_the_tables_of_the_page_are_those_of_the_script():
    assert plan.filled(PAGE) == PAGE
    assert plan.filled(PAGE.replace("| cascade | float32 |", "| cascade | float16 |")) == PAGE


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match="plan: storage"):
        plan.filled(PAGE.replace(plan.END.format("storage"), ""))


def _row(page: str, head: str, *, under: str) -> dict[str, str]:
    """The cells of a line by the heads of its table."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    heads, cells = (
        next([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith(f"| {first} |"))
        for first in (under, head)
    )
    return dict(zip(heads, cells, strict=True))


def _sum(cell: str) -> float:
    return float(sum(int(number) for number in re.findall(r"\d+", cell.replace(",", ""))))


def test_measured_passes_are_those_of_the_cited_pages():
    certified, undefended = (
        _row("performance.md", head, under="network") for head in ("CROWN-IBP, MNIST 1/10", "undefended, MNIST 3/10")
    )
    values = {name: given.value for name, given in plan.INPUTS.items()}
    survive = float(certified["AutoAttack"].rstrip("%")) / 100 * int(certified["n"])
    assert values["AutoAttack, an example that survives"] == pytest.approx(_sum(certified["passes"]) / survive)
    assert values["AutoAttack, an example that breaks at once"] == _sum(undefended["passes"]) / int(undefended["n"])
    assert values["cascade, an example that breaks at once"] == _sum(undefended["our passes"]) / int(undefended["n"])
    standard = _row("fast.md", "pgd-at, digits | 1/20", under="network")
    survivors = _sum(standard["standard robust"])
    assert values["cascade, an example that survives uncertified"] == _sum(standard["standard passes"]) / survivors
    spent = re.search(r"spent (\d+) forward and (\d+) backward passes", (ROOT / "docs" / "fast.md").read_text())
    assert values["fast mode, each survivor, the broken included"] == int(spent[1]) + int(spent[2])


def test_hours_by_hand():
    """One cell of the table, without the script's own functions."""
    passes = 5000 * (0.45 * 1_868_330 / 191 + 0.55 * 205.36)
    assert plan.gpu_hours("AutoAttack", "TF32", 0.45) == pytest.approx(10_000 * passes / 2814 / 3600)
    assert plan.passes("fast mode", 0.45) == pytest.approx(5000 * (0.45 * 318 + 75))


def test_numbers_in_the_text_follow_from_the_tables():
    hours = {mode: plan.gpu_hours(mode, "float32", 0.45) for mode in plan.MODES}
    both = hours["fast mode"] + 200 * hours["cascade"] / plan.SUBMISSIONS
    assert f"{hours['cascade'] / plan.SUBMISSIONS:.1f} = {both:,.0f}"[:3] == "5.1"
    assert f"= {round(both, -2):,.0f} GPU-hours" in PAGE
    assert f"{hours['cascade'] / 64 / 24:.0f} days, the fast mode {hours['fast mode'] / 64:.0f} hours" in PAGE
    image = plan.PIXELS * 4
    assert f"{375_000 * image / 1e9:.0f} GB" in PAGE
    assert f"{375_000 * plan.PIXELS / 1e9:.0f} GB" in PAGE
    assert f"are {50_000 * plan.PIXELS / 1e9:.1f} GB in uint8" in PAGE
    journal = plan.EXAMPLES * image * plan.INPUTS["journal at its end"].value
    assert f"**The journal.** {journal / 1e9:.0f} GB" in PAGE
    assert f"{2 * journal * 8 / (3600 * 5.1) / 1e6:.0f} Mbit/s on average" in PAGE
