"""How the command line prints records: one as a list of its numbers, several as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from robustboard.bench.estimate import Estimate
    from robustboard.leaderboard.record import Record

_CORRUPTION_METRICS = ("corruption/standard-15", "corruption/rift-18", "corruption/robust")


def _shown(record: Record, name: str) -> str:
    metric = record.metrics.get(name)
    return "not run" if metric is None else f"{metric.value:.1%} \\[{metric.low:.1%}, {metric.high:.1%}]"


def print_board(records: Sequence[Record]) -> None:
    """Print several records of one track, a row each."""
    shown = ("clean", "pgd", "certified", "corruption")
    heads = ("defense", "robust [95 % interval]", *shown)
    table = Table(*(Column(head, no_wrap=True) for head in heads), box=None, header_style="bold", pad_edge=False)
    for record in records:
        values = (f"{record.metrics[name].value:.1%}" if name in record.metrics else "not run" for name in shown)
        table.add_row(record.defense.name, _shown(record, "robust"), *values)
    Console().print(table)


def print_estimate(found: Estimate) -> None:
    """Print how long a score would take: each stage, the total, and what limits the numbers."""
    numbers = (Column(head, justify="right", no_wrap=True) for head in ("seconds", "from", "to"))
    table = Table("stage", *numbers, box=None, header_style="bold", pad_edge=False)
    for row in (*found.stages, found.total):
        table.add_row(row.stage, *(f"{value:.1f}" for value in (row.seconds, row.low, row.high)))
    console = Console()
    console.print(f"Scoring {found.defense} on {found.track}, n = {found.n}, would take:", highlight=False)
    console.print(table)
    for note in found.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)
    console.print(f"This estimate took {found.took:.1f} seconds.", highlight=False)


def print_record(record: Record) -> None:
    """Print what a record says, its reasons, flags and notes included."""
    from robustboard.leaderboard.corruption import relative_drop
    from robustboard.leaderboard.findings import read_diagnosis

    table = Table("metric", "value [95 % interval]", box=None, header_style="bold", pad_edge=False)
    for name in ("clean", "pgd", "robust", "autoattack", "certified", "undecided", "corruption", *_CORRUPTION_METRICS):
        # Where no bound was tried, a share of zero would say something that nobody knows.
        if name in record.metrics and (record.bound_methods or name not in ("certified", "undecided")):
            table.add_row(name, _shown(record, name))
    if (drop := relative_drop(record.outcomes)) is not None:
        table.add_row("drop under corruption", f"{drop.value:.1%} \\[{drop.low:.1%}, {drop.high:.1%}]")
    console = Console()
    console.print(f"[bold]{escape(record.defense.title)}[/bold] on {record.track.id}, n = {record.n}")
    console.print(table)
    if spread := record.attack_spread:
        console.print(
            f"attack seeds: robust {spread.min:.1%} to {spread.max:.1%} over {len(spread.seeds)} seeds, sd "
            f"{spread.sd:.2%}, on a subset of n = {spread.n}; {spread.would_break} undecided examples would have been "
            "broken",
            markup=False,
            highlight=False,
        )
    console.print(f"Status: {record.status}", markup=False, highlight=False)
    diagnosis = read_diagnosis(record.diagnostics)
    flags = diagnosis.flags if diagnosis else ()
    for head, sentences in (("Reason", record.reasons), ("Flag", flags), ("Note", record.notes)):
        for sentence in sentences:
            console.print(f"{head}: {sentence}", markup=False, highlight=False)
