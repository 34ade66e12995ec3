"""What a template needs to know of a board, ready to print: no template computes anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from robustboard.leaderboard import charts
from robustboard.leaderboard.corruption import relative_drop
from robustboard.leaderboard.findings import KEY, Diagnosis, read_diagnosis
from robustboard.leaderboard.metrics import Metric
from robustboard.leaderboard.ranking import Board, Entry
from robustboard.leaderboard.record import Record
from robustboard.leaderboard.training_spread import Setting, TrainingSpread, setting_of, training_spreads

_NORMS: Final = {"linf": "L∞", "l2": "L2"}
_COLUMNS: Final = (
    ("clean", "Clean", "Share classified correctly without any perturbation."),
    ("pgd", "PGD", "Share still correct after projected gradient descent."),
    ("autoattack", "AutoAttack", "Share still correct after AutoAttack, where it ran on every correct example."),
    ("robust", "Robust", "Share certified, or still correct after every attack of the protocol. Boards rank by it."),
    ("certified", "Certified", "Share proven: no allowed perturbation changes the class."),
    ("undecided", "Undecided", "Share that no attack broke and no bound proved; robust less certified."),
    ("corruption", "Corruption", "Mean accuracy over the protocol's common corruptions at all severities."),
    (
        "corruption/robust",
        "Corrupted, robust",
        "Of some examples: share whose corrupted image is still classified correctly after projected gradient descent "
        "around it, mean over the attacked corruptions.",
    ),
)


@dataclass(frozen=True)
class Column:
    """A column of numbers: the metric's name, its heading, and what it means."""

    key: str
    label: str
    meaning: str


@dataclass(frozen=True)
class Cell:
    """A metric as it is printed in percent, and where its interval is drawn; `number` is what sorting uses."""

    number: str
    value: str
    interval: str
    span: charts.Span


@dataclass(frozen=True)
class Row:
    """One record of a board.

    Attributes:
        entry: its standing; None for a record that is set apart.
        anchor: its id in the page.
        cells: by column; None where the metric was not measured.
        outcomes: the relative path of its outcome table.
        true_low, true_high: where the true robust accuracy lies, in percent; `true_span` is for drawing it.
        stages: finer metrics along the cascade, by what they are called.
        movements: how the numbers move with what a record holds fixed, as (what, value).
        diagnosis: what the diagnostics of masked gradients found; None where the record has none that can be read.
        diagnostics: everything else under the record's diagnostics, as JSON.
    """

    record: Record
    entry: Entry | None
    anchor: str
    cells: dict[str, Cell | None]
    segments: tuple[charts.Segment, ...]
    outcomes: str
    true_low: str
    true_high: str
    true_span: charts.Span
    stages: list[tuple[str, Cell]]
    movements: list[tuple[str, str]]
    diagnosis: Diagnosis | None
    diagnostics: str
    hyper: list[tuple[str, str]]


@dataclass(frozen=True)
class BoardView:
    """One board.

    Attributes:
        slug: its id in the page and the stem of its files.
        facts: what to know of the track, as (what, value).
        protocol: the frozen track as JSON.
        csv, json: relative paths of the downloads.
    """

    board: Board
    slug: str
    title: str
    facts: list[tuple[str, str]]
    protocol: str
    columns: list[Column]
    rows: list[Row]
    apart: list[Row]
    csv: str
    json: str


def board_view(board: Board, slug: str) -> BoardView:
    """Prepare one board; `slug` must be safe in a file name."""
    records = [entry.record for entry in board.entries] + list(board.apart)
    content = records[0].track.content
    always = {name for name, *_ in _COLUMNS} - {"autoattack", "corruption/robust"}
    measured = {name for record in records for name in record.metrics} | always
    columns = [Column(*column) for column in _COLUMNS if column[0] in measured]
    spreads = training_spreads(records)
    return BoardView(
        board=board,
        slug=slug,
        title=_text(content.get("title")) or board.track_id,
        facts=list(_facts(content, records)),
        protocol=json.dumps(content, indent=2, ensure_ascii=False),
        columns=columns,
        rows=[_row(entry.record, entry, slug, columns, spreads) for entry in board.entries],
        apart=[_row(record, None, slug, columns, spreads) for record in board.apart],
        csv=f"data/{slug}.csv",
        json=f"data/{slug}.json",
    )


def _facts(content: dict[str, JsonValue], records: list[Record]) -> Iterator[tuple[str, str]]:
    threat = content.get("threat")
    if isinstance(threat, dict):
        norm, eps = _text(threat.get("norm")), _text(threat.get("eps"))
        yield "threat", f"{_NORMS.get(norm, norm)}, ε = {eps}"
    if dataset := _text(content.get("dataset")):
        yield "data", dataset
    counts = sorted({record.n for record in records})
    yield "examples", f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"


def _text(value: JsonValue) -> str:
    return str(value) if isinstance(value, str | int | float) else ""


def _row(
    record: Record,
    entry: Entry | None,
    slug: str,
    columns: list[Column],
    spreads: Mapping[Setting, TrainingSpread],
) -> Row:
    name = re.sub(r"[^a-z0-9-]+", "-", record.defense.name.lower())[:60]
    anchor = f"{slug}-{name}-{(record.outcomes_sha256 or '')[:8]}{record.checkpoint_sha256[:8]}"
    low, high = record.true_robust
    diagnosis = read_diagnosis(record.diagnostics)
    # Silence of the engine's checks is no news; what is not understood is shown as it stands.
    others = {key: value for key, value in record.diagnostics.items() if value and (key != KEY or diagnosis is None)}
    stages = [
        (f"{'certified by' if kind == 'certified' else 'left after'} {stage}", _cell(metric))
        for key, metric in record.metrics.items()
        for kind, _, stage in [key.partition("/")]
        if stage and kind in ("certified", "robust")
    ]
    return Row(
        record=record,
        entry=entry,
        anchor=anchor,
        cells={c.key: _cell(record.metrics[c.key]) if _measured(record, c.key) else None for c in columns},
        segments=charts.sandwich(record),
        outcomes=f"data/outcomes/{anchor}.parquet",
        true_low=charts.percent(low),
        true_high=charts.percent(high),
        true_span=charts.Span(charts.position(low), charts.position(low), charts.position(high)),
        stages=stages,
        movements=list(_movements(record, spreads)),
        diagnosis=diagnosis,
        diagnostics=json.dumps(others, indent=2, ensure_ascii=False) if others else "",
        hyper=[(key, _plain(value)) for key, value in record.hyper.items()],
    )


def _movements(record: Record, spreads: Mapping[Setting, TrainingSpread]) -> Iterator[tuple[str, str]]:
    if (drop := relative_drop(record.outcomes)) is not None:
        interval = f"[{charts.percent(drop.low)}, {charts.percent(drop.high)}]"
        yield "accuracy lost to corruptions, of the clean one", f"{charts.percent(drop.value)} {interval}"
    if (attacks := record.attack_spread) is not None:
        yield (
            f"robust under {len(attacks.seeds)} attack seeds, on {attacks.n:,} of the examples",
            f"{charts.percent(attacks.min)}\u2013{charts.percent(attacks.max)}, sd {100 * attacks.sd:.2f} points",
        )
    setting = setting_of(record)
    trainings = None if setting is None else spreads.get(setting)
    if trainings is not None and len(trainings.seeds) > 1:
        robust = trainings.metrics["robust"]
        yield (
            f"robust over {len(trainings.seeds)} training seeds",
            f"{charts.percent(robust.min)}\u2013{charts.percent(robust.max)}, mean {charts.percent(robust.mean)}",
        )


def _plain(value: object) -> str:
    """A setting as text; six digits do on a page, as the download has them all."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _measured(record: Record, key: str) -> bool:
    """A certified share of zero says nothing where no bound ran."""
    return key in record.metrics and (key != "certified" or bool(record.bound_methods))


def _cell(metric: Metric) -> Cell:
    return Cell(
        number=f"{metric.value:.6f}",
        value=charts.percent(metric.value),
        interval=f"[{charts.percent(metric.low)}, {charts.percent(metric.high)}]",
        span=charts.span(metric),
    )
