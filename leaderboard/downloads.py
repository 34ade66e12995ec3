"""The data behind a board, for download: one CSV line a defense, and the full records as JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import Final

from robustboard.leaderboard.ranking import Board, Entry
from robustboard.leaderboard.record import Record

_METRICS: Final = (
    "clean", "pgd", "autoattack", "robust", "certified", "undecided", "corruption", "corruption/robust",
)  # fmt: skip
_IDENTITY: Final = (
    "track", "track_hash", "status", "rank", "rank_low", "rank_high", "tie_group",
    "defense", "title", "paper", "year", "kind", "extra_data", "parameters", "n",
)  # fmt: skip


def board_csv(board: Board) -> str:
    """The board as CSV, ranked defenses first; a metric that was not measured is empty."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(
        [*_IDENTITY, *(name + end for name in _METRICS for end in ("", "_low", "_high")), "outcomes_sha256"]
    )
    for entry in board.entries:
        writer.writerow(_line(entry.record, entry))
    for record in board.apart:
        writer.writerow(_line(record, None))
    return sink.getvalue()


def board_json(board: Board) -> str:
    """The board as JSON: its records in full, each with its standing; `standing` is null for those set apart."""
    standings = [(entry.record, _standing(entry)) for entry in board.entries] + [
        (record, None) for record in board.apart
    ]
    content = {
        "track": board.track_id,
        "track_hash": board.track_hash,
        "entries": [{"standing": standing, "record": record.model_dump(mode="json")} for record, standing in standings],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _standing(entry: Entry) -> dict[str, int]:
    return {"rank": entry.rank, "low": entry.low, "high": entry.high, "tie_group": entry.tie_group}


def _line(record: Record, entry: Entry | None) -> list[str | int | float]:
    defense = record.defense
    standing = ["", "", "", ""] if entry is None else list(_standing(entry).values())
    metrics: list[str | float] = []
    for name in _METRICS:
        metric = record.metrics.get(name)
        metrics += ["", "", ""] if metric is None else [metric.value, metric.low, metric.high]
    return [
        record.track.id, record.track.hash, record.status, *standing,
        defense.name, _cell(defense.title), _cell(defense.paper), defense.year, defense.kind,
        str(defense.extra_data).lower(), record.parameters, record.n, *metrics, record.outcomes_sha256 or "",
    ]  # fmt: skip


def _cell(text: str) -> str:
    """Text that a spreadsheet takes as text: a leading =, +, - or @ would make it a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
