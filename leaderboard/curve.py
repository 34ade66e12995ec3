"""The sandwich over a range of radii: clean, robust and certified accuracy of one network at every eps of a grid.

Two numbers an example hold all of it: the largest radius at which it is certified and the smallest at which it is
broken. Everything else follows, because a smaller ball lies inside a larger one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustboard.leaderboard.metrics import Metric
from robustboard.leaderboard.statistics import wilson


@dataclass(frozen=True)
class Reach:
    """How far one example is decided.

    Attributes:
        example: its content hash.
        label: its class.
        clean: whether it is classified correctly.
        certified: the place in the grid of the largest radius at which it is certified; None for none.
        broken: the place of the smallest radius at which it is broken; None for none.
    """

    example: str
    label: int
    clean: bool
    certified: int | None
    broken: int | None


@dataclass(frozen=True)
class Point:
    """The sandwich at one radius.

    Attributes:
        eps: as the field writes it.
        radius: as a number, for drawing.
    """

    eps: str
    radius: float
    robust: Metric
    certified: Metric

    @property
    def undecided(self) -> float:
        """The share that is neither certified nor broken."""
        return self.robust.value - self.certified.value


@dataclass(frozen=True)
class Curve:
    """What `robustboard curve` traced.

    Attributes:
        track: id, hash, norm and eps of the track whose protocol was followed.
        defense: name, title and the sha256 of the weights.
        grid: the radii, ascending, as (text, number).
        reaches: one an example, in the track's order.
        work: (example, radius) pairs `judged`, and `attacked` by every attack, and at least how many runs at each
            radius by itself would have taken, `judged_without_reuse` and `attacked_without_reuse`.
        audit: the crossings of the audit.
        seeds: of training and attacks.
        bound_methods: those that could run.
        notes: what limits a result.
    """

    track: Mapping[str, str]
    defense: Mapping[str, str]
    grid: Sequence[tuple[str, float]]
    reaches: Sequence[Reach]
    work: Mapping[str, int]
    audit: Mapping[str, int]
    seeds: Mapping[str, int]
    bound_methods: Sequence[str]
    notes: Sequence[str]

    @property
    def clean(self) -> Metric:
        """The clean accuracy, where every curve starts."""
        return _share(sum(reach.clean for reach in self.reaches), len(self.reaches))

    @property
    def points(self) -> list[Point]:
        """The sandwich at every radius of the grid, ascending."""
        n = len(self.reaches)
        return [
            Point(
                text,
                radius,
                _share(sum(_unbroken(reach, place) for reach in self.reaches), n),
                _share(sum(reach.certified is not None and reach.certified >= place for reach in self.reaches), n),
            )
            for place, (text, radius) in enumerate(self.grid)
        ]

    @property
    def saved(self) -> dict[str, float]:
        """The shares of `judged` and `attacked` pairs that were saved, against a run at each radius by itself."""
        shares = {}
        for name in ("judged", "attacked"):
            alone = self.work[f"{name}_without_reuse"]
            # The last attacks also run on what they then break, which the comparison leaves out.
            shares[name] = max(0.0, 1 - self.work[name] / alone) if alone else 0.0
        return shares

    def to_json(self) -> str:
        """The curve as JSON; equal curves give equal text."""
        texts = [text for text, _ in self.grid]
        content: dict[str, Any] = {
            "track": dict(self.track),
            "defense": dict(self.defense),
            "n": len(self.reaches),
            "clean": self.clean.model_dump(),
            "points": [
                {
                    "eps": point.eps,
                    "robust": point.robust.model_dump(),
                    "certified": point.certified.model_dump(),
                    "undecided": point.undecided,
                }
                for point in self.points
            ],
            "examples": [
                {
                    "example": reach.example,
                    "label": reach.label,
                    "clean": reach.clean,
                    "certified_to": None if reach.certified is None else texts[reach.certified],
                    "broken_from": None if reach.broken is None else texts[reach.broken],
                }
                for reach in self.reaches
            ],
            "work": {**self.work, "saved": self.saved},
            "audit": dict(self.audit),
            "seeds": dict(self.seeds),
            "bound_methods": list(self.bound_methods),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _unbroken(reach: Reach, place: int) -> bool:
    return reach.clean and (reach.broken is None or reach.broken > place)


def _share(successes: int, trials: int) -> Metric:
    low, high = wilson(successes, trials)
    return Metric(value=successes / trials, n=trials, low=low, high=high)
