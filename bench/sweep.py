"""A sweep: many defenses on many tracks with many training seeds, a cell each, resumable as a whole.

A cell is one `score_defense` with a run directory of its own. All that the cells need is checked before the first one
starts. They run in threads, some side by side, and one that fails does not stop the others. Nothing is kept but the run
directories, so the same sweep started again passes over the finished cells, goes on inside the interrupted ones, and
tries the failed ones anew.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from robustboard.bench import owed
from robustboard.bench.entrants import TrainedEntrant, is_path
from robustboard.bench.environment import threads_for
from robustboard.bench.finished import finished
from robustboard.bench.journal import FILE as JOURNAL
from robustboard.bench.journal import alone
from robustboard.bench.parts import LEAST_ATTACKED
from robustboard.bench.progress import Bars
from robustboard.bench.remote import Workers
from robustboard.bench.request import Prepared, Request, prepare
from robustboard.bench.score import Scored, score_defense
from robustboard.bench.sweepfile import SweepFile
from robustboard.defenses.adapter import Progress
from robustboard.errors import OutputError, RobustBoardError, StoreAwayError, SweepError, first_line
from robustboard.files import require_writable
from robustboard.leaderboard.record import RECORD_FILE, Record

_MOST_CELLS = 10_000

State = Literal["to do", "begun", "finished", "scored", "failed"]


@dataclass(frozen=True)
class Images:
    """Shape (N, C, H, W) and size in memory of the images that a cell is judged on."""

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        request: what is scored.
        track: the track's id.
        defense: its name.
        seed: of the training; None for a submission.
        settings: the hyper-parameters that the sweep sets.
        folder: the run directory.
        images: what it is judged on, as floats.
        record: of the finished run, if there is one.
        begun: whether the run directory holds something to go on from.
    """

    request: Request
    track: str
    defense: str
    seed: int | None
    settings: Mapping[str, str]
    folder: Path
    images: Images
    record: Record | None
    begun: bool

    @property
    def name(self) -> str:
        """Such as `digits-linf@1/pgd-at/seed-0`."""
        return f"{self.track}/{self.defense}/{self.folder.name}"

    @property
    def state(self) -> State:
        """What there is to do."""
        return "finished" if self.record else "begun" if self.begun else "to do"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: which.
        state: `finished` before this sweep, `scored` by it, or `failed`.
        record: where there is one.
        reason: why it failed, or could not be logged: a sentence.
        exit_code: of that error.
        owed: whether the record has to wait for an MLflow store that is away.
    """

    cell: Cell
    state: State
    record: Record | None = None
    reason: str = ""
    exit_code: int = 0
    owed: bool = False


def plan(sweep: SweepFile, path: Path, base: Request, *, side_by_side: int, progress: Progress) -> list[Cell]:
    """The cells of a sweep, in the order of its file, each with all that it names found; nothing is written.

    Args:
        sweep: what the file says.
        path: the file, whose folder relative paths are relative to.
        base: everything that all cells share.
        side_by_side: how many cells will be worked on at a time; they share out the cores.
        progress: told of every cell.

    Raises:
        RobustBoardError: one sentence about the first cell that cannot run.
    """
    requests = list(_requests(sweep, path, base))
    progress.begin("checking", len(requests))
    cells: dict[Path, Cell] = {}
    for request in requests:
        try:
            cell = _found(request, side_by_side)
            if cell.record is None:
                require_writable(cell.folder, f"The run directory {cell.folder}")
        except RobustBoardError as error:
            raise type(error)(f"{path}: {error}") from error
        if cell.folder in cells:
            raise SweepError(f"{path}: the cell {cell.name} is there twice; name each defense, track and setting once.")
        cells[cell.folder] = cell
        progress.advance()
    return list(cells.values())


def _requests(sweep: SweepFile, path: Path, base: Request) -> Iterator[Request]:
    """Every combination: tracks, then defenses, then settings, then seeds."""
    for name in sweep.hyper:
        if name not in sweep.defenses or is_path(name):
            trained = ", ".join(one for one in sweep.defenses if not is_path(one)) or "none"
            raise SweepError(
                f"{path}: hyper.{name} belongs to no defense of this sweep that is trained here; there is {trained}."
            )
    count = len(sweep.tracks) * sum(_count(sweep, defense) for defense in sweep.defenses)
    if count > _MOST_CELLS:
        raise SweepError(f"{path}: these are {count} cells, and a sweep has {_MOST_CELLS} at most; write several.")
    combinations = [
        (defense, settings, seed)
        for defense in sweep.defenses
        for settings in _settings(sweep.hyper.get(defense, {}))
        for seed in _seeds(sweep, defense)
    ]
    for track, (defense, settings, seed) in itertools.product(sweep.tracks, combinations):
        yield replace(
            base,
            track=_beside(path, track),
            defense=_beside(path, defense),
            overrides=settings,
            seed=seed,
            run_dir=None,
        )


def _seeds(sweep: SweepFile, defense: str) -> Sequence[int]:
    """A submission is trained already, so it is judged once."""
    return (0,) if is_path(defense) else sweep.seeds


def _count(sweep: SweepFile, defense: str) -> int:
    """How many cells of a defense there are on each track."""
    return math.prod(map(len, sweep.hyper.get(defense, {}).values())) * len(_seeds(sweep, defense))


def _settings(choices: Mapping[str, Sequence[object]]) -> Iterator[dict[str, str]]:
    """Every combination of one value each, as `--set` would give it, so that both name one run directory."""
    for values in itertools.product(*choices.values()):
        yield {name: _text(value) for name, value in zip(choices, values, strict=True)}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _beside(path: Path, name: str) -> str:
    """A path relative to the sweep's folder; a name stays what it is."""
    return str(path.absolute().parent / name) if is_path(name) else name


def _found(request: Request, side_by_side: int) -> Cell:
    made = prepare(request)
    threads = made.threads
    if request.ray is None:
        numbers = made.examples.images[0].size
        threads = request.threads or threads_for(numbers, jobs=(request.jobs or 1) * side_by_side)
    record = finished(request, made)
    return Cell(
        replace(request, threads=threads),
        made.track.id,
        made.entrant.info.name,
        request.seed if isinstance(made.entrant, TrainedEntrant) else None,
        {name: str(value) for name, value in request.overrides.items()},
        made.folder,
        Images(made.examples.images.shape, 4 * made.examples.images.size),
        record,
        record is None and _begun(made),
    )


def _begun(made: Prepared) -> bool:
    return any((made.folder / name).exists() for name in (JOURNAL, "checkpoints"))


def run_sweep(cells: Sequence[Cell], *, side_by_side: int, uri: str | None, bars: Bars) -> list[Outcome]:
    """Score the cells that are not finished, and log what is not in the store yet.

    An interrupt ends all processes and leaves every cell as it is. The store has one writer, the calling thread.

    Args:
        cells: of `plan`.
        side_by_side: how many are worked on at a time.
        uri: the MLflow store; None for none.
        bars: shows what is under way.

    Returns:
        What became of each cell, in the order of `cells`.
    """
    overall, store = bars.job("sweep"), _Store(uri)
    overall.begin("cells", len(cells))
    outcomes = dict[str, Outcome]()
    for cell in cells:
        _tidy(cell)
        if cell.record is not None:
            outcomes[cell.name] = store.log(Outcome(cell, "finished", cell.record))
            overall.advance()
    left = [cell for cell in cells if cell.record is None]
    workers, stop = Workers(), threading.Event()

    def one(cell: Cell) -> Scored:
        bar = bars.job(cell.name)
        try:
            return score_defense(cell.request, _Stoppable(bar, stop), workers=workers)
        finally:
            bar.end()

    with _ground(left, side_by_side) as (ready, at_a_time), ThreadPoolExecutor(at_a_time) as pool:
        try:
            futures = {pool.submit(one, cell): cell for cell in ready}
            for future in as_completed(list(futures)):
                # Its images go with it: of a sweep of many cells only the records stay.
                outcome = _outcome(futures.pop(future), future)
                if outcome.record is not None:
                    outcome = store.log(outcome)
                outcomes[outcome.cell.name] = outcome
                overall.advance()
                bars.console.print(
                    f"{len(outcomes)} of {len(cells)}: {_told(outcome)}", markup=False, highlight=False, soft_wrap=True
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop.set()
            workers.end()
            raise
        finally:
            overall.end()
    return [outcomes[cell.name] for cell in cells]


def _tidy(cell: Cell) -> None:
    """Take away the journal of a finished run that was killed between its record and its end.

    One that is younger than the record belongs to a later run, which somebody may go on with.
    """
    journal, record = cell.folder / JOURNAL, cell.folder / "record" / RECORD_FILE
    if cell.record is None or not journal.exists():
        return
    # Whoever works there needs its journal, and takes it away.
    with contextlib.suppress(OSError, OutputError), alone(cell.folder):
        if journal.stat().st_mtime_ns <= record.stat().st_mtime_ns:
            journal.unlink()


class _StoppedError(BaseException):
    """The sweep is being ended; like an interrupt, it leaves a run directory as it is."""


class _Stoppable:
    """Ends a cell at its next step once the sweep is stopped: some of its work is done here, in no process to kill."""

    def __init__(self, inner: Progress, stop: threading.Event) -> None:
        self._inner, self._stop = inner, stop

    def begin(self, stage: str, total: int) -> None:
        self._check()
        self._inner.begin(stage, total)

    def advance(self, steps: int = 1) -> None:
        self._check()
        self._inner.advance(steps)

    def note(self, **values: float) -> None:
        self._check()
        self._inner.note(**values)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _StoppedError


def _outcome(cell: Cell, future: Future[Scored]) -> Outcome:
    error = future.exception()
    if error is not None:
        known = isinstance(error, RobustBoardError | OSError)
        if not isinstance(error, Exception) or (os.environ.get("ROBUSTBOARD_DEBUG") and not known):
            raise error
        reason, exit_code = _reason(error)
        return Outcome(cell, "failed", reason=reason, exit_code=exit_code)
    return Outcome(cell, "scored", future.result().record)


class _Store:
    """Where records are logged. Once it is away no cell waits for it any more: they are owed to it.

    Args:
        uri: of the MLflow store; None for none.
    """

    def __init__(self, uri: str | None) -> None:
        self._uri, self._away = uri, False

    def log(self, outcome: Outcome) -> Outcome:
        """Log a record, unless it is logged already; says what became of that."""
        cell, record = outcome.cell, outcome.record
        if self._uri is None or record is None:
            return outcome
        folder = cell.folder / "record"
        try:
            if not self._away:
                owed.ensure_logged(folder, self._uri, images=cell.images)
                return outcome
        except StoreAwayError:
            self._away = True
        except RobustBoardError as error:
            reason = f"{error} The record itself is safe in {cell.folder}."
            return replace(outcome, reason=reason, exit_code=error.exit_code)
        # The store may well have what was finished before and is not noted as owed.
        return replace(outcome, owed=owed.is_owed(folder))


@contextlib.contextmanager
def _ground(cells: Sequence[Cell], side_by_side: int) -> Iterator[tuple[Sequence[Cell], int]]:
    """The cells with what they need to run, and how many of them there is room for at a time.

    On a Ray cluster all of them share one connection, and its room in equal parts of at least one worker each.
    """
    address = cells[0].request.ray if cells else None
    if address is None:
        yield cells, side_by_side
        return
    from robustboard.bench.ray_cluster import Demand, connected

    asked = cells[0].request
    at_a_time = min(side_by_side, len(cells))
    demand = Demand(
        asked.device,
        max(cell.request.threads or 1 for cell in cells),
        asked.jobs * at_a_time if asked.jobs else None,
        # Each cell has work for a worker, however few its examples are.
        max(LEAST_ATTACKED, *(cell.images.shape[0] for cell in cells)) * at_a_time,
        asked.load_seconds,
    )
    with connected(address, demand) as cluster:
        # Workers that there is no room for would be waited for until the wait is given up.
        at_a_time = min(at_a_time, cluster.jobs)
        jobs = cluster.jobs // at_a_time
        yield [replace(cell, request=replace(cell.request, jobs=jobs)) for cell in cells], at_a_time


def _reason(error: Exception) -> tuple[str, int]:
    """The sentence that the command line would end with, and its exit code."""
    if isinstance(error, RobustBoardError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"The file system refused{where}: {error.strerror or error}.", OutputError.exit_code
    return f"This is a bug of RobustBoard: {first_line(error)}; ROBUSTBOARD_DEBUG=1 shows where.", 2


def _told(outcome: Outcome) -> str:
    record = outcome.record
    if record is None:
        return f"{outcome.cell.name} failed: {outcome.reason}"
    shares = ", ".join(f"{name} {record.metrics[name].value:.1%}" for name in ("clean", "robust", "certified"))
    return f"{outcome.cell.name}: {shares}" + (f"; {outcome.reason}" if outcome.reason else "")
