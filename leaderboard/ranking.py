"""The order of a board: ranks by robust accuracy, with the uncertainty that a finite test set leaves in them.

Defenses are ranked within a track by `robust`. Each rank carries a bootstrap interval over the examples that all of
them were scored on, and defenses that a paired exact test cannot tell from the best of their group share a tie group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from robustboard.leaderboard.comparison import shared_flags
from robustboard.leaderboard.record import Record, in_force, sort_key
from robustboard.leaderboard.statistics import Flags, Paired, mcnemar_exact, rank_intervals

SIGNIFICANCE: Final = 0.05
_SEED: Final = 0


@dataclass(frozen=True)
class Entry:
    """A ranked record.

    Attributes:
        rank: 1 is the best; equal robust accuracies share a rank.
        low: the best rank of the 95 % interval.
        high: the worst rank of the 95 % interval.
        tie_group: 1 for the leader and those that the paired test cannot tell from it, and so on.
    """

    record: Record
    rank: int
    low: int
    high: int
    tie_group: int


@dataclass(frozen=True)
class Board:
    """One track's records in their order.

    Attributes:
        entries: the ranked records, best first.
        apart: suspicious and invalid records, which are not ranked.
        shared: how many examples all ranked records were scored on.
    """

    track_id: str
    track_hash: str
    entries: tuple[Entry, ...]
    apart: tuple[Record, ...]
    shared: int


def boards(records: Iterable[Record]) -> list[Board]:
    """One board for each track, by name, version and hash: the order of `records` does not matter.

    A record that a challenge has lowered gives way to the lowered one where both are there.

    Raises:
        RecordError: if a record came without its outcome table.
    """
    by_track: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(in_force(records), key=sort_key):
        by_track.setdefault((record.track.id, record.track.hash), []).append(record)
    # By name and then version, so that the variants of a track stand behind it.
    return [_board(track, by_track[track]) for track in sorted(by_track, key=lambda key: (key[0].split("@"), key[1]))]


def compare(first: Record, second: Record) -> Paired:
    """The exact paired test of two records' robust accuracy on the examples they share."""
    held = shared_flags([first, second], "robust")
    return mcnemar_exact(held[0], held[1])


def _board(track: tuple[str, str], records: Sequence[Record]) -> Board:
    ranked = sorted((record for record in records if record.status == "ok"), key=_standing)
    apart = tuple(sorted((record for record in records if record.status != "ok"), key=_standing))
    held = shared_flags(ranked, "robust")
    intervals = rank_intervals(held, seed=_SEED) if ranked else []
    values = [record.metrics["robust"].value for record in ranked]
    entries = tuple(
        # The shares on a board differ by whole examples, so equal means equal.
        Entry(record, 1 + sum(value > values[place] for value in values), low, high, group)
        for place, (record, (low, high), group) in enumerate(zip(ranked, intervals, _tie_groups(held), strict=True))
    )
    return Board(*track, entries, apart, held.shape[1])


def _standing(record: Record) -> tuple[float, float, float, tuple[str, ...]]:
    metrics = record.metrics
    return -metrics["robust"].value, -metrics["certified"].value, -metrics["clean"].value, sort_key(record)


def _tie_groups(held: Flags) -> list[int]:
    """Groups along the order given: a defense significantly below its group's first starts the next group."""
    groups: list[int] = []
    leader, group = 0, 1
    for place in range(len(held)):
        test = mcnemar_exact(held[leader], held[place])
        if test.p_value < SIGNIFICANCE and test.only_first > test.only_second:
            leader, group = place, group + 1
        groups.append(group)
    return groups
