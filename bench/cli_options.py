"""Options that several commands share, and what they all do with text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from robustboard.errors import RobustBoardError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
DataDir = Annotated[
    list[Path] | None, typer.Option("--data-dir", help="A folder to look for data in; may be repeated.")
]
Defense = Annotated[str, typer.Argument(help="A name from `robustboard defenses`, or the path of a defense.toml.")]
Device = Annotated[str, typer.Option(help="A torch device, such as cpu or cuda.")]
Download = Annotated[bool, typer.Option("--download", help="Download data that is not found.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        help="Processes that judge the model side by side, which change no verdict: one, or as many as a cluster has "
        "room for, unless said otherwise.",
    ),
]
LoadSeconds = Annotated[float, typer.Option(min=1, help="How long a submitted model may take to load.")]
Mlflow = Annotated[
    str | None,
    typer.Option("--mlflow", help="URI of the MLflow store [default: MLFLOW_TRACKING_URI, else RUNS/mlflow.db]."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of run directories and of the MLflow store.")]
DEFAULT_RUNS = Path("runs")
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Judge the model on a Ray cluster: HOST:PORT of its head, or auto for one of this machine alone.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="The training seed.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="A hyper-parameter; may be repeated.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads for the model [default: all cores; 1 for images up to 16x16, or with --ray]."),
]
TrackId = Annotated[str, typer.Option("--track", help="An id from `robustboard tracks`, or the path of your own TOML.")]


def overrides(settings: list[str]) -> dict[str, object]:
    """Hyper-parameters from `name=value` words.

    Raises:
        RobustBoardError: if a word is not of that form.

    >>> overrides(["epochs=10"])
    {'epochs': '10'}
    """
    found: dict[str, object] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise RobustBoardError(f"--set takes name=value, such as --set epochs=10, not {text!r}.")
        found[name.strip()] = value.strip()
    return found


def print_json(value: Any) -> None:
    """Print plain values as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
