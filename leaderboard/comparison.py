"""Two defenses on the examples they share: who holds where, the difference with its interval, and the exact test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import pandas as pd

from robustboard.errors import RecordError
from robustboard.leaderboard.schema import Record
from robustboard.leaderboard.statistics import Flags, mcnemar_exact, paired_difference

SHARES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "clean": ("broken", "certified", "undecided"),
        "robust": ("certified", "undecided"),
        "certified": ("certified",),
    }
)
"""The shares that can be compared pair by pair, with the verdicts that count for each."""


@dataclass(frozen=True)
class Comparison:
    """Two records on the same track.

    Attributes:
        share: which share of the examples is compared, one of `SHARES`.
        n: how many examples both were scored on.
        first, second: the two shares.
        difference: the first less the second.
        low, high: its 95 % limits (Tango's score interval).
        only_first: how many examples the first alone holds on.
        only_second: how many the second alone holds on.
        p_value: of McNemar's exact test, two-sided.
    """

    share: str
    n: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def compare_records(first: Record, second: Record, *, share: str = "robust") -> Comparison:
    """Compare two records of one track on the examples that they share.

    Raises:
        RecordError: if the tracks differ, no example is shared, or a record came without its outcome table.
    """
    if share not in SHARES:
        raise RecordError(f"The share {share!r} cannot be compared; choose from {', '.join(SHARES)}.")
    if (first.track.id, first.track.hash) != (second.track.id, second.track.hash):
        raise RecordError(
            f"The records are of different tracks, {_named(first)} and {_named(second)}, so their numbers do not "
            "compare; score both defenses on one track."
        )
    held = shared_flags([first, second], share)
    n = held.shape[1]
    if n == 0:
        raise RecordError("The two records share no example, so there is nothing to compare.")
    test = mcnemar_exact(held[0], held[1])
    return Comparison(
        share,
        n,
        int(held[0].sum()) / n,
        int(held[1].sum()) / n,
        *paired_difference(held[0], held[1]),
        *test,
    )


def shared_flags(records: Sequence[Record], share: str) -> Flags:
    """Where each record holds on the examples that all of them share, boolean (records, examples)."""
    columns = []
    for record in records:
        outcomes = record.outcomes.sort_values("index", kind="stable")
        # Test sets contain the odd duplicate image: its copies are told apart by their order.
        copy = outcomes.groupby("example").cumcount()
        held = outcomes["verdict"].isin(SHARES[share]).to_numpy(bool)
        columns.append(pd.Series(held, index=pd.MultiIndex.from_arrays([outcomes["example"], copy])))
    if not columns:
        return np.empty((0, 0), dtype=bool)
    return pd.concat(columns, axis=1, join="inner").to_numpy(bool).T


def _named(record: Record) -> str:
    return f"{record.track.id} ({record.track.hash[:12]})"
