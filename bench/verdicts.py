"""The verdicts of one evaluation while they are being made, one row an example in the track's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from robustboard.attacks import autoattack

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def flags(rows: Sequence[np.int64] | Rows, count: int) -> Flags:
    """Which of `count` examples are among `rows`."""
    chosen = np.zeros(count, dtype=bool)
    chosen[np.asarray(rows, dtype=np.int64)] = True
    return chosen


ATTACKS = ("pgd", *autoattack.STAGES)
COMPLETE = "complete"


@dataclass(frozen=True)
class Contradiction:
    """An example that one method certified and another broke."""

    row: int
    certified_by: str
    broken_by: str


@dataclass
class Verdicts:
    """What is known of each example so far.

    Attributes:
        hashes: the content hash of each example.
        labels: (N,) int64.
        clean: whether the clean image is classified correctly.
        survived: for each attack a nullable column; true is still correct, null is not run. Complete verification has
            one when it ran.
        autoattack: whether the example survived the reference engine; null where that did not run in full.
        excluded: (N, K), the classes that are proven out of each example's reach; None before any bound.
        adversarial: the perturbed image that broke an example, by row.
        corrupted: by column, which corrupted images are classified correctly.
        robust_corrupted: by column, which corrupted images were attacked, and which of these held.
    """

    hashes: Sequence[str]
    labels: npt.NDArray[np.int64]
    clean: Flags = field(init=False)
    survived: dict[str, pd.Series] = field(init=False)
    autoattack: pd.Series = field(init=False)
    broken_by: list[str | None] = field(init=False)
    certified_by: list[str | None] = field(init=False)
    margins: npt.NDArray[np.float64] = field(init=False)
    excluded: Flags | None = field(init=False, default=None)
    adversarial: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    corrupted: dict[str, Flags] = field(default_factory=dict)
    robust_corrupted: dict[str, tuple[Flags, Flags]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.labels)
        self.clean = np.zeros(count, dtype=bool)
        self.survived = {attack: self._nulls() for attack in ATTACKS}
        self.autoattack = self._nulls()
        self.broken_by = [None] * count
        self.certified_by = [None] * count
        self.margins = np.full(count, np.nan)

    def _nulls(self) -> pd.Series:
        return pd.Series([pd.NA] * len(self.labels), dtype="boolean")

    @property
    def broken(self) -> Flags:
        """Which examples some attack broke."""
        return np.array([name is not None for name in self.broken_by], dtype=bool)

    @property
    def certified(self) -> Flags:
        """Which examples some bound proved."""
        return np.array([name is not None for name in self.certified_by], dtype=bool)

    @property
    def open(self) -> Flags:
        """Which correctly classified examples are neither broken nor certified."""
        return self.clean & ~self.broken & ~self.certified

    def attacked(self, attack: str, rows: Rows, broken: Flags, images: npt.NDArray[np.float32]) -> None:
        """Enter an attack's confirmed result for `rows`: images (len(rows), C, H, W)."""
        if attack not in self.survived:
            self.survived[attack] = self._nulls()
        self.survived[attack].iloc[rows] = ~broken
        for row, image in zip(rows[broken], images[broken], strict=True):
            if self.broken_by[row] is None:
                self.broken_by[row] = attack
                self.adversarial[int(row)] = image.copy()

    def bounded(self, method: str, rows: Rows, certified: Flags, margins: npt.NDArray[np.float32]) -> None:
        """Enter a bound's result for `rows`: margins (len(rows), K), +inf at the label."""
        for row, lower in zip(rows[certified], margins[certified].min(axis=1), strict=True):
            self.certified_by[row] = method
            self.margins[row] = lower

    def exclude(self, rows: Rows, classes: Flags) -> None:
        """Enter that `classes`, (len(rows), K), are proven out of reach of `rows`."""
        if self.excluded is None:
            self.excluded = np.zeros((len(self.labels), classes.shape[1]), dtype=bool)
        self.excluded[rows] |= classes

    def contradictions(self) -> list[Contradiction]:
        """The examples that are both certified and broken."""
        return [
            Contradiction(row, proof, attack)
            for row, (proof, attack) in enumerate(zip(self.certified_by, self.broken_by, strict=True))
            if proof is not None and attack is not None
        ]

    def table(self) -> pd.DataFrame:
        """The outcome table; see `robustboard.leaderboard.outcomes` for its schema."""
        verdict = np.select(
            [~self.clean, self.broken, self.certified], ["misclassified", "broken", "certified"], "undecided"
        )
        columns: dict[str, object] = {
            "example": pd.Series(list(self.hashes), dtype="string"),
            "index": np.arange(len(self.labels), dtype=np.int64),
            "label": self.labels,
            "clean": self.clean,
            **self.survived,
            "autoattack": self.autoattack,
            "broken_by": pd.Series(self.broken_by, dtype="string"),
            "certified": self.certified,
            "certified_by": pd.Series(self.certified_by, dtype="string"),
            "margin_lower": self.margins,
            "verdict": pd.Series(verdict, dtype="string"),
            **self.corrupted,
            **{
                column: pd.Series(held, dtype="boolean").where(attacked)
                for column, (attacked, held) in self.robust_corrupted.items()
            },
        }
        return pd.DataFrame(columns)
