"""`robustboard sweep`: many defenses, tracks and training seeds by one command; `register` adds it to the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from robustboard.bench import cli_sync
from robustboard.bench.cli_options import (
    DEFAULT_RUNS,
    AsJson,
    DataDir,
    Download,
    Jobs,
    LoadSeconds,
    Mlflow,
    Ray,
    Runs,
    print_json,
)
from robustboard.errors import FindingError, SweepError

if TYPE_CHECKING:
    from robustboard.bench.sweep import Outcome

_SHARES = ("clean", "robust", "certified")


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command(epilog="Example: robustboard sweep sweep.toml --side-by-side 2")(sweep)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.TOML", help="Tracks, defenses, seeds and settings.")],
    *,
    side_by_side: Annotated[
        int | None, typer.Option(min=1, max=256, help="Cells that are worked on at a time [default: the file's, or 1].")
    ] = None,
    jobs: Jobs = None,
    ray: Ray = None,
    runs: Runs = DEFAULT_RUNS,
    mlflow: Mlflow = None,
    no_mlflow: Annotated[bool, typer.Option("--no-mlflow", help="Write the run directories only.")] = False,
    data_dir: DataDir = None,
    download: Download = False,
    load_seconds: LoadSeconds = 60.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything, and print the cells and what is done of them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and judge every cell of a sweep; the same command goes on where an earlier one stopped."""
    from robustboard.bench import mlflow_store
    from robustboard.bench.progress import Bars
    from robustboard.bench.request import Request
    from robustboard.bench.sweep import Outcome, plan, run_sweep
    from robustboard.bench.sweepfile import read_sweep

    said = read_sweep(file)
    at_a_time = side_by_side or said.side_by_side
    # What all cells share; a cell replaces track, defense, settings and seed.
    base = Request(
        defense="",
        track="",
        n=said.n,
        device=said.device,
        threads=said.threads,
        jobs=jobs or said.jobs,
        ray=ray,
        engine=said.attack_engine,
        complete=said.complete,
        attack_seeds=said.attack_seeds,
        runs=runs,
        data_dirs=tuple(data_dir or ()),
        download=download,
        load_seconds=load_seconds,
        logged=not no_mlflow,
    )
    console = Console(stderr=True)
    uri = None if no_mlflow or dry_run else mlflow_store.store_uri(mlflow, runs)
    if uri is not None:
        cli_sync.check_store(uri, console)
    with Bars(console) as bars:
        bar = bars.job("sweep")
        cells = plan(said, file, base, side_by_side=at_a_time, progress=bar)
        bar.end()
        outcomes = (
            [Outcome(cell, cell.state, cell.record) for cell in cells]
            if dry_run
            else run_sweep(cells, side_by_side=at_a_time, uri=uri, bars=bars)
        )
    if as_json:
        print_json([_values(outcome) for outcome in outcomes])
    else:
        _print(outcomes)
        if not dry_run:
            typer.echo(f"\nBoard:  robustboard leaderboard --records {runs} --out site")
    owed = sum(outcome.owed for outcome in outcomes)
    if owed and uri is not None:
        cli_sync.say_owed(owed, runs, uri, console)
    _refuse_failures(outcomes)


def _refuse_failures(outcomes: Sequence[Outcome]) -> None:
    """End with an exit code where something is left to do, and say what."""
    wrong = [outcome for outcome in outcomes if outcome.reason]
    if not wrong:
        return
    failed = sum(outcome.state == "failed" for outcome in wrong)
    unlogged = len(wrong) - failed
    counts = [f"{failed} of {len(outcomes)} cells failed"] if failed else []
    counts += [f"{unlogged} could not be logged"] if unlogged else []
    kind = FindingError if any(outcome.exit_code == FindingError.exit_code for outcome in wrong) else SweepError
    raise kind(f"{' and '.join(counts)}; the same command tries them again, and leaves the others as they are.")


def _print(outcomes: Sequence[Outcome]) -> None:
    """A table for each track, and under the last a sentence for each cell that failed."""
    console = Console()
    for track, group in itertools.groupby(outcomes, key=lambda outcome: outcome.cell.track):
        console.print(f"[bold]{track}[/bold]")
        console.print(_table(list(group)))
    for outcome in outcomes:
        if outcome.reason:
            console.print(f"{outcome.cell.name}: {outcome.reason}", markup=False, highlight=False, soft_wrap=True)


def _table(outcomes: Sequence[Outcome]) -> Table:
    heads = ("defense", "seed", "settings", *_SHARES, "seconds", "state")
    rows = [_row(outcome) for outcome in outcomes]
    # A column that says nothing is left out.
    told = [at for at, head in enumerate(heads) if head in ("defense", "state") or any(row[at] for row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for at in told:
        numeric = heads[at] in ("seed", *_SHARES, "seconds")
        table.add_column(heads[at], no_wrap=numeric, overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(row[at] for at in told))
    return table


def _row(outcome: Outcome) -> list[str]:
    cell, record = outcome.cell, outcome.record
    settings = " ".join(f"{name}={value}" for name, value in cell.settings.items())
    shares = [f"{record.metrics[name].value:.1%}" if record else "" for name in _SHARES]
    # A model of doubtful status is no plain result.
    state = outcome.state if record is None or record.status == "ok" else f"{outcome.state}, {record.status}"
    seed = "" if cell.seed is None else str(cell.seed)
    return [cell.defense, seed, settings, *shares, _seconds(outcome), state]


def _seconds(outcome: Outcome) -> str:
    """What all stages of a record took together, the training included."""
    record = outcome.record
    return f"{sum(cost.seconds for cost in record.cost.values()):.1f}" if record else ""


def _values(outcome: Outcome) -> dict[str, Any]:
    cell, record = outcome.cell, outcome.record
    return {
        "track": cell.track,
        "defense": cell.defense,
        "seed": cell.seed,
        "settings": dict(cell.settings),
        "folder": str(cell.folder),
        "state": outcome.state,
        "status": record.status if record else None,
        **{name: record.metrics[name].value if record else None for name in _SHARES},
        "seconds": sum(cost.seconds for cost in record.cost.values()) if record else None,
        "reason": outcome.reason or None,
    }
