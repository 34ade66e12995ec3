"""A real MLflow server on a real PostgreSQL: it goes away in the middle of a run, comes back, and ends complete."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from mlflow_runs import whole
from servers import PASSWORD, Cluster, MlflowServer, postgresql_programs
from typer.testing import CliRunner

from robustboard.bench import owed, tracking
from robustboard.bench.cli import app
from robustboard.bench.patience import SECONDS
from robustboard.errors import StoreAwayError, TrackingError

CODE = "from robustboard.bench.cli import main; main()"
SCORE = ["score", "standard", "--track", "digits-linf@1", "--n", "12", "--set", "epochs=2", "--attack-engine", "fast"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    programs = postgresql_programs()
    if programs is None:
        sentence = "there is no PostgreSQL in /usr/lib/postgresql; install Debian's postgresql"
        if os.environ.get("ROBUSTBOARD_REQUIRE_DATA") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    # Not below pytest's own folder, which is its user's alone.
    with tempfile.TemporaryDirectory(prefix="robustboard-") as folder:
        made = Cluster(programs, Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    made = MlflowServer(cluster.uri, folder / "artifacts", folder / "log")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """A run directory whose record is owed, as nobody answered when it was made."""
    run = tmp_path_factory.mktemp("scored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECONDS, "0")
        patch.setenv("MLFLOW_TRACKING_URI", f"http://keeper:{PASSWORD}@127.0.0.1:9")
        done = CliRunner().invoke(app, [*SCORE, "--run-dir", str(run)])
    assert done.exit_code == 0, done.output
    assert f"log it with: robustboard sync {run}" in done.stderr
    assert PASSWORD not in done.output + (run / "record.owed.json").read_text()
    return run


@pytest.fixture
def run(scored, tmp_path) -> Path:
    """A copy of that run directory, for one test."""
    return shutil.copytree(scored, tmp_path / "run")


@pytest.fixture
def at_request(monkeypatch) -> Callable[[int, Callable[[], None]], list[str]]:
    """Do something just before a request, counted from 1, leaves; returns the requests as they are made."""

    def prepare(number: int, act: Callable[[], None]) -> list[str]:
        made: list[str] = []
        send = requests.Session.send

        def watched(session, request, **settings):
            made.append(f"{request.method} {request.path_url}")
            if len(made) == number:
                act()
            return send(session, request, **settings)

        monkeypatch.setattr(requests.Session, "send", watched)
        return made

    return prepare


def _stored(uri: str, run: Path, *, database: str | None = None) -> dict[str, object]:
    """What the store holds of a run directory; exactly one finished run. A server's database must be named."""
    from mlflow import MlflowClient

    from robustboard.leaderboard.record import load

    key = tracking.run_key(load(run / "record"), run / "record")
    return whole(MlflowClient(tracking_uri=uri), database or uri, key)


@pytest.fixture(scope="module")
def expected(scored, template, tmp_path_factory) -> dict[str, object]:
    """What a local store holds of the same run."""
    folder = tmp_path_factory.mktemp("expected")
    uri = f"sqlite:///{shutil.copy(template / 'mlflow.db', folder)}"
    run = shutil.copytree(scored, folder / "run")
    assert owed.log(run / "record", uri)
    found = _stored(uri, run)
    assert len(found["runs"]) == 1 + len(tracking.read_records(uri)[0].cost)
    return found


def test_a_server_that_leaves_in_the_middle_and_comes_back_ends_complete(cluster, server, run, expected, at_request):
    """One process waits for it, and goes on where it was."""
    back = threading.Thread(target=server.start)

    def stop() -> None:
        server.stop()
        back.start()

    made = at_request(20, stop)
    assert owed.log(run / "record", server.uri)
    back.join()
    assert len(made) > 25, "it was not the middle"
    assert made[19] == made[20], "nothing was asked again"
    assert _stored(server.uri, run, database=cluster.uri) == expected
    read = [record.to_json() for record in tracking.read_records(server.uri)]
    assert read.count((run / "record" / "record.json").read_text()) == 1
    assert owed.find(run) == []


@pytest.mark.parametrize("number", [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9, 30))])
def test_a_database_that_is_stopped_under_the_server_and_comes_back(cluster, server, run, expected, at_request, number):
    """The server answers "not now"."""
    back = threading.Timer(0.3, cluster.start)

    def stop() -> None:
        cluster.stop()
        back.start()

    at_request(number, stop)
    assert owed.log(run / "record", server.uri)
    back.join()
    assert _stored(server.uri, run, database=cluster.uri) == expected


def test_a_server_that_stays_away_is_synced_later(cluster, server, run, expected, at_request, monkeypatch):
    """The command line, with the store of the environment: away in the middle, owed, logged once by `sync`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv(SECONDS, "1")
    at_request(17, server.stop)
    with pytest.raises(StoreAwayError, match="no server answers there"):
        owed.log(run / "record", server.uri)
    away = CliRunner().invoke(app, ["sync", str(run)])
    assert isinstance(away.exception, StoreAwayError)
    server.start()
    logged = CliRunner().invoke(app, ["sync", str(run)])
    assert (logged.exit_code, logged.stdout) == (0, f"Logged {run / 'record'} to {server.uri}\n")
    assert _stored(server.uri, run, database=cluster.uri) == expected
    again = CliRunner().invoke(app, ["sync", str(run)])
    assert (again.exit_code, again.stdout) == (0, "Nothing is owed to a store here.\n")


@pytest.mark.parametrize("number", [24, pytest.param(7, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_in_the_middle_is_synced_later(cluster, server, run, expected, number):
    code = f"""
import os, signal, requests
made, send = [], requests.Session.send

def counted(*args, **settings):
    answer = send(*args, **settings)
    made.append(1)
    if len(made) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

requests.Session.send = counted
{CODE}
"""
    command = [sys.executable, "-P", "-c", code, "sync", str(run), "--mlflow", server.uri]
    killed = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert owed.find(run) == [run / "record"]
    assert owed.log(run / "record", server.uri)
    assert _stored(server.uri, run, database=cluster.uri) == expected


def test_a_database_without_a_server_says_where_its_artifacts_go(cluster, run, expected, tmp_path):
    """Without that MLflow would put them into a folder of the machine that scored, where nobody finds them."""
    from mlflow import MlflowClient

    uri = cluster.database("bare")
    with pytest.raises(TrackingError, match="does not say where artifacts go") as caught:
        owed.log(run / "record", uri)
    assert PASSWORD not in str(caught.value)
    shared = tmp_path / "shared"
    MlflowClient(tracking_uri=uri).create_experiment("robustboard", artifact_location=shared.as_uri())
    assert owed.log(run / "record", uri)
    assert _stored(uri, run) == expected
    assert len(list(shared.rglob("record.json"))) == 1


def test_a_database_that_refuses_or_is_away_is_told_apart(cluster, run, monkeypatch):
    monkeypatch.setenv(SECONDS, "0")
    wrong = cluster.uri.replace(PASSWORD, "wr0ng")
    with pytest.raises(TrackingError, match="password authentication failed") as refused:
        owed.log(run / "record", wrong)
    assert not isinstance(refused.value, StoreAwayError)
    nobody = f"postgresql+psycopg2://keeper:{PASSWORD}@127.0.0.1:9/postgres"
    with pytest.raises(StoreAwayError) as away:
        owed.log(run / "record", nobody)
    assert not [word for error in (refused, away) for word in (PASSWORD, "wr0ng") if word in str(error.value)]
