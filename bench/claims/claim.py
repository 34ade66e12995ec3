"""A claim of a paper as an experiment: the paper's numbers, how we measure, and the rule that gives the verdict.

A rule is written before its experiment is run and is stored with the result, so that a rule which was changed
afterwards shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from robustboard.leaderboard.statistics import wilson

if TYPE_CHECKING:
    from robustboard.bench.claims.laboratory import Laboratory
    from robustboard.leaderboard.record import Record

Verdict = Literal[
    "reproduced",
    "not reproduced",
    "broken under the protocol",
    "not transferred",
    "refuted by the paper",
]
VERDICTS: Mapping[Verdict, str] = {
    "reproduced": "Our number supports the claim, and nothing that the protocol measures speaks against it.",
    "not reproduced": "Under the paper's own measure our number does not support the claim.",
    "broken under the protocol": "Reproduced under the paper's own measure, and gone under the protocol's attacks.",
    "not transferred": "Our data or network is not the paper's, and the effect does not show on it.",
    "refuted by the paper": "What is commonly said of the paper is contradicted by the paper itself.",
}
Unit = Literal["share", "points", "ratio", "seconds", "count", "number"]
Under = Literal["paper", "protocol", "control"]

_ID = re.compile(r"[a-z0-9]+(-[a-z0-9.]+)*")
_Z = 1.959963984540054


@dataclass(frozen=True)
class Measurement:
    """One number that a command produced.

    Attributes:
        what: the quantity, in words.
        value: the number.
        n: how many examples, attempts or runs are behind it.
        low: the lower end of its 95 % interval; `value` itself where there is no sampling.
        high: the upper end.
        unit: `share` lies in [0, 1]; `points` are hundredths of a share.
        under: whose measure it is: the paper's, the protocol's, or that of a control row.
    """

    what: str
    value: float
    n: int
    low: float
    high: float
    unit: Unit = "share"
    under: Under = "paper"

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, self.low, self.high)):
            raise ValueError(f"{self.what}: a measurement must be finite, not {self.value} [{self.low}, {self.high}]")
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.what}: {self.value} lies outside its interval [{self.low}, {self.high}]")
        if self.unit not in get_args(Unit) or self.under not in get_args(Under):
            raise ValueError(f"{self.what}: unit {self.unit!r} or measure {self.under!r} is unknown")
        if self.n < 1:
            raise ValueError(f"{self.what}: nothing was measured")

    def text(self) -> str:
        """The number as people read it.

        >>> Measurement("robust", 0.5, 200, 0.432, 0.568).text()
        '50.0 % [43.2, 56.8], n = 200'
        >>> Measurement("gain", 1.25, 3, 1.25, 1.25, unit="points").text()
        '+1.25 points, n = 3'
        """
        scale, digits, sign, unit = {
            "share": (100.0, ".1f", "", " %"),
            "points": (1.0, ".2f", "+", " points"),
            "ratio": (1.0, ".3g", "", " times"),
            "seconds": (1.0, ".3g", "", " s"),
            "count": (1.0, ".4g", "", ""),
            "number": (1.0, ".4g", "", ""),
        }[self.unit]
        number = format(scale * self.value, sign + digits) + unit
        if self.low < self.high:
            number += f" [{format(scale * self.low, digits)}, {format(scale * self.high, digits)}]"
        return f"{number}, n = {self.n}"


@dataclass(frozen=True)
class PaperNumber:
    """What the paper says: a number or words, and where it says so (`from memory` where no source was at hand)."""

    what: str
    value: float | str
    source: str


@dataclass(frozen=True)
class PaperClaim:
    """One claim and its experiment.

    Attributes:
        id: `[a-z0-9-]+`, beginning with the method.
        defense: the registry's name of the method that it is about.
        statement: what is claimed, one sentence.
        paper: the paper's numbers.
        data: which data the experiment uses, and how it differs from the paper's.
        rule: the verdict's rule in words, with its thresholds.
        measure: runs the experiment; the keys of its answer are what `judge` reads.
        judge: the rule; a pure function.
        note: what a reader must know besides.
    """

    id: str
    defense: str
    statement: str
    paper: tuple[PaperNumber, ...]
    data: str
    rule: str
    measure: Callable[[Laboratory], Mapping[str, Measurement]]
    judge: Callable[[Mapping[str, Measurement]], Verdict]
    note: str = ""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"{self.id!r} is not a claim id")


def share(what: str, flags: Any, *, under: Under = "paper") -> Measurement:
    """The share of true flags, with Wilson's interval.

    >>> share("broken", [True, False, True, True]).text()
    '75.0 % [30.1, 95.4], n = 4'
    """
    values = _booleans(flags)
    low, high = wilson(int(values.sum()), len(values))
    return Measurement(what, float(values.mean()), len(values), low, high, "share", under)


def number(
    what: str,
    value: float,
    n: int,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: Unit = "number",
    under: Under = "paper",
) -> Measurement:
    """A number that is not a share; without limits it stands alone."""
    value = float(value)
    return Measurement(
        what, value, n, value if low is None else float(low), value if high is None else float(high), unit, under
    )


def mean(what: str, values: Any, *, unit: Unit = "number", under: Under = "paper") -> Measurement:
    """The mean of several numbers with its normal 95 % interval; one number stands alone."""
    numbers = np.asarray(values, dtype=float).ravel()
    half = _Z * float(numbers.std(ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0
    centre = float(numbers.mean())
    return Measurement(what, centre, len(numbers), centre - half, centre + half, unit, under)


def paired_difference(what: str, first: Any, second: Any, *, under: Under = "paper") -> Measurement:
    """How much larger the share of `first` is than that of `second` on the same examples, in points.

    The interval is the normal one for paired outcomes.

    >>> paired_difference("gain", [True, True, False, True], [True, False, False, False]).text()
    '+50.00 points [-6.58, 106.58], n = 4'
    """
    difference = _booleans(first).astype(float) - _booleans(second).astype(float)
    return mean(what, 100 * difference, unit="points", under=under)


def from_metric(what: str, record: Record, metric: str) -> Measurement:
    """A metric of a record: the number under the protocol.

    Raises:
        KeyError: if the record has no such metric.
    """
    found = record.metrics[metric]
    return Measurement(what, found.value, found.n, found.low, found.high, "share", "protocol")


def _booleans(flags: Any) -> npt.NDArray[np.bool_]:
    values: npt.NDArray[np.bool_] = np.asarray(flags, dtype=bool).ravel()
    return values
