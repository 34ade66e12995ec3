"""Results in an MLflow store: one parent run a scored defense, one child run a stage; and records back out of it.

A record is logged once, whatever happened to earlier attempts: all runs of one logging carry a key, which the same
record in the same folder always has. Where a finished parent has that key, nothing is left to do. Otherwise everything
is logged anew, what earlier attempts left under the key is deleted, and the parent is finished last. Readers believe
finished parents only.

Evaluation and training run where MLflow is not installed: only this module and `mlflow_store` import it, when called.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from robustboard.bench.mlflow_store import EXPERIMENT, experiment_of, new_run, open_store, why, without_password
from robustboard.bench.patience import patience
from robustboard.errors import TrackingError
from robustboard.leaderboard.record import Record, load, sort_key

_RECORD = "record"
_ROLE, _RUN = "robustboard.role", "robustboard.run"
_TRACK, _TRACK_HASH = "robustboard.track", "robustboard.track_hash"
_DEFENSE, _SEED = "robustboard.defense", "robustboard.seed"
_KEY = "robustboard.key"
_PAGE = 1000
_LONGEST_KEY, _LONGEST_VALUE, _LONGEST_DIGEST = 250, 6000, 36


class Shaped(Protocol):
    """What is told of the images: an array has it, and so has what is remembered of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        ...

    @property
    def nbytes(self) -> int:
        """Their size in memory."""
        ...


def log_record(
    record: Record, folder: Path, *, uri: str, images: Shaped, training: Sequence[Mapping[str, float]]
) -> str:
    """Log a published record, unless it is logged; a run that this does not finish is passed over by readers.

    A store that is away is waited for; see `patience`.

    Args:
        record: the record.
        folder: where its files are; all of them become artifacts.
        uri: the store; a local one is made if it is not there.
        images: the evaluated images, (N, C, H, W), for the data set's profile.
        training: the numbers that the training told of, in order; those with an `epoch` are logged at that step, the
            others at their position.

    Returns:
        The id of the parent run.

    Raises:
        StoreAwayError: if the store was away for too long.
        TrackingError: if the store cannot be used.
    """
    with open_store(uri, make=True, patience=patience()) as client:
        experiment = experiment_of(client, uri)
        tags = _tags(record, folder)
        earlier = list(_search(client, experiment, f"tags.`{_KEY}` = '{tags[_KEY]}'"))
        for run in earlier:
            if run.info.status == "FINISHED" and run.data.tags.get(_ROLE) == "score":
                return str(run.info.run_id)
        name = f"{record.defense.name} on {record.track.id}"
        with new_run(client, experiment, name, tags) as run:
            whole = {run}
            client.log_inputs(run, [_dataset(record, images)])
            client.log_batch(run, params=_params(record), metrics=_metrics(_numbers(record)), synchronous=True)
            for stage, cost in record.cost.items():
                mark = {_ROLE: "stage", "robustboard.stage": stage, "mlflow.parentRunId": run, _KEY: tags[_KEY]}
                with new_run(client, experiment, stage, mark) as child:
                    whole.add(child)
                    counted = {key: value for key, value in cost.model_dump().items() if value is not None}
                    client.log_batch(child, metrics=_metrics(counted), synchronous=True)
                    if stage == "train":
                        client.log_batch(child, metrics=_epochs(training), synchronous=True)
            client.log_artifacts(run, str(folder), artifact_path=_RECORD)
            _discard_others(client, experiment, tags[_KEY], whole)
        return run


def _discard_others(client: Any, experiment: str, key: str, whole: set[str]) -> None:
    """Delete what attempts that were cut short left behind, and runs that were made though their answer was lost."""
    for run in list(_search(client, experiment, f"tags.`{_KEY}` = '{key}'")):
        if run.info.run_id not in whole:
            client.delete_run(run.info.run_id)


def read_records(uri: str) -> list[Record]:
    """The newest record of each run directory, that is of each (track, track hash, defense, training seed, directory).

    Returns:
        The records, in the order of `record.load_all`; of two that hold the same result one is kept.

    Raises:
        TrackingError: if the store is missing, cannot be used, holds no records, or one of them is damaged.
    """
    seen: set[tuple[str, ...]] = set()
    records: dict[tuple[str, ...], Record] = {}
    with open_store(uri, make=False) as client, tempfile.TemporaryDirectory() as scratch:
        for run in _scored_runs(client):
            key = tuple(run.data.tags.get(tag, "") for tag in (_TRACK, _TRACK_HASH, _DEFENSE, _SEED, _RUN))
            if key not in seen:
                seen.add(key)
                record = _fetch(client, run.info.run_id, Path(scratch))
                records.setdefault(sort_key(record), record)
    if not records:
        raise TrackingError(f"The MLflow store {without_password(uri)} holds no scored defense; score one first.")
    return [records[key] for key in sorted(records)]


def _scored_runs(client: Any) -> Iterator[Any]:
    """Finished parent runs, newest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        wanted = f"tags.`{_ROLE}` = 'score' and attributes.status = 'FINISHED'"
        yield from _search(client, experiment.experiment_id, wanted)


def _search(client: Any, experiment: str, wanted: str) -> Iterator[Any]:
    """Runs that are not deleted, newest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=wanted,
            order_by=["attributes.start_time DESC"],
            max_results=_PAGE,
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _fetch(client: Any, run: str, scratch: Path) -> Record:
    target = scratch / run
    target.mkdir()
    try:
        folder = Path(client.download_artifacts(run, _RECORD, str(target)))
        return load(folder)
    except Exception as error:
        reason = why(error).replace(f"{target}{os.sep}", "")
        raise TrackingError(f"The record of run {run} in the MLflow store cannot be read: {reason}.") from error


def run_key(record: Record, folder: Path) -> str:
    """What all runs of one logging carry: the same for the same record in the same folder, and for no other."""
    return hashlib.sha256(f"{_place(folder)}\n{record.to_json()}".encode()).hexdigest()[:32]


def _place(folder: Path) -> str:
    # Hashed, as a shared store has no business with the paths of a machine.
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]


def _tags(record: Record, folder: Path) -> dict[str, str]:
    return {
        _ROLE: "score",
        _RUN: _place(folder),
        _KEY: run_key(record, folder),
        _TRACK: record.track.id,
        _TRACK_HASH: record.track.hash,
        _DEFENSE: record.defense.name,
        _SEED: str(record.seeds.get("training", "")),
        "robustboard.checkpoint": record.checkpoint_sha256,
        "robustboard.status": record.status,
        "mlflow.note.content": f"{record.defense.title}, judged on {record.track.id}.",
    }


def _dataset(record: Record, images: Shaped) -> Any:
    """The evaluated images, by our digest of all of them: MLflow's own looks at the first ten thousand numbers."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    content = record.track.content
    data = Dataset(
        name=record.track.id,
        # A track of arrays that nobody pinned has no hash of its images, but its own hash.
        digest=str(content.get("images_sha256") or record.track.hash)[:_LONGEST_DIGEST],
        source_type="code",
        source=json.dumps({"tags": {"robustboard.dataset": str(content.get("dataset", ""))}}),
        profile=json.dumps({"features_shape": list(images.shape), "features_nbytes": int(images.nbytes)}),
    )
    return DatasetInput(data, tags=[InputTag("mlflow.data.context", "evaluation")])


def _numbers(record: Record) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, metric in record.metrics.items():
        numbers |= {name: metric.value, f"{name}.low": metric.low, f"{name}.high": metric.high}
    return numbers


def _epochs(training: Sequence[Mapping[str, float]]) -> list[Any]:
    found = []
    for position, values in enumerate(training):
        step = int(values.get("epoch", position))
        found += _metrics({key: value for key, value in values.items() if key != "epoch"}, step=step)
    return found


def _metrics(values: Mapping[str, float], *, step: int = 0) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(_key(name), float(value), now, step) for name, value in values.items()]


def _params(record: Record) -> list[Any]:
    """Track and hyper-parameters, flattened to dotted names, within MLflow's limits."""
    from mlflow.entities import Param

    flat = {**dict(_leaves("track", record.track.content)), **dict(_leaves("hyper", record.hyper))}
    return [Param(name, value[:_LONGEST_VALUE]) for name, value in flat.items()]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield _key(name), value if isinstance(value, str) else json.dumps(value, default=str)


def _key(name: str) -> str:
    """A name that MLflow takes: its characters, its length, and no path that could be written in another way."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).strip("/.")[:_LONGEST_KEY] or "_"
