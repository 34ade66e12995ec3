"""Which failures of a store are waited for, and for how long."""

from __future__ import annotations

import ssl

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2 as codes
from sqlalchemy import exc

from robustboard.bench.patience import SECONDS, Patient, is_away, patience
from robustboard.errors import TrackingError


def _answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} for url", response=response)


def _wrapped(cause: Exception) -> MlflowException:
    """As MLflow's client raises what went wrong below it."""
    try:
        try:
            raise cause
        except Exception as error:
            raise MlflowException(f"API request failed with exception {error}")  # noqa: B904
    except MlflowException as error:
        return error


def _database(said: str) -> exc.OperationalError:
    return exc.OperationalError("SELECT 1", {}, Exception(said))


AWAY = {
    "refused": _wrapped(requests.ConnectionError("Connection refused")),
    "timeout": _wrapped(requests.ReadTimeout("timed out")),
    "503 again and again": _wrapped(requests.exceptions.RetryError("too many 503 error responses")),
    "answer cut off": _wrapped(requests.exceptions.ChunkedEncodingError("Connection broken")),
    "artifacts, 502": _answer(502),
    "artifacts, 429": _answer(429),
    "the server's database": RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "(psycopg2.Operat"}),
    "starting database": _database("FATAL:  the database system is starting up"),
    "no database": _database('connection to server at "10.0.0.1", port 5432 failed: Connection refused'),
    "bare": ConnectionResetError("reset by peer"),
    "a data set that another run makes at this moment": MlflowException(
        '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "dataset_pk"',
        error_code=codes.BAD_REQUEST,
    ),
    "the same in a local store": MlflowException(
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest",
        error_code=codes.BAD_REQUEST,
    ),
}
REFUSED = {
    "credentials": MlflowException("401", error_code=codes.UNAUTHENTICATED),
    "rights": RestException({"error_code": "PERMISSION_DENIED", "message": "no"}),
    "parameter": RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "timed out? no: a bad key"}),
    "not MLflow": MlflowException("404", error_code=codes.ENDPOINT_NOT_FOUND),
    "not JSON": MlflowException("API request was successful but the response body was not in a valid JSON format"),
    "artifacts, 403": _answer(403),
    "certificate": _wrapped(requests.exceptions.SSLError(ssl.SSLCertVerificationError("certificate verify failed"))),
    "password": _database('FATAL:  password authentication failed for user "keeper"'),
    "database": _database('FATAL:  database "rusn" does not exist'),
    "another duplicate": MlflowException(
        "(sqlite3.IntegrityError) UNIQUE constraint failed: params.key", error_code=codes.BAD_REQUEST
    ),
    "full disk": OSError(28, "No space left on device"),
    "a bug": ValueError("odd"),
}


@pytest.mark.parametrize("name", AWAY)
def test_what_heals_by_itself_is_waited_for(name):
    assert is_away(AWAY[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_will_be_refused_again_is_not(name):
    assert not is_away(REFUSED[name])


def test_a_local_database_that_is_busy_is_waited_for_and_one_that_is_full_is_not():
    import sqlite3

    for said, away in (("database is locked", True), ("database or disk is full", False), ("disk I/O error", False)):
        cause = sqlite3.OperationalError(said)
        error = exc.OperationalError("INSERT", {}, cause)
        error.__cause__ = cause
        wrapped = MlflowException(str(error), error_code=codes.TEMPORARILY_UNAVAILABLE)
        wrapped.__cause__ = error
        assert is_away(wrapped) is away, said


class Store:
    """Is away for the first calls; its clock moves when somebody sleeps."""

    def __init__(self, away: int, error: Exception | None = None) -> None:
        self.away, self.error = away, error or ConnectionRefusedError("refused")
        self.calls, self.now, self.pauses = 0, 0.0, []

    def ask(self, what: str) -> str:
        self.calls += 1
        if self.calls <= self.away:
            raise self.error
        return what

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def patient(self, seconds: float) -> Patient:
        return Patient(self, seconds, sleep=self.sleep, clock=lambda: self.now)


def test_pauses_grow_until_the_store_answers():
    store = Store(away=6)
    assert store.patient(60).ask("question") == "question"
    assert store.pauses == [0.5, 1, 2, 4, 8, 8]


def test_patience_ends():
    """Each call may wait anew: what counts is how long the store is away at a time."""
    store = Store(away=1000)
    with pytest.raises(ConnectionRefusedError):
        store.patient(60).ask("question")
    assert 50 < store.now <= 60
    assert store.calls == len(store.pauses) + 1


@pytest.mark.parametrize(("seconds", "error"), [(0, None), (60, ValueError("odd"))])
def test_nothing_is_repeated_without_patience_or_hope(seconds, error):
    store = Store(away=1000, error=error)
    with pytest.raises(type(store.error)):
        store.patient(seconds).ask("question")
    assert (store.calls, store.pauses) == (1, [])


def test_a_call_that_is_not_worth_waiting_for():
    store = Store(away=1)
    with pytest.raises(ConnectionRefusedError):
        store.patient(60).once.ask("question")
    assert store.pauses == []


@pytest.mark.parametrize(("given", "seconds"), [("", 60), ("0", 0), ("7.5", 7.5), ("inf", float("inf"))])
def test_patience_is_a_setting(monkeypatch, given, seconds):
    monkeypatch.setenv(SECONDS, given)
    assert patience() == seconds


@pytest.mark.parametrize("given", ["-1", "a minute", "nan"])
def test_a_setting_that_is_no_number_of_seconds_is_one_sentence(monkeypatch, given):
    monkeypatch.setenv(SECONDS, given)
    with pytest.raises(TrackingError, match=r"takes a number of seconds from 0, .*\.$"):
        patience()
