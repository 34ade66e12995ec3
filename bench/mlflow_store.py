"""An MLflow store: how it is named, made, opened and left, with nothing of it in the process afterwards.

The client is the only part of MLflow in use: no active run, no tracking URI and no environment variable of the process
steers it or is left behind. Environment and log levels do change while a block runs, so blocks belong on one thread.
The store's URI and artifact root are always explicit, telemetry is off, and nothing is printed.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from robustboard.bench.patience import Patient, is_away
from robustboard.errors import StoreAwayError, TrackingError

EXPERIMENT = "robustboard"
ARTIFACTS = "mlflow-artifacts"
"""The folder of a local store's artifacts: copies of records, so that readers of a runs folder pass it over."""

_SQLITE = "sqlite:///"
_DATABASE_SERVER = re.compile(r"(postgresql|mysql|mssql)(\+\w+)?://")
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
    # MLflow's import would take it away from whoever has it, as telemetry is off.
    "_MLFLOW_TELEMETRY_SESSION_ID": None,
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
    """A store's URI as it may be shown: without what stands before the host or in the query.

    Examples:
        >>> without_password("postgresql://keeper:secret@db.example.org/runs?password=secret")
        'postgresql://***@db.example.org/runs?***'
    """
    return _hidden(uri, uri)


def _hidden(text: str, uri: str) -> str:
    """A text without the parts of a URI that may hold a password, which itself may hold any character."""
    if uri.startswith(_SQLITE):
        return text
    if user := re.search("//.+@", uri):
        text = text.replace(user[0], "//***@")
        uri = uri.replace(user[0], "//***@")
    _, mark, query = uri.partition("?")
    return text.replace(mark + query, "?***") if query else text


def check(uri: str) -> None:
    """See that the store can be used, so that what cannot be logged to is found before a long run.

    A local store that is not there yet is not made: what is refused later must leave nothing behind.

    Raises:
        StoreAwayError: if a store that is not of this machine does not answer.
        TrackingError: if the store cannot be used.
    """
    _, database = _checked(uri)
    if database is None or database.exists():
        prepare(uri)
        return
    above = next(folder for folder in database.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise TrackingError(f"The MLflow store {uri} cannot be made: {above} is not a folder that can be written.")


def prepare(uri: str) -> None:
    """Open the store, making a local one that is not there yet.

    Raises:
        TrackingError: if the store cannot be used.
    """
    with open_store(uri, make=True) as client:
        experiment_of(client, uri)


@contextmanager
def open_store(uri: str, *, make: bool, patience: float = 0.0) -> Iterator[Any]:
    """An MLflow client of the store at `uri`; whatever goes wrong within is one TrackingError.

    Args:
        uri: the store.
        make: whether a local store that is not there is made.
        patience: how many seconds the store may be away at a time.

    Raises:
        StoreAwayError: if it was away for longer.
        TrackingError: if the store cannot be used, now or later.
    """
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
                if _DATABASE_SERVER.match(uri):
                    Patient(_DatabaseServer(uri), patience).reach()
                yield Patient(MlflowClient(tracking_uri=uri), patience)
            except TrackingError:
                raise
            except Exception as error:
                kind = StoreAwayError if is_away(error) else TrackingError
                reason = _reason(error, uri)
                raise kind(f"The MLflow store {without_password(uri)} cannot be used: {reason}.") from error


def _reason(error: Exception, uri: str) -> str:
    said = str(error)
    if answered := re.search(r"too many (\d+) error responses", said):
        return f"the server answers with error {answered[1]}"
    if is_away(error) and re.search("Max retries exceeded|timed out", said) and uri.startswith("http"):
        return "no server answers there"
    return _hidden(why(error), uri)


class _DatabaseServer:
    """A database that is reached without a server of MLflow's in between."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def reach(self) -> None:
        """Connect once: MLflow itself would try a database that is away for minutes."""
        from mlflow.store.db.utils import create_sqlalchemy_engine

        create_sqlalchemy_engine(self._uri).connect().close()


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
    elif re.match(r"(?!file:|sqlite)[a-z][a-z0-9+-]*://", uri) or uri == "databricks":
        return uri, None
    raise TrackingError(
        f"{without_password(uri)!r} is not the URI of an MLflow store; give sqlite:///path/to/mlflow.db, or "
        "http://host:port of a server."
    )


def _check_database(path: Path) -> None:
    """Refuse what is not a store before MLflow makes its tables in it."""
    if not path.exists():
        raise TrackingError(f"There is no MLflow store {_SQLITE}{path}; score a defense first, or correct the path.")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=20)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    except sqlite3.Error as error:
        raise TrackingError(f"The MLflow store {_SQLITE}{path} cannot be used: {why(error)}.") from error
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
            try:
                path.hardlink_to(made)
            except OSError:
                # Somebody else's store is there by now, or the file system has no hard links.
                if not path.exists():
                    made.rename(path)
    except OSError as error:
        raise TrackingError(f"The MLflow store {_SQLITE}{path} cannot be made: {error.strerror or error}.") from error


def _artifact_root(database: Path) -> str:
    return (database.parent / ARTIFACTS).as_uri()


def experiment_of(client: Any, uri: str) -> str:
    """The id of our experiment, which may be made by somebody else at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=_artifact_location(uri)))
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


def _artifact_location(uri: str) -> str | None:
    """Where a new experiment's artifacts go; a server decides that itself."""
    _, database = _checked(uri)
    if database is not None:
        return _artifact_root(database)
    if not _DATABASE_SERVER.match(uri):
        return None
    raise TrackingError(
        f"The database {without_password(uri)} has no experiment {EXPERIMENT}, and does not say where artifacts go; "
        "use a server of MLflow's, or make the experiment with: mlflow experiments create --experiment-name "
        f"{EXPERIMENT} --artifact-location URI."
    )


@contextmanager
def new_run(client: Any, experiment: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A new run of a patient client, finished with the block, or failed with it."""
    run = str(client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id)
    try:
        yield run
        client.set_terminated(run, "FINISHED")
    except BaseException as error:
        # The store itself may be what failed: a run that stays "running" is passed over as well.
        if not is_away(error):
            with suppress(Exception):
                client.once.set_terminated(run, "FAILED")
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


def why(error: Exception) -> str:
    """Why, in whole sentences where there is room for them."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if len(line) > _LONGEST_REASON:
        line = line[:_LONGEST_REASON]
        line = line.rpartition(". ")[0] or line
    return line.rstrip(". ")
