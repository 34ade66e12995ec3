"""What a score is asked for, and everything found that the request names; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robustboard.bench.cascade import Engine
from robustboard.bench.corrupted import Pictures
from robustboard.bench.datasets import Dataset, data_folders, load_dataset
from robustboard.bench.entrants import Entrant, find_entrant, require_known
from robustboard.bench.environment import threads_for
from robustboard.bench.official import corrupted_images
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select
from robustboard.bench.remote import LOAD_SECONDS


@dataclass(frozen=True)
class Request:
    """What to score, and how.

    Attributes:
        defense: a name of the registry, or the path of a defense.toml.
        track: an id, or the path of a TOML.
        n: judge only the first n examples.
        seed: the training seed.
        overrides: hyper-parameters by name.
        device: a torch device.
        threads: of each of the model's processes; None shares out every core, or takes one where images are tiny or on
            a Ray cluster.
        jobs: how many processes judge the model side by side; no verdict depends on it. None is one, or as many as a
            Ray cluster has room for.
        ray: the address of a Ray cluster whose nodes the processes live on, or `"auto"` for one that is started on
            this machine and ends with the run; None for processes of this machine.
        engine: see `evaluate`; `"fast"` is the cascade on the track's fast mode, which is a track of its own.
        complete: see `evaluate`.
        attack_seeds: how many other seeds the attacks are run with on a subset; see `study_attack_seeds`.
        runs: where run directories are made.
        run_dir: this run's directory, in place of one under `runs`.
        data_dirs: folders to look for data in, before those of ROBUSTBOARD_DATA.
        download: whether to download data that is in none of them.
        load_seconds: how long a submitted model may take to load.
        logged: whether the record is noted as owed to the MLflow store; see `owed`.
    """

    defense: str
    track: str | Path
    n: int | None = None
    seed: int = 0
    overrides: Mapping[str, object] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    jobs: int | None = None
    ray: str | None = None
    engine: Engine | Literal["fast"] = "cascade"
    complete: int = 0
    attack_seeds: int = 0
    runs: Path = Path("runs")
    run_dir: Path | None = None
    data_dirs: tuple[Path, ...] = ()
    download: bool = False
    load_seconds: float = LOAD_SECONDS
    logged: bool = False


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request with everything found that it names.

    Attributes:
        track: with the hash of its examples.
        dataset: the track's.
        examples: what is judged.
        pictures: gives the corrupted images.
        entrant: who is judged.
        folder: the run directory.
        surrogates: where the track's surrogates are kept.
        threads: of each of the model's processes.
        engine: what `evaluate` is asked for.
    """

    track: Track
    dataset: Dataset
    examples: Examples
    pictures: Pictures
    entrant: Entrant
    folder: Path
    surrogates: Path
    threads: int
    engine: Engine


def prepare(request: Request) -> Prepared:
    """Find all that a request names; nothing is written.

    Raises:
        RobustBoardError: one sentence, if something is missing or does not fit.
    """
    require_known(request.defense, request.overrides)
    track = load_track(request.track)
    track = track if request.n is None else track.limited(request.n)
    track, engine = as_asked(track, request.engine)
    dataset = load_dataset(track.dataset, data_dirs=data_folders(request.data_dirs), download=request.download)
    track, examples = resolve(track, dataset), select(track, dataset)
    pictures = corrupted_images(track, examples, data_folders(request.data_dirs))
    entrant = find_entrant(request.defense, request.overrides, track, dataset, seed=request.seed)
    run = entrant.key if engine == "cascade" else f"{entrant.key}-{engine}"
    run = f"{run}-complete-{request.complete}" if request.complete else run
    folder = request.run_dir or request.runs / track.id / entrant.info.name / run
    return Prepared(
        track,
        dataset,
        examples,
        pictures,
        entrant,
        folder,
        _common_folder(request, track, folder),
        _threads(request, examples),
        engine,
    )


def as_asked(track: Track, engine: Engine | Literal["fast"]) -> tuple[Track, Engine]:
    """The track and the engine that are meant: the fast mode is a track of its own."""
    return (track.hurried(), "cascade") if engine == "fast" else (track, engine)


def _threads(request: Request, examples: Examples) -> int:
    """Of each process; a cluster's cores are better shared out among more processes than among more threads."""
    default = 1 if request.ray else threads_for(examples.images[0].size, jobs=request.jobs or 1)
    return request.threads or default


def _common_folder(request: Request, track: Track, folder: Path) -> Path:
    """Where surrogates are kept: beside all runs on a track, or inside a run directory that was asked for by name."""
    return (folder if request.run_dir else request.runs / track.id) / "surrogates"
