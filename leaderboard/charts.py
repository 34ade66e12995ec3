"""What the site draws, as numbers: the sandwich of a record and the interval beside each value.

Geometry is given as percentages of the drawing's width, so that an SVG without a view box stretches while its text and
line widths stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from robustboard.leaderboard.metrics import Metric
from robustboard.leaderboard.schema import Record

LAYERS = (
    ("certified", "certified", "proven: no allowed perturbation changes the class"),
    ("undecided", "undecided", "survived every attack, yet not proven"),
    ("broken", "broken", "an allowed perturbation changes the class"),
    ("misclassified", "misclassified", "wrong before any attack"),
)
"""The layers of a sandwich from left to right: verdict, label, meaning."""


@dataclass(frozen=True)
class Segment:
    """One layer of a sandwich.

    Attributes:
        start: the left end, in percent of the width.
        width: in percent of the width.
        count: how many examples.
        share: in percent, with one decimal, for the reader.
    """

    verdict: str
    label: str
    start: str
    width: str
    count: int
    share: str


@dataclass(frozen=True)
class Span:
    """An interval and the value in it, as percentages of the width."""

    low: str
    value: str
    high: str


def sandwich(record: Record) -> tuple[Segment, ...]:
    """The layers of a record's examples from certified to misclassified; together they fill the width."""
    metrics, n = record.metrics, record.n
    correct, held, proven = (round(metrics[name].value * n) for name in ("clean", "robust", "certified"))
    ends = (0, proven, held, correct, n)
    return tuple(
        Segment(verdict, label, position(low / n), position((high - low) / n), high - low, percent((high - low) / n))
        for (verdict, label, _), low, high in zip(LAYERS, ends, ends[1:], strict=False)
    )


def span(metric: Metric) -> Span:
    """Where to draw a metric's interval and value."""
    return Span(position(metric.low), position(metric.value), position(metric.high))


def position(share: float) -> str:
    """A share as a percentage for an SVG attribute.

    >>> position(1 / 3)
    '33.333%'
    """
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def percent(share: float) -> str:
    """A share in percent as the reader sees it, with one decimal and no sign.

    >>> percent(0.8421)
    '84.2'
    """
    return f"{100 * share:.1f}"
