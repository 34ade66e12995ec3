"""How long `robustboard score` would take: measured on a few examples, before anything is scored.

The model comes into its process as for a score. A method that is yet to be trained is trained on two small parts of its
training images, from which the whole training is extrapolated, and the larger part's model stands in for the trained
one. Then gradient steps, bounds, corruptions and complete verification are timed on two small numbers of examples, one
run of PGD and the bounds say how many examples each stage will have, and `forecast` does the sums. Nothing is written
but checkpoints in a temporary folder.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from robustboard.bench.entrants import TrainedEntrant
from robustboard.bench.environment import cores
from robustboard.bench.forecast import Plan, forecast, grown
from robustboard.bench.pacing import Sample, clocked
from robustboard.bench.process import WorkerProcess
from robustboard.bench.protocol import training_data
from robustboard.bench.request import Prepared, Request, prepare
from robustboard.bench.stopwatch import EnoughError, Laps
from robustboard.bench.surrogates import RECIPES, surrogates_of
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import DataError, RobustBoardError

_TRAINING_SHARE, _TRAINING_SECONDS, _NEARLY_ALL = 50, 3.0, 0.75
"""A training is timed on a fiftieth of its images, and on as many more as that leaves time for, or on all."""

_LESS: Final = 0.8
"""The lower end of an extrapolated training."""

_SURROGATE_SECONDS: Final = 0.5
_FINISHED_SECONDS: Final = 15.0
"""A finished training is read from its checkpoints well within this time."""

_END: Final = 0.25
"""Writing the record and ending a process that has imported so much, in times of its start."""

_LOGGING_SECONDS: Final = (3.0, 4.5, 6.0)
"""MLflow, on one core: an import, and with a new store its tables."""

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One row: what the stage is called, and how long it will take, in seconds, with a range."""

    stage: str
    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What a score will take.

    Attributes:
        defense: who would be scored.
        track: the track's id.
        n: how many examples would be judged.
        stages: in the order in which they run.
        took: how many seconds the estimate itself took.
        notes: what limits it.
    """

    defense: str
    track: str
    n: int
    stages: tuple[Stage, ...]
    took: float
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> Stage:
        """The sum of all stages."""
        return Stage(
            "total",
            sum(stage.seconds for stage in self.stages),
            sum(stage.low for stage in self.stages),
            sum(stage.high for stage in self.stages),
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values, seconds to a hundredth."""
        return {
            "defense": self.defense,
            "track": self.track,
            "n": self.n,
            **_rounded(self.total),
            "stages": [{"stage": stage.stage, **_rounded(stage)} for stage in self.stages],
            "estimate_seconds": round(self.took, 2),
            "notes": list(self.notes),
        }


def _rounded(stage: Stage) -> dict[str, float]:
    return {"seconds": round(stage.seconds, 2), "low": round(stage.low, 2), "high": round(stage.high, 2)}


def estimate(
    request: Request, progress: Progress | None = None, *, begun: float = 0.0, logged: bool = False
) -> Estimate:
    """Predict how long `score_defense` would take with the same request, without scoring anything.

    Args:
        request: what would be scored.
        progress: told of every stage.
        begun: how many seconds the caller's process has needed until here, which a score would need too.
        logged: whether the record would be logged to MLflow.

    Raises:
        RobustBoardError: one sentence, wherever a score would be refused before its first attack.
    """
    if request.ray is not None:
        raise RobustBoardError("An estimate times one machine, so it cannot tell of a cluster; leave out --ray.")
    run = _Run(request, progress or NoProgress())
    with tempfile.TemporaryDirectory(prefix="robustboard-") as scratch:
        return run.everything(Path(scratch), begun=begun, logged=logged)


@dataclass
class _Run:
    request: Request
    progress: Progress
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stands_in: bool = False

    def everything(self, scratch: Path, *, begun: float, logged: bool) -> Estimate:
        """Measure everything, in the order in which a score would need it."""
        began = time.perf_counter()
        self._enter("start", begun)
        self.progress.begin("data", 1)
        made = self._timed("data", lambda: prepare(self.request))
        with contextlib.ExitStack() as stack:
            worker = self._model(stack, made, scratch)
            self.progress.begin("model", 1)
            self._evaluation(worker, made)
        self._surrogates(made)
        self._enter("end", _END * begun)
        if logged:
            low, seconds, high = _LOGGING_SECONDS
            self.stages.append(Stage("mlflow", seconds, low, high))
        return Estimate(
            made.entrant.info.name,
            made.track.id,
            len(made.examples),
            tuple(self.stages),
            begun + time.perf_counter() - began,
            tuple(self.notes),
        )

    def _enter(self, stage: str, seconds: float, low: float | None = None, high: float | None = None) -> None:
        ends = seconds if low is None else low, seconds if high is None else high
        self.stages.append(Stage(stage, seconds, min(seconds, ends[0]), max(seconds, ends[1])))

    def _timed(self, stage: str, work: Callable[[], T]) -> T:
        seconds, result = clocked(work)
        self._enter(stage, seconds)
        return result

    def _model(self, stack: contextlib.ExitStack, made: Prepared, scratch: Path) -> WorkerProcess:
        """The model in its process: submitted, read from a finished run, or a stand-in."""
        worker = self._timed("the model's process", lambda: self._worker(stack, made))
        entrant = made.entrant
        if not isinstance(entrant, TrainedEntrant):
            self._timed("load", lambda: entrant.enter(worker, made.folder, NoProgress()))
            return worker
        if (made.folder / "model.safetensors").is_file() and (made.folder / "checkpoints").is_dir():
            self.progress.begin("finished training", 1)
            shutil.copytree(made.folder / "checkpoints", scratch / "checkpoints")
            try:
                laps = Laps(_FINISHED_SECONDS)
                self._timed("training", lambda: entrant.enter(worker, scratch, laps))
                return worker
            except EnoughError:  # these checkpoints are of another training
                worker.close()
                worker = self._worker(stack, made)
        elif (made.folder / "checkpoints").is_dir():
            self.notes.append(
                "A score would continue the run directory's training; it is predicted from its beginning."
            )
        self._training(entrant, worker, scratch)
        return worker

    def _worker(self, stack: contextlib.ExitStack, made: Prepared) -> WorkerProcess:
        return stack.enter_context(
            WorkerProcess(device=self.request.device, threads=made.threads, load_seconds=self.request.load_seconds)
        )

    def _training(self, entrant: TrainedEntrant, worker: WorkerProcess, scratch: Path) -> None:
        """Train on a small part of the images and on a larger one, and extrapolate stage by stage."""
        every = entrant.images
        batch = int(entrant.hyper.get("batch_size", 128))
        few = batch * max(1, every // _TRAINING_SHARE // batch)

        def train(images: int) -> dict[str, float]:
            self.progress.begin(f"training on {images} images", 1)
            laps, shorter = Laps(), entrant if images == every else entrant.shortened(images)
            seconds, _ = clocked(lambda: shorter.enter(worker, scratch / str(images), laps))
            return laps.by_stage(seconds)

        whole = few >= _NEARLY_ALL * every
        small = train(every if whole else few)
        # What is set up once has been paid for by the time of a second training.
        before, spent = small[""], _of_stages(small)
        many = few * max(2, int(_TRAINING_SECONDS / max(spent, 1e-3)))
        if whole or many >= _NEARLY_ALL * every:
            self._enter("training", before + (spent if whole else _of_stages(train(every))))
            return
        large = train(many)
        seconds = sum(grown((few, small.get(stage, 0.0)), (many, large[stage]), every) for stage in large if stage)
        proportional = _of_stages(large) * every / many
        self._enter("training", before + seconds, before + _LESS * seconds, before + proportional)
        self.stands_in = True
        self.notes.append(
            f"The training is extrapolated from {few} and {many} of {every} images; the model of the larger one stands "
            "in for the trained one, so how many examples attacks and bounds will have is a guess."
        )

    def _evaluation(self, worker: WorkerProcess, made: Prepared) -> None:
        track, request = made.track, self.request
        sampled = Sample(worker, made.track, made.examples, made.pictures, complete=request.complete)
        self._timed("contract", sampled.contract)
        self._timed("reference checks", sampled.reference_checks)
        set_up, measured = sampled.measure()
        self._enter("bounds: set-up", set_up)
        pgd, suite = track.attacks.pgd, track.corruptions
        plan = Plan(
            n=len(made.examples),
            batch_size=track.batch_size,
            classes=made.examples.classes,
            steps=pgd.steps,
            runs=pgd.restarts * len(pgd.losses_for(made.examples.classes)),
            audited=track.audit.certified_sample + track.audit.smallest_margins,
            attacked_corruptions=len(suite.attacked),
            attacked_examples=0 if suite.robust is None else suite.robust.examples,
            reference=made.engine == "reference",
            complete=request.complete,
            attack_seeds=request.attack_seeds,
            ensemble=track.attacks.ensemble,
            # AutoAttack's own code draws by batch, so its batches go one by one.
            jobs=min(request.jobs or 1, cores()) if made.engine != "reference" else 1,
        )
        least, likeliest, most = (
            forecast(plan, measured, shares) for shares in sampled.shares(stands_in=self.stands_in)
        )
        for stage, seconds in likeliest.items():
            self._enter(stage, seconds, least.get(stage, 0.0), most.get(stage, 0.0))
        if request.complete:
            self.notes.append(
                "Complete verification is an upper limit: every example that a few sub-domains do not settle is given "
                "the whole budget."
            )

    def _surrogates(self, made: Prepared) -> None:
        """The networks that the transfer diagnostic attacks, which a first run on a track trains."""
        try:
            data = training_data(made.track, made.dataset)
        except DataError:
            return
        seconds = 0.0
        for name in RECIPES:
            if (made.surrogates / name / f"{name}.pt").is_file():
                continue
            self.progress.begin(f"surrogate {name}", 1)
            laps = Laps(_SURROGATE_SECONDS)
            with contextlib.suppress(EnoughError):
                surrogates_of(data, made.track.threat, recipes=(name,), progress=laps)
            seconds += laps.extrapolated()
        if seconds:
            self._enter("surrogates", seconds)


def _of_stages(laps: Mapping[str, float]) -> float:
    """Seconds of a training without what came before its first stage."""
    return sum(seconds for stage, seconds in laps.items() if stage)
