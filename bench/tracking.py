"""Results in an MLflow store: one parent run a scored defense, one child run a stage; and records back out of it.

Only this module imports MLflow, and it uses the client only: no active run, no tracking URI and no environment variable
of the process steers it or is left behind. Environment and log levels do change while a call runs, so calls belong on
one thread. The store's URI and artifact root are always explicit, telemetry is off, and nothing is printed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robustboard.bench.examiner import Floats
from robustboard.errors import TrackingError
from robustboard.leaderboard.record import Record, load, sort_key

EXPERIMENT = "robustboard"
ARTIFACTS = "mlflow-artifacts"
"""The folder of a local store's artifacts: copies of records, so that readers of a runs folder pass it over."""

_SQLITE = "sqlite:///"
_RECORD = "record"
_ROLE, _RUN = "robustboard.role", "robustboard.run"
_TRACK, _TRACK_HASH = "robustboard.track", "robustboard.track_hash"
_DEFENSE, _SEED = "robustboard.defense", "robustboard.seed"
_PAGE = 1000
_LONGEST_KEY, _LONGEST_VALUE, _LONGEST_DIGEST = 250, 6000, 36
_LONGEST_REASON = 300

_FORCED: Mapping[str, str | None] = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow keeps its engines for ever, and a pooled connection would go on writing into a database file since deleted.
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",
    # Metrics would be tied to a model of the process.
    "MLFLOW_ACTIVE_MODEL_ID": None,
    "_MLFLOW_ACTIVE_MODEL_ID": None,
}
# MLflow's own defaults try an unreachable server for many minutes.
_UNLESS_SET: Mapping[str, str | None] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
_LOGGERS = ("mlflow", "alembic", "sqlalchemy.engine", "urllib3")


def local_uri(folder: Path) -> str:
    """The URI of the SQLite store in `folder`.

    Raises:
        TrackingError: if no URI can name that folder.
    """
    return _checked(f"{_SQLITE}{(folder / 'mlflow.db').resolve()}")[0]


def store_uri(given: str | None, folder: Path) -> str:
    """The store to use: the one given, else MLFLOW_TRACKING_URI, else the SQLite store in `folder`."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or local_uri(folder)


def without_password(uri: str) -> str:
    """A store's URI as it may be shown.

    Examples:
        >>> without_password("postgresql://keeper:secret@db.example.org/runs")
        'postgresql://***@db.example.org/runs'
    """
    return re.sub(r"//[^/@]*@", "//***@", uri)


def prepare(uri: str) -> None:
    """Open the store, making a local one that is not there yet: what cannot be logged to is found before a long run.

    Raises:
        TrackingError: if the store cannot be used.
    """
    with _client(uri, make=True) as client:
        _experiment(client, uri)


def log_record(
    record: Record, folder: Path, *, uri: str, images: Floats, training: Sequence[Mapping[str, float]]
) -> str:
    """Log a published record; a run that this does not finish is marked as failed, and readers pass it over.

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
        TrackingError: if the store cannot be used.
    """
    with _client(uri, make=True) as client:
        experiment = _experiment(client, uri)
        name = f"{record.defense.name} on {record.track.id}"
        with _run(client, experiment, name, _tags(record, folder)) as run:
            client.log_inputs(run, [_dataset(record, images)])
            client.log_batch(run, params=_params(record), metrics=_metrics(_numbers(record)), synchronous=True)
            for stage, cost in record.cost.items():
                tags = {_ROLE: "stage", "robustboard.stage": stage, "mlflow.parentRunId": run}
                with _run(client, experiment, stage, tags) as child:
                    counted = {key: value for key, value in cost.model_dump().items() if value is not None}
                    client.log_batch(child, metrics=_metrics(counted), synchronous=True)
                    if stage == "train":
                        client.log_batch(child, metrics=_epochs(training), synchronous=True)
            client.log_artifacts(run, str(folder), artifact_path=_RECORD)
        return run


def read_records(uri: str) -> list[Record]:
    """The newest record of each run directory, that is of each (track, track hash, defense, training seed, directory).

    Returns:
        The records, in the order of `record.load_all`; of two that hold the same result one is kept.

    Raises:
        TrackingError: if the store is missing, cannot be used, holds no records, or one of them is damaged.
    """
    seen: set[tuple[str, ...]] = set()
    records: dict[tuple[str, ...], Record] = {}
    with _client(uri, make=False) as client, tempfile.TemporaryDirectory() as scratch:
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
    token = None
    while experiment is not None:
        page = client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{_ROLE}` = 'score' and attributes.status = 'FINISHED'",
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
        reason = _reason(error).replace(f"{target}{os.sep}", "")
        raise TrackingError(
            f"Run {run} of the MLflow store holds no whole record ({reason}); delete that run."
        ) from error


@contextmanager
def _client(uri: str, *, make: bool) -> Iterator[Any]:
    """An MLflow client of the store at `uri`; whatever goes wrong within is one TrackingError."""
    uri, database = _checked(uri)
    with _environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise TrackingError("MLflow is not installed; install it with: pip install mlflow.") from error
        with _silence():
            try:
                if database is not None and make and not database.exists():
                    _make_database(database)
                if database is not None:
                    _check_database(database)
                yield MlflowClient(tracking_uri=uri)
            except TrackingError:
                raise
            except Exception as error:
                unanswered = re.search("Max retries exceeded|timed out", str(error)) and uri.startswith("http")
                reason = "no server answers there" if unanswered else _reason(error)
                raise TrackingError(f"The MLflow store {without_password(uri)} cannot be used: {reason}.") from error


def _checked(uri: str) -> tuple[str, Path | None]:
    """The URI with an absolute path, and the SQLite database that it names, if it names one."""
    if uri.startswith(_SQLITE):
        name = uri.removeprefix(_SQLITE)
        if re.search("[%?]", name):
            # SQLAlchemy decodes them and MLflow does not, so that one makes a folder that the other does not look into.
            raise TrackingError(f"{uri!r} cannot be used: the path of an MLflow store must be free of '%' and '?'.")
        if name not in {"", ":memory:"}:
            path = Path(name).resolve()
            return f"{_SQLITE}{path}", path
    elif re.match(r"(?!file:|sqlite:)[a-z][a-z0-9+-]*://", uri) or uri == "databricks":
        return uri, None
    raise TrackingError(
        f"{uri!r} is not the URI of an MLflow store; give sqlite:///path/to/mlflow.db, or http://host:port of a server."
    )


def _check_database(path: Path) -> None:
    """Refuse what is not a store before MLflow makes its tables in it."""
    if not path.exists():
        raise TrackingError(f"There is no MLflow store {_SQLITE}{path}; score a defense first, or correct the path.")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=20)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise TrackingError(f"The MLflow store {_SQLITE}{path} cannot be used: {_reason(error)}.") from error
    if not {"experiments", "runs", "alembic_version"} <= tables:
        raise TrackingError(f"The MLflow store {_SQLITE}{path} cannot be used: that database is not one of MLflow.")


def _make_database(path: Path) -> None:
    """Make a store that appears whole or not at all, whoever else makes it and whatever interrupts the migrations."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            SqlAlchemyStore(f"{_SQLITE}{made}", _artifact_root(path))
            with suppress(FileExistsError):
                path.hardlink_to(made)
    except OSError as error:
        raise TrackingError(f"The MLflow store {_SQLITE}{path} cannot be made: {error.strerror or error}.") from error


def _artifact_root(database: Path) -> str:
    return (database.parent / ARTIFACTS).as_uri()


def _experiment(client: Any, uri: str) -> str:
    """The id of our experiment, which may be made by somebody else at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        _, database = _checked(uri)
        location = None if database is None else _artifact_root(database)
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location))
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"The experiment {EXPERIMENT} of the MLflow store {without_password(uri)} was deleted; restore it with: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}."
        )
    return str(found.experiment_id)


@contextmanager
def _run(client: Any, experiment: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A new run, finished with the block, or failed with it."""
    run = str(client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id)
    try:
        yield run
        client.set_terminated(run, "FINISHED")
    except BaseException:
        # The store itself may be what failed: a run that stays "running" is passed over as well.
        with suppress(Exception):
            client.set_terminated(run, "FAILED")
        raise


@contextmanager
def _environment() -> Iterator[None]:
    """The environment that MLflow must see, for the block only."""
    wanted = {**{key: value for key, value in _UNLESS_SET.items() if key not in os.environ}, **_FORCED}
    before = {key: os.environ.get(key) for key in wanted}

    def put(values: Mapping[str, str | None]) -> None:
        for key, value in values.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value

    put(wanted)
    try:
        yield
    finally:
        put(before)


@contextmanager
def _silence() -> Iterator[None]:
    """No log lines of MLflow and of what it uses: what matters in them is in the error we raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _tags(record: Record, folder: Path) -> dict[str, str]:
    return {
        _ROLE: "score",
        # Hashed, as a shared store has no business with the paths of a machine.
        _RUN: hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16],
        _TRACK: record.track.id,
        _TRACK_HASH: record.track.hash,
        _DEFENSE: record.defense.name,
        _SEED: str(record.seeds.get("training", "")),
        "robustboard.checkpoint": record.checkpoint_sha256,
        "robustboard.status": record.status,
        "mlflow.note.content": f"{record.defense.title}, judged on {record.track.id}.",
    }


def _dataset(record: Record, images: Floats) -> Any:
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


def _reason(error: Exception) -> str:
    """Why, in whole sentences where there is room for them."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON]
        line = line.rpartition(". ")[0] or line
    return line.rstrip(". ")
