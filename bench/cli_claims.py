"""`robustboard claims`: what the papers claim beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from robustboard.bench.cli_options import AsJson, DataDir, Device, Seed, print_json
from robustboard.errors import FindingError

if TYPE_CHECKING:
    from robustboard.bench.claims.claim import PaperClaim
    from robustboard.bench.claims.store import Result


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command(epilog="Example: robustboard claims --verify distillation-jsma-mnist")(claims)


def claims(
    ids: Annotated[list[str] | None, typer.Argument(help="Claims, or methods, to show [default: all].")] = None,
    *,
    verify: Annotated[
        list[str] | None, typer.Option("--verify", metavar="ID", help="Measure a claim, or a method's, anew.")
    ] = None,
    seed: Seed = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads for training and scoring.")] = 1,
    device: Device = "cpu",
    runs: Annotated[Path, typer.Option("--runs", help="Folder of trainings, which are reused.")] = Path("runs/claims"),
    out: Annotated[Path | None, typer.Option("--out", help="Folder for new results [default: RUNS/results].")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print what the papers claim beside what was measured, or measure it anew."""
    from robustboard.bench.claims import catalog, command, store

    again = catalog.chosen(verify) if verify else ()
    shown = again or catalog.chosen(ids or [])
    results = {claim.id: store.committed(claim) for claim in shown}
    differences: list[str] = []
    if again:
        fresh = _verify(again, runs=runs, out=out, seed=seed, threads=threads, device=device, data_dirs=data_dir or [])
        results |= fresh
        differences = command.disagreements(again, fresh)
    if as_json:
        print_json([store.as_json(claim, results[claim.id]) for claim in shown])
    else:
        console = Console()
        for claim in shown:
            command.show(claim, results[claim.id], console)
        command.show_legend(console)
    if differences:
        raise FindingError(" ".join(differences))


def _verify(
    claims: Sequence[PaperClaim],
    *,
    runs: Path,
    out: Path | None,
    seed: int,
    threads: int,
    device: str,
    data_dirs: Sequence[Path],
) -> dict[str, Result]:
    import torch

    from robustboard.bench.claims import command
    from robustboard.bench.claims.laboratory import Laboratory
    from robustboard.bench.progress import Bars

    torch.set_num_threads(threads)
    fresh: dict[str, Result] = {}
    with Bars(Console(stderr=True)) as bars:
        for claim in claims:
            bar = bars.job(claim.id)
            laboratory = Laboratory(runs, seed=seed, device=device, threads=threads, data_dirs=data_dirs, progress=bar)
            fresh[claim.id] = command.verify(claim, laboratory, out=out or runs / "results")
            bar.end()
    return fresh
