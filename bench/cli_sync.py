"""`robustboard sync`, and what the commands that log a record have in common."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from robustboard.errors import OutputError, RobustBoardError, StoreAwayError, TrackingError


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command(epilog="Example: robustboard sync runs --mlflow http://mlflow.example.org:5000")(sync)


def sync(
    places: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories, or folders that hold some.")
    ],
    *,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", help="URI of the MLflow store [default: MLFLOW_TRACKING_URI].")
    ] = None,
) -> None:
    """Log the records that a store which was away is still owed; what it has already is not logged again."""
    from robustboard.bench import mlflow_store, owed

    found = list(dict.fromkeys(folder for place in places for folder in owed.find(place)))
    if not found:
        typer.echo("Nothing is owed to a store here.")
        return
    uri = mlflow or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError("No MLflow store is named; give one with --mlflow URI, or set MLFLOW_TRACKING_URI.")
    shown, failed = mlflow_store.without_password(uri), 0
    for done, folder in enumerate(found):
        try:
            if owed.log(folder, uri):
                typer.echo(f"Logged {folder} to {shown}")
        except StoreAwayError as error:
            raise StoreAwayError(f"{error} Still owed: {_records(len(found) - done + failed)}.") from error
        except RobustBoardError as error:
            if len(found) == 1:
                raise
            _say(str(error), Console(stderr=True))
            failed += 1
    if failed:
        raise TrackingError(f"Still owed: {_records(failed)}.")


def check_store(uri: str, console: Console) -> None:
    """Refuse a store that cannot be used before a long run, but only warn of one that is away now.

    Raises:
        TrackingError: if the store cannot be used, or the setting of how long it is waited for.
    """
    from robustboard.bench import mlflow_store
    from robustboard.bench.patience import patience

    patience()
    try:
        mlflow_store.check(uri)
    except StoreAwayError as error:
        _say(f"{error} The run goes on; its record is kept for: robustboard sync.", console)


def log_owed(folder: Path, uri: str, console: Console) -> None:
    """Log the record in `folder`, which is owed; one that has to wait is no failure of the run that made it.

    Raises:
        TrackingError: if the store refuses it.
    """
    from robustboard.bench import mlflow_store, owed

    shown = mlflow_store.without_password(uri)
    safe = f"The record itself is safe in {folder}; log it with: {_command(folder.parent, uri)}"
    try:
        owed.log(folder, uri)
    except (StoreAwayError, OutputError) as error:
        _say(f"{error} It is not in the store yet. {safe}", console)
        return
    except TrackingError as error:
        raise TrackingError(f"{error} {safe}") from error
    _say(f"Logged to {shown}", console)


def say_owed(count: int, runs: Path, uri: str, console: Console) -> None:
    """Tell of records that wait for a store that is away."""
    _say(f"Still owed to the store, which is away: {_records(count)}; log with: {_command(runs, uri)}", console)


def _command(place: Path, uri: str) -> str:
    from robustboard.bench import mlflow_store

    words = ["robustboard", "sync", str(place)]
    if uri != os.environ.get("MLFLOW_TRACKING_URI"):
        words += ["--mlflow", mlflow_store.without_password(uri)]
    return shlex.join(words)


def _records(count: int) -> str:
    return "one record" if count == 1 else f"{count} records"


def _say(sentence: str, console: Console) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
