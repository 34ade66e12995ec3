"""Scoring one defense: data, a model in its own process, the evaluation, the record, the run directory.

A run directory holds `checkpoints/` (what a killed training continues from), `journal.bin` (what a killed evaluation
continues from, until its record is there), `model.safetensors` (a trained model's weights), `adversarial.npz` (the
images that broke it), `seed-breaks.npz` (those that only another attack seed found), `record/` (what can be
published) and `record.owed.json` (until the MLflow store has the record). The stored images are judged again from their
file; the record is written after that, last and whole, so a run directory with a record is a finished run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save as to_safetensors
from torch import nn

from robustboard.bench import owed
from robustboard.bench.answers import Floats
from robustboard.bench.attack_seeds import SeedStudy, study_attack_seeds
from robustboard.bench.cascade import Engine
from robustboard.bench.crew import Crew, crew
from robustboard.bench.datasets import Dataset, data_folders, from_arrays, load_dataset
from robustboard.bench.environment import installed, source_sha256
from robustboard.bench.evaluate import Evaluation, evaluate
from robustboard.bench.journal import FILE as JOURNAL
from robustboard.bench.journal import Journal, Journaled, alone
from robustboard.bench.official import corrupted_images
from robustboard.bench.perturbed_file import write_perturbed
from robustboard.bench.places import place
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select, training_data
from robustboard.bench.remote import Workers
from robustboard.bench.report import build_record
from robustboard.bench.request import Prepared, Request, as_asked, prepare
from robustboard.bench.rescore import rescore
from robustboard.bench.session import LocalSession, Session
from robustboard.bench.surrogates import Surrogate, Surrogates, surrogates_of
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import DataError, GateError, LostWorkerError, ModelError, OutputError, WorkerError
from robustboard.files import replace_file, require_writable
from robustboard.leaderboard.record import RECORD_FILE, DefenseInfo, Record, save


@dataclass(frozen=True)
class Scored:
    """A finished run.

    Attributes:
        record: what can be published.
        folder: where it is.
        images: the judged images, (N, C, H, W).
        training: the numbers that a training told of, in order.
    """

    record: Record
    folder: Path
    images: Floats
    training: tuple[Mapping[str, float], ...]


def score_defense(request: Request, progress: Progress | None = None, *, workers: Workers | None = None) -> Scored:
    """Score a built-in defense or a submission; its model lives in a process of its own.

    Args:
        request: what to score.
        progress: told of every stage.
        workers: knows the model's process, for a caller that runs several jobs.

    Raises:
        RobustBoardError: one sentence, with the exit code of its class; no record is written.
    """
    watched = _Watched(progress or NoProgress())
    watched.begin("data", 1)
    made = prepare(request)
    track, examples, entrant, folder = made.track, made.examples, made.entrant, made.folder
    require_writable(folder, f"The run directory {folder}")
    watched.begin("the model's process", 1)
    with (
        alone(folder),
        place(request, threads=made.threads, examples=len(examples)) as ground,
        crew(ground, entrant=entrant, folder=folder, progress=watched, workers=workers or Workers()) as team,
        Journal(folder / JOURNAL, _identity(made, team)) as journal,
    ):
        team.losses.kept_in(journal)
        with _doubted(folder, journal):
            found, study = _judged(Journaled(team.session, journal), request, made, watched)
            _store(folder, team.brought.weights, found, study, examples)
            # A model that does not repeat itself cannot pass a second time; its record says so instead.
            if found.diagnosis.status != "invalid":
                rescore(team.session, track, examples, found.outcomes, folder / "adversarial.npz", progress=watched)
        record = build_record(
            replace(found, notes=[*found.notes, *team.losses.notes()]),
            track=track,
            info=entrant.info,
            checkpoint_sha256=team.brought.checkpoint_sha256,
            code_sha256=entrant.code_sha256,
            parameters=team.brought.parameters,
            training=team.brought.training,
            hyper=entrant.hyper,
            seeds=entrant.seeds,
            device=team.device,
            threads=made.threads,
        )
        record = record.model_copy(update={"attack_spread": study.spread if study else None})
        record = save(record, found.outcomes, folder / "record")
        if request.logged:
            owed.owe(record, folder / "record", images=examples.floats(), training=watched.notes)
        journal.remove()
    return Scored(record, folder / "record", examples.floats(), tuple(watched.notes))


def _judged(
    session: Session, request: Request, made: Prepared, progress: Progress
) -> tuple[Evaluation, SeedStudy | None]:
    """The evaluation, and the study of attack seeds if one is asked for."""
    found = evaluate(
        session,
        made.track,
        made.examples,
        engine=made.engine,
        complete=request.complete,
        surrogates=_surrogates(made.track, made.dataset, folder=made.surrogates, progress=progress),
        progress=progress,
        pictures=made.pictures,
    )
    study = study_attack_seeds(
        session, made.track, made.examples, found.outcomes, seeds=request.attack_seeds, progress=progress
    )
    return found, study


@contextlib.contextmanager
def _doubted(folder: Path, journal: Journal) -> Iterator[None]:
    """Where an answer cannot be used, the next run must ask afresh; where only a process died, it must not.

    Where the gate fires, an earlier record of this very run is in doubt too, and must not be published either.
    """
    try:
        yield
    except (GateError, ModelError) as error:
        journal.remove()
        if isinstance(error, GateError):
            owed.forget(folder / "record")
            shutil.rmtree(folder / "record", ignore_errors=True)
        raise
    except LostWorkerError:
        raise
    except WorkerError:
        journal.remove()
        raise


def _identity(made: Prepared, team: Crew) -> dict[str, object]:
    """All that an answer of the model's process depends on beside the question."""
    return {
        "track": made.track.hash,
        "weights": team.brought.checkpoint_sha256,
        "entrant": dict(made.entrant.identity),
        "device": team.device,
        "threads": made.threads,
        "software": installed(),
        "source": source_sha256(),
    }


def score(
    model: nn.Module,
    *,
    track: Track | str | Path,
    data: tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | None = None,
    classes: int | None = None,
    name: str | None = None,
    n: int | None = None,
    device: str | torch.device = "cpu",
    engine: Engine | Literal["fast"] = "cascade",
    complete: int = 0,
    data_dirs: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Record:
    """Score a model of this process, for a notebook or a test; nothing is written.

    Args:
        model: a classifier: float32 images (N, C, H, W) in [0, 1] to logits (N, K). A copy in eval mode is judged.
        track: an id, the path of a TOML, or a `Track`.
        data: images (N, C, H, W) and labels (N,), for a track whose data set is `"arrays"`.
        classes: K, where the largest label of `data` does not tell.
        name: what to call it; by default its class's name.
        n: judge only the first n examples.
        device: a torch device.
        engine: as in `Request`.
        complete: see `evaluate`.
        data_dirs: folders to look for data in, before those of ROBUSTBOARD_DATA.
        progress: told of every stage.

    Returns:
        The record, with `record.metrics` and `record.outcomes`.

    Raises:
        RobustBoardError: one sentence.
    """
    loaded = track if isinstance(track, Track) else load_track(track)
    loaded = loaded if n is None else loaded.limited(n)
    loaded, judged_by = as_asked(loaded, engine)
    if data is None:
        dataset = load_dataset(loaded.dataset, data_dirs=data_folders(data_dirs))
    else:
        dataset = from_arrays(*data, classes=classes)
    loaded, examples = resolve(loaded, dataset), select(loaded, dataset)
    found = evaluate(
        LocalSession(model, torch.device(device)),
        loaded,
        examples,
        engine=judged_by,
        complete=complete,
        surrogates=_surrogates(loaded, dataset, progress=progress),
        progress=progress,
        pictures=corrupted_images(loaded, examples, data_folders(data_dirs)),
    )
    state = {key: value.detach().cpu().numpy() for key, value in model.state_dict().items()}
    title = name or type(model).__name__
    return build_record(
        found,
        track=loaded,
        info=DefenseInfo(name=_slug(title), title=title, kind="empirical"),
        checkpoint_sha256=hashlib.sha256(to_safetensors(state)).hexdigest(),
        code_sha256=None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        training=None,
        hyper={},
        seeds={},
        device=str(device),
        threads=torch.get_num_threads(),
    )


def _surrogates(
    track: Track, dataset: Dataset, *, folder: Path | None = None, progress: Progress | None = None
) -> Surrogates:
    """Trains the track's surrogates when it is called; none where there are no training images, or too few.

    The progress is told of steps that add nothing: it shows none of the training, and can end it.
    """

    def trained() -> Sequence[Surrogate]:
        try:
            data = training_data(track, dataset)
        except DataError:
            return ()
        return surrogates_of(data, track.threat, folder=folder, progress=_Unseen(progress or NoProgress()))

    return trained


def _store(folder: Path, weights: bytes | None, found: Evaluation, study: SeedStudy | None, examples: Examples) -> None:
    """Write everything of a run but its record; an earlier one goes first, since it is not about these files."""
    owed.forget(folder / "record")
    try:
        # Without this file the folder is no record, wherever its removal is interrupted.
        (folder / "record" / RECORD_FILE).unlink(missing_ok=True)
        (folder / "seed-breaks.npz").unlink(missing_ok=True)
        shutil.rmtree(folder / "record", ignore_errors=True)
    except OSError as error:
        raise OutputError(f"The earlier record in {folder} cannot be removed: {error.strerror or error}.") from error
    if weights is not None:
        replace_file(folder / "model.safetensors", lambda file: file.write(weights))
    _pack(folder / "adversarial.npz", found.adversarial, examples)
    if study is not None:
        _pack(folder / "seed-breaks.npz", study.breaks, examples)


def _pack(path: Path, images: Mapping[int, Floats], examples: Examples) -> None:
    """Write the images that broke examples, by row."""
    rows = sorted(images)
    stacked = np.array([images[row] for row in rows], dtype=np.float32)
    write_perturbed(path, rows, stacked.reshape(len(rows), *examples.images.shape[1:]), examples.hashes)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:64] or "model"


class _Unseen:
    """Training that is no stage of its own: each of its steps only gives the caller's progress a moment to end it."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner

    def begin(self, stage: str, total: int) -> None:
        self._inner.advance(0)

    def advance(self, steps: int = 1) -> None:
        self._inner.advance(0)

    def note(self, **values: float) -> None:
        self._inner.advance(0)


class _Watched:
    """Passes progress on, and keeps the numbers that a training tells for the tracking store."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.notes: list[dict[str, float]] = []

    def begin(self, stage: str, total: int) -> None:
        self._inner.begin(stage, total)

    def advance(self, steps: int = 1) -> None:
        self._inner.advance(steps)

    def note(self, **values: float) -> None:
        self.notes.append(values)
        self._inner.note(**values)
