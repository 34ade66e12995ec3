"""The commands about records that are there already, and about many radii or seeds.

`robustboard compare | challenge | targets | curve | seeds`; `register` adds them to the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from robustboard.bench import cli_sync
from robustboard.bench.cli_options import (
    AsJson,
    DataDir,
    Defense,
    Device,
    Download,
    LoadSeconds,
    Seed,
    Settings,
    Threads,
    TrackId,
    overrides,
    print_json,
)
from robustboard.errors import OutputError, RobustBoardError

if TYPE_CHECKING:
    from robustboard.bench.challenge import Challenged
    from robustboard.leaderboard.curve import Curve
    from robustboard.leaderboard.training_spread import TrainingSpread

RecordPath = Annotated[Path, typer.Argument(help="A run directory, or a folder with record.json and its table.")]
OwnTrack = Annotated[
    str | None, typer.Option("--track", help="The record's track, where it judges images from a file of yours.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command(epilog="Example: robustboard compare runs/digits-linf@1/pgd-at/seed-0 runs/digits-linf@1/ibp/seed-0")(
        compare
    )
    app.command(epilog="Example: robustboard curve pgd-at --track digits-linf@1 --out curve.svg")(curve)
    app.command(epilog="Example: robustboard challenge runs/digits-linf@1/pgd-at/seed-0 examples.npz")(challenge)
    app.command(epilog="Example: robustboard targets runs/digits-linf@1/pgd-at/seed-0 --out targets.npz")(targets)
    app.command(epilog="Example: robustboard seeds standard --track digits-linf@1 --seeds 0,1,2")(seeds)


def compare(
    first: RecordPath,
    second: RecordPath,
    *,
    share: Annotated[str, typer.Option(help="What to compare: robust, certified or clean.")] = "robust",
    as_json: AsJson = False,
) -> None:
    """Compare two records of one track on the examples they share: the exact paired test and the difference."""
    import dataclasses

    from robustboard.bench.recall import locate
    from robustboard.leaderboard.comparison import compare_records

    records = [locate(path).record for path in (first, second)]
    found = compare_records(*records, share=share)
    if as_json:
        print_json({"defenses": [record.defense.name for record in records], **dataclasses.asdict(found)})
        return
    table = Table("", share, "alone", box=None, header_style="bold", pad_edge=False)
    for record, value, alone in zip(
        records, (found.first, found.second), (found.only_first, found.only_second), strict=True
    ):
        doubt = "" if record.status == "ok" else f" ({record.status})"
        table.add_row(record.defense.name + doubt, f"{value:.1%}", str(alone))
    Console().print(table)
    typer.echo(
        f"difference {found.difference:+.1%} [{found.low:+.1%}, {found.high:+.1%}], n = {found.n} shared examples"
    )
    typer.echo(f"McNemar's exact test: p = {found.p_value:.3g}")


def curve(
    defense: Defense,
    *,
    track: TrackId,
    eps: Annotated[
        str, typer.Option(metavar="EPS,...", help="Radii [default: quarters of the track's own, up to twice it].")
    ] = "",
    out: Annotated[
        list[Path] | None, typer.Option("--out", help="A .svg or .json file to write; may be repeated.")
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="Judge only the first N examples.")] = None,
    seed: Seed = 0,
    settings: Settings = None,
    device: Device = "cpu",
    threads: Threads = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of run directories, whose trainings are reused.")] = Path(
        "runs"
    ),
    data_dir: DataDir = None,
    download: Download = False,
    load_seconds: LoadSeconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Trace clean, robust and certified accuracy over a grid of eps, for one network trained at the track's own."""
    from robustboard.bench.curve import Request, run_curve
    from robustboard.bench.progress import Bars
    from robustboard.files import require_writable, write_text
    from robustboard.leaderboard.curve_chart import curve_svg

    for path in out or []:
        if path.suffix not in (".svg", ".json"):
            raise OutputError(f"--out takes a file that ends in .svg or .json, not {path}.")
        if path.is_dir():
            raise OutputError(f"{path} cannot be made: it is a folder.")
        require_writable(path.absolute().parent, str(path))
    request = Request(
        defense=defense,
        track=track,
        grid=tuple(word.strip() for word in eps.split(",") if word.strip()),
        n=n,
        seed=seed,
        overrides=overrides(settings or []),
        device=device,
        threads=threads,
        runs=runs,
        data_dirs=tuple(data_dir or ()),
        download=download,
        load_seconds=load_seconds,
    )
    with Bars(Console(stderr=True)) as bars:
        found = run_curve(request, bars.job(Path(defense).stem if defense.endswith(".toml") else defense))
    # Printed first, so that a disk that is full by now does not take the result with it.
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        _print_curve(found)
    for path in out or []:
        text = curve_svg(found) if path.suffix == ".svg" else found.to_json()
        write_text(path, text)


def challenge(
    record: RecordPath,
    examples: Annotated[Path, typer.Argument(help="An npz with images and index (or example).")],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for a lowered record [default: beside it].")] = None,
    defense: Annotated[Path | None, typer.Option(help="The defense.toml, where the record is of a submission.")] = None,
    track: OwnTrack = None,
    mlflow: Annotated[
        str | None, typer.Option("--mlflow", help="URI of an MLflow store that a lowered record is logged to.")
    ] = None,
    device: Device = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, help="Threads for the model; a training repeats on its own count.")
    ] = 1,
    data_dir: DataDir = None,
    download: Download = False,
    load_seconds: LoadSeconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Check somebody else's adversarial examples against a record, and lower it when they hold."""
    from robustboard.bench import owed
    from robustboard.bench.challenge import Request, run_challenge
    from robustboard.bench.progress import Bars

    console = Console(stderr=True)
    if mlflow is not None:
        cli_sync.check_store(mlflow, console)
    request = Request(
        record=record,
        images=examples,
        out=out,
        defense=defense,
        track=track,
        device=device,
        threads=threads,
        data_dirs=tuple(data_dir or ()),
        download=download,
        load_seconds=load_seconds,
    )
    with Bars(console) as bars:
        found = run_challenge(request, bars.job("challenge"))
    if as_json:
        print_json(_challenge_values(found))
    else:
        _print_challenge(found)
    if mlflow is not None and found.after and found.folder and found.images is not None:
        owed.owe(found.after, found.folder, images=found.images, training=())
        cli_sync.log_owed(found.folder, mlflow, console)


def targets(
    record: RecordPath,
    *,
    out: Annotated[Path, typer.Option("--out", help="The npz file to write.")] = Path("targets.npz"),
    track: OwnTrack = None,
    data_dir: DataDir = None,
    download: Download = False,
) -> None:
    """Write the undecided examples of a record: what a challenge can still break."""
    from robustboard.bench.challenge import write_targets

    count = write_targets(record, out, track=track, data_dirs=tuple(data_dir or ()), download=download)
    typer.echo(f"{count} undecided examples: {out}")


def seeds(
    defense: Annotated[str, typer.Argument(help="A name from `robustboard defenses`.")],
    *,
    track: TrackId,
    numbers: Annotated[str, typer.Option("--seeds", metavar="S,...", help="Training seeds.")] = "0,1,2",
    n: Annotated[
        int | None, typer.Option(min=1, help="Judge only the first N examples (another track id, if it has more).")
    ] = None,
    settings: Settings = None,
    device: Device = "cpu",
    threads: Threads = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of run directories; finished ones are reused.")] = Path(
        "runs"
    ),
    data_dir: DataDir = None,
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Train and judge a defense with several training seeds, and print how much its numbers move."""
    import dataclasses

    from robustboard.bench.progress import Bars
    from robustboard.bench.request import Request
    from robustboard.bench.training_seeds import run_training_seeds

    request = Request(
        defense=defense,
        track=track,
        n=n,
        overrides=overrides(settings or []),
        device=device,
        threads=threads,
        runs=runs,
        data_dirs=tuple(data_dir or ()),
        download=download,
    )
    with Bars(Console(stderr=True)) as bars:
        spread = run_training_seeds(request, _numbers(numbers), bars.job(defense))
    if as_json:
        print_json(dataclasses.asdict(spread))
    else:
        _print_spread(spread)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise RobustBoardError(f"--seeds takes whole numbers such as 0,1,2, not {text!r}.") from error
    if min(found) < 0 or len(set(found)) < len(found):
        raise RobustBoardError(f"--seeds takes distinct numbers from 0, such as 0,1,2, not {text!r}.")
    return found


def _print_curve(curve: Curve) -> None:
    table = Table(
        "eps", "certified [95 %]", "robust [95 %]", "undecided", box=None, header_style="bold", pad_edge=False
    )
    for point in curve.points:
        shares = (
            f"{metric.value:.1%} \\[{metric.low:.1%}, {metric.high:.1%}]" for metric in (point.certified, point.robust)
        )
        table.add_row(point.eps, *shares, f"{point.undecided:.1%}")
    console = Console()
    console.print(
        f"{curve.defense['title']} on {curve.track['id']}, n = {len(curve.reaches)}, clean {curve.clean.value:.1%}",
        markup=False,
        highlight=False,
    )
    console.print(table)
    work, saved = curve.work, curve.saved
    typer.echo(
        f"{work['judged']} of {work['judged_without_reuse']} verdicts were judged and {saved['judged']:.1%} followed "
        f"from other radii; every attack ran {work['attacked']} times for {work['attacked_without_reuse']} "
        f"undecided verdicts ({saved['attacked']:.1%} saved)."
    )
    for note in curve.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)


def _print_spread(spread: TrainingSpread) -> None:
    table = Table("metric", "mean", "sd", "min", "max", "by seed", box=None, header_style="bold", pad_edge=False)
    for name, values in spread.metrics.items():
        sd = "-" if values.sd is None else f"{values.sd:.1%}"
        each = " ".join(f"{value:.1%}" for value in values.values)
        table.add_row(name, f"{values.mean:.1%}", sd, f"{values.min:.1%}", f"{values.max:.1%}", each)
    seeds = ", ".join(map(str, spread.seeds))
    typer.echo(f"{spread.defense} on {spread.track_id}, n = {spread.n}, training seeds {seeds}")
    Console().print(table)
    if spread.left_out:
        typer.echo(f"Left out, because their records are not ok: training seeds {', '.join(map(str, spread.left_out))}")


def _challenge_values(found: Challenged) -> dict[str, object]:
    return {
        "defense": found.before.defense.name,
        "track": found.before.track.id,
        "file_sha256": found.file_sha256,
        "given": found.given,
        "held": found.held,
        "known": found.known,
        "misclassified": found.misclassified,
        "lowered": found.lowered,
        "robust_before": found.before.metrics["robust"].value,
        "robust_after": (found.after or found.before).metrics["robust"].value,
        "record": None if found.folder is None else str(found.folder),
    }


def _print_challenge(found: Challenged) -> None:
    typer.echo(
        f"{found.held} of {found.given} images held: {found.known} on examples that were broken before, "
        f"{found.lowered} on undecided ones; {found.misclassified} were of misclassified examples, which nothing can "
        "break."
    )
    before = found.before.metrics["robust"]
    if found.after is None:
        typer.echo(f"The record stays as it is: robust {before.value:.1%}.")
        return
    after = found.after.metrics["robust"]
    typer.echo(f"robust {before.value:.1%} -> {after.value:.1%} [{after.low:.1%}, {after.high:.1%}]")
    typer.echo(f"Record: {found.folder} (the old one stays where it is)")
