"""The command line of `robustboard`; the commands on finished records are in `cli_records`.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 a finding (a broken gate),
2 misuse or unusable input, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Column, Table

from robustboard.bench import cli_claims, cli_records, cli_sweep, cli_sync
from robustboard.bench.cli_options import (
    DEFAULT_RUNS,
    AsJson,
    DataDir,
    Defense,
    Device,
    Download,
    Jobs,
    LoadSeconds,
    Mlflow,
    Ray,
    Runs,
    Seed,
    Settings,
    Threads,
    TrackId,
    overrides,
    print_json,
)
from robustboard.bench.cli_tables import print_board, print_estimate, print_record
from robustboard.errors import OutputError, RobustBoardError, first_line

if TYPE_CHECKING:
    from robustboard.bench.request import Request

app = typer.Typer(
    name="robustboard",
    help="Train, attack, bound and corrupt defenses against adversarial examples, and publish what is left.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

cli_claims.register(app)
cli_records.register(app)
cli_sync.register(app)
cli_sweep.register(app)

Out = Annotated[Path, typer.Option("--out", help="Folder to write the site to.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"robustboard {version('robustboard')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


@app.command(epilog="Example: robustboard tracks")
def tracks(*, as_json: AsJson = False) -> None:
    """List the released tracks: data, radius, and how many examples are judged."""
    from robustboard.bench.protocol import load_track, track_ids

    loaded = [load_track(name) for name in track_ids()]
    if as_json:
        print_json([track.frozen() for track in loaded])
        return
    table = Table(
        Column("track", no_wrap=True), "data", "threat", "examples", box=None, header_style="bold", pad_edge=False
    )
    for track in loaded:
        table.add_row(track.id, str(track.dataset), f"{track.threat.norm} {track.threat.text}", str(track.n))
    Console().print(table)


@app.command(epilog="Example: robustboard corruptions --track cifar10-q75-linf@2 --out sheet.png")
def corruptions(
    *,
    track: TrackId,
    out: Annotated[Path, typer.Option("--out", help="The PNG file to write.")] = Path("corruptions.png"),
    example: Annotated[int, typer.Option(min=0, help="Which example is shown, in the track's order.")] = 0,
    data_dir: DataDir = None,
    download: Download = False,
) -> None:
    """Draw a sheet of a track's corruptions: a row for each, a column for each severity."""
    from robustboard.bench.contact_sheet import contact_sheet
    from robustboard.bench.datasets import data_folders, load_dataset
    from robustboard.bench.official import corrupted_images
    from robustboard.bench.protocol import load_track, select
    from robustboard.files import replace_file

    loaded, folders = load_track(track), data_folders(data_dir or ())
    examples = select(loaded, load_dataset(loaded.dataset, data_dirs=folders, download=download))
    sheet = contact_sheet(loaded, examples, corrupted_images(loaded, examples, folders), first=example)
    replace_file(out, lambda file: sheet.save(file, "PNG"))
    typer.echo(out)


@app.command(epilog="Example: robustboard defenses --json")
def defenses(*, as_json: AsJson = False) -> None:
    """List the defenses that can be trained here, with their papers and claims."""
    import dataclasses

    from robustboard.defenses import registry

    cards = registry.cards()
    if as_json:
        print_json([dataclasses.asdict(card) for card in cards])
        return
    table = Table("name", "year", "kind", "method", box=None, header_style="bold", pad_edge=False)
    for card in cards:
        table.add_row(card.name, str(card.year), card.kind, card.title)
    Console().print(table)


@app.command(epilog="Example: robustboard score pgd-at --track digits-linf@1")
def score(
    defense: Defense,
    *,
    track: TrackId,
    n: Annotated[
        int | None, typer.Option(min=1, help="Judge only the first N examples (another track id, if it has more).")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    device: Device = "cpu",
    threads: Threads = None,
    jobs: Jobs = None,
    ray: Ray = None,
    attack_engine: Annotated[
        Literal["cascade", "reference", "fast"],
        typer.Option(
            help="cascade attacks what is undecided; reference runs AutoAttack on every example; fast is a tenth of "
            "the passes and no bounds, under a track id of its own."
        ),
    ] = "cascade",
    complete: Annotated[
        int,
        typer.Option(
            min=0, metavar="NODES", help="Prove or break what is left open, with so many sub-domains an example."
        ),
    ] = 0,
    attack_seeds: Annotated[
        int, typer.Option(min=0, max=99, help="Other attack seeds to try on a subset, for the spread.")
    ] = 0,
    runs: Runs = DEFAULT_RUNS,
    run_dir: Annotated[
        Path | None, typer.Option(help="This run's folder [default: RUNS/track/defense/seed-S].")
    ] = None,
    mlflow: Mlflow = None,
    no_mlflow: Annotated[bool, typer.Option("--no-mlflow", help="Write the run directory only.")] = False,
    data_dir: DataDir = None,
    download: Download = False,
    load_seconds: LoadSeconds = 60.0,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only predict how long it would take, stage by stage; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train or load one defense, judge it on a track, and write its record."""
    from robustboard.bench import mlflow_store
    from robustboard.bench.progress import Bars
    from robustboard.bench.request import Request
    from robustboard.bench.score import score_defense

    request = Request(
        defense=defense,
        track=track,
        n=n,
        seed=seed,
        overrides=overrides(settings or []),
        device=device,
        threads=threads,
        jobs=jobs,
        ray=ray,
        engine=attack_engine,
        complete=complete,
        attack_seeds=attack_seeds,
        runs=runs,
        run_dir=run_dir,
        data_dirs=tuple(data_dir or ()),
        download=download,
        load_seconds=load_seconds,
        logged=not no_mlflow,
    )
    if estimate:
        _estimate(request, logged=not no_mlflow, as_json=as_json)
        return
    console = Console(stderr=True)
    uri = None if no_mlflow else mlflow_store.store_uri(mlflow, runs)
    if uri is not None:
        cli_sync.check_store(uri, console)
    with Bars(console) as bars:
        scored = score_defense(request, bars.job(Path(defense).stem if defense.endswith(".toml") else defense))
    if as_json:
        sys.stdout.write(scored.record.to_json())
        sys.stdout.flush()
    else:
        print_record(scored.record)
        typer.echo(f"\nRecord: {scored.folder}")
        typer.echo(f"Board:  robustboard leaderboard --records {runs} --out site")
    if uri is not None:
        cli_sync.log_owed(scored.folder, uri, console)


def _estimate(request: Request, *, logged: bool, as_json: bool) -> None:
    from robustboard.bench.environment import process_age
    from robustboard.bench.estimate import estimate
    from robustboard.bench.progress import Bars

    with Bars(Console(stderr=True)) as bars:
        found = estimate(request, bars.job("estimate"), begun=process_age(), logged=logged)
    if as_json:
        print_json(found.as_json())
    else:
        print_estimate(found)


@app.command(epilog="Example: robustboard leaderboard --records runs --out site")
def leaderboard(
    *,
    records: Annotated[
        Path | None, typer.Option(help="A folder that holds records, at any depth [default: runs].")
    ] = None,
    mlflow: Annotated[str | None, typer.Option("--mlflow", help="Read the records from this MLflow store.")] = None,
    out: Out = Path("site"),
) -> None:
    """Build the static site from records or from an MLflow store."""
    from robustboard.bench import mlflow_store, tracking
    from robustboard.leaderboard.record import load_all
    from robustboard.leaderboard.site import build_site

    if records is not None and mlflow is not None:
        raise RobustBoardError("Give either --records or --mlflow, not both.")
    found = (
        tracking.read_records(mlflow)
        if mlflow is not None
        else load_all(records or DEFAULT_RUNS, ignore={mlflow_store.ARTIFACTS})
    )
    typer.echo(build_site(found, out))


@app.command(epilog="Example: robustboard demo --out site")
def demo(
    *,
    out: Out = Path("site"),
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the demo's runs and MLflow store.")] = Path(
        "runs/demo"
    ),
    jobs: Annotated[int | None, typer.Option(min=1, help="Defenses at a time [default: one a core].")] = None,
) -> None:
    """Train and score every defense on the embedded digits, and build the site: a few minutes on two cores."""
    from robustboard.bench.demo import run_demo
    from robustboard.bench.progress import Bars

    console = Console(stderr=True)
    with Bars(console) as bars:
        result = run_demo(runs=runs, out=out, jobs=jobs, bars=bars)
    print_board(result.records)
    for name, reason in result.unsuited:
        typer.echo(f"{name} was left out: {reason}")
    typer.echo(f"\nSite:   {result.site}")
    typer.echo(f"MLflow: mlflow ui --backend-store-uri {result.mlflow_uri}")


@app.command(epilog="Example: robustboard diagnostics --track digits-linf@1 --seeds 2")
def diagnostics(
    *,
    track: Annotated[str, typer.Option(help="The track whose training images and attacks are used.")] = "digits-linf@1",
    seeds: Annotated[int, typer.Option(min=1, help="How many trainings of the panel, from seed 0.")] = 1,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of trainings, which are reused.")] = Path(
        "runs/diagnostics"
    ),
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Print how many masked models the diagnostics detect, and on how many honest ones they speak falsely."""
    from robustboard.bench.detection import run_panel, show
    from robustboard.bench.progress import Bars

    with Bars(Console(stderr=True)) as bars:
        bar = bars.job("diagnostics")
        panel = run_panel(track, seeds=range(seeds), runs=runs, data_dirs=data_dir or [], progress=bar)
        bar.end()
    if as_json:
        print_json(panel.as_json())
        return
    show(panel, Console())


class _StopSignal(BaseException):
    """SIGINT or SIGTERM: unwinds everything, so that the model's process ends too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _stop(number: int, frame: object) -> NoReturn:
    del frame
    raise _StopSignal(number)


def main() -> NoReturn:
    """Run the command line; every error of ours is one sentence and an exit code, never a traceback."""
    # Typer would turn a plain Ctrl-C into silence.
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except RobustBoardError as error:
        _fail(str(error), error.exit_code)
    except _StopSignal as stop:
        _fail("Interrupted; the same command goes on from where this one stopped.", stop.exit_code)
    except OSError as error:
        if os.environ.get("ROBUSTBOARD_DEBUG"):
            raise
        where = f" {error.filename}" if error.filename else ""
        _fail(f"The file system refused{where}: {error.strerror or error}.", OutputError.exit_code)
    except Exception as error:
        if os.environ.get("ROBUSTBOARD_DEBUG"):
            raise
        _fail(f"This is a bug of RobustBoard: {first_line(error)}; ROBUSTBOARD_DEBUG=1 shows where.", 2)
    sys.exit(0)


def _fail(sentence: str, code: int) -> NoReturn:
    sys.stderr.write(f"robustboard: {sentence}\n")
    sys.exit(code)
