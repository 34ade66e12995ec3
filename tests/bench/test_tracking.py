"""The MLflow store: what goes in comes out, what fails is passed over, and nothing is left behind in the process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from mlflow_runs import whole

from robustboard.bench import mlflow_store, patience, tracking
from robustboard.errors import TrackingError
from robustboard.leaderboard.record import OUTCOMES_FILE, RECORD_FILE, Record, load, load_all

IMAGES = np.zeros((60, 1, 8, 8), dtype=np.float32)
EPOCHS = (
    {"epoch": 3.0, "loss": 0.5, "validation": 0.8},
    {"epoch": 4.0, "loss": 0.25, "validation": 0.9},
)


@pytest.fixture
def log(uri):
    """Log a published record."""

    def put(record: Record, folder: Path, training=()) -> str:
        return tracking.log_record(record, folder, uri=uri, images=IMAGES, training=training)

    return put


def _client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _runs(uri):
    """Every run of the store, whatever its status, oldest first."""
    client = _client(uri)
    experiment = client.get_experiment_by_name(mlflow_store.EXPERIMENT)
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def test_what_is_logged_is_read_back_byte_for_byte(publish, log, uri, tmp_path):
    """A board from the store must be the board from the records."""
    expected = {}
    for where, name, rows in (("a", "trades", 1), ("b", "pgd-at", 2), ("c", "standard", 3)):
        record, folder = publish(where, name=name, rows=rows)
        log(record, folder)
        expected[name] = load(folder)
    read = tracking.read_records(uri)
    assert [record.defense.name for record in read] == sorted(expected)
    for record in read:
        assert record.to_json() == expected[record.defense.name].to_json()
        assert record.outcomes_parquet == expected[record.defense.name].outcomes_parquet
    by_folder = load_all(tmp_path / "runs", ignore={mlflow_store.ARTIFACTS})
    assert [record.to_json() for record in read] == [record.to_json() for record in by_folder]


def test_a_parent_run_carries_the_result_and_a_child_run_each_stage(publish, log, uri):
    record, folder = publish()
    run_id = log(record, folder, EPOCHS)
    client = _client(uri)
    parent = client.get_run(run_id)
    assert parent.info.status == "FINISHED"
    tags = parent.data.tags
    assert tags["robustboard.role"] == "score"
    assert tags["robustboard.track"] == record.track.id
    assert tags["robustboard.track_hash"] == record.track.hash
    assert tags["robustboard.defense"] == "pgd-at"
    assert tags["robustboard.seed"] == "0"
    assert tags["robustboard.checkpoint"] == record.checkpoint_sha256
    assert tags["robustboard.status"] == record.status
    assert record.defense.title in tags["mlflow.note.content"]
    assert not [key for key, value in tags.items() if str(folder) in value], "a machine's path is in a tag"
    for name, metric in record.metrics.items():
        found = parent.data.metrics
        assert (found[name], found[f"{name}.low"], found[f"{name}.high"]) == (metric.value, metric.low, metric.high)
    assert parent.data.params["track.threat.eps"] == "1/10"
    assert parent.data.params["hyper.epochs"] == "30"
    files = {item.path for item in client.list_artifacts(run_id, "record")}
    assert files == {f"record/{RECORD_FILE}", f"record/{OUTCOMES_FILE}"}

    (data,) = parent.inputs.dataset_inputs
    assert data.dataset.digest == ("5a" * 32)[:36]
    assert json.loads(data.dataset.profile)["features_shape"] == [60, 1, 8, 8]
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "evaluation"}

    children = {run.info.run_name: run for run in _runs(uri) if run.info.run_id != run_id}
    assert set(children) == {"train", "pgd"}
    for stage, child in children.items():
        assert child.data.tags["mlflow.parentRunId"] == run_id
        assert child.info.status == "FINISHED"
        assert child.data.metrics["seconds"] == record.cost[stage].seconds
        assert child.data.metrics["forwards"] == record.cost[stage].forwards
    losses = client.get_metric_history(children["train"].info.run_id, "loss")
    assert [(point.step, point.value) for point in losses] == [(3, 0.5), (4, 0.25)]
    assert "epoch" not in children["train"].data.metrics


def test_artifacts_lie_beside_the_database(publish, log, tmp_path):
    """A root relative to the working directory would scatter them."""
    run_id = log(*publish())
    assert (tmp_path / "runs" / mlflow_store.ARTIFACTS / run_id / "artifacts" / "record" / RECORD_FILE).is_file()


def test_the_newest_of_a_run_directory_is_read(publish, log, uri):
    """Scoring again replaces the record on disk, so it must replace it on the board of the store."""
    log(*publish(rows=1))
    second, folder = publish(rows=2)
    log(second, folder)
    (read,) = tracking.read_records(uri)
    assert read.to_json() == second.to_json()


def test_what_differs_is_kept_apart(publish, log, uri):
    """Another directory, seed, defense or version of the track is another result."""
    changes = [
        {},
        {"where": "b"},
        {"seeds": {"training": 1, "attack": 0}},
        {"name": "trades"},
        {"track": {"id": "digits-linf@1", "hash": "4f" * 32, "content": {"id": "digits-linf@1"}}},
    ]
    for rows, change in enumerate(changes):
        log(*publish(rows=rows, **change))
    assert len(tracking.read_records(uri)) == len(changes)


def test_the_same_result_of_two_directories_is_read_once(publish, log, uri):
    """Records in two folders are refused when they hold the same result; a store just gives it once."""
    log(*publish("a"))
    log(*publish("b"))
    assert len(tracking.read_records(uri)) == 1


@pytest.mark.parametrize(
    ("step", "interruption"),
    [("log_inputs", OSError("disk full")), ("log_batch", KeyboardInterrupt()), ("log_artifacts", ValueError("odd"))],
)
def test_a_run_that_was_not_finished_is_failed_and_passed_over(publish, log, uri, monkeypatch, step, interruption):
    from mlflow import MlflowClient

    first, folder = publish(rows=1)
    log(first, folder)

    def stop(*_, **__):
        raise interruption

    again, folder = publish(rows=2)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, step, stop)
        with pytest.raises((TrackingError, KeyboardInterrupt)):
            log(again, folder)
    assert [run.info.status for run in _runs(uri) if run.data.tags["robustboard.role"] == "score"] == [
        "FINISHED",
        "FAILED",
    ]
    (read,) = tracking.read_records(uri)
    assert read.to_json() == first.to_json()


METHODS = (
    "get_experiment_by_name",
    "search_runs",
    "create_run",
    "log_inputs",
    "log_batch",
    "log_artifacts",
    "delete_run",
    "set_terminated",
)


class Wire:
    """What lies between us and the store; it can break at one call, before the store hears of it or after.

    Attributes:
        calls: how many calls were made.
        breaks_at: the call that breaks, from 1; 0 is none.
        heard: whether the store still does what that call asks for.
        for_good: whether every later call breaks too, as if the process were gone.
    """

    def __init__(self, monkeypatch) -> None:
        from mlflow import MlflowClient

        self.calls, self.breaks_at, self.heard, self.for_good = 0, 0, False, False
        for name in METHODS:
            monkeypatch.setattr(MlflowClient, name, self._wrapped(getattr(MlflowClient, name)))

    def reset(self, breaks_at: int = 0, *, heard: bool = False, for_good: bool = False) -> None:
        self.calls, self.breaks_at, self.heard, self.for_good = 0, breaks_at, heard, for_good

    def _wrapped(self, method):
        def call(*args, **kwargs):
            self.calls += 1
            if self.for_good and self.calls > self.breaks_at:
                raise Gone
            if self.calls != self.breaks_at:
                return method(*args, **kwargs)
            if self.heard:
                method(*args, **kwargs)
            raise Gone if self.for_good else ConnectionResetError("the wire broke")

        return call


class Gone(BaseException):
    """The process was killed."""


@pytest.fixture
def wire(monkeypatch):
    """The wire to the store, with no pauses between attempts."""
    monkeypatch.setattr(patience.Patient.__init__, "__kwdefaults__", {"sleep": lambda _: None, "clock": time.monotonic})
    return Wire(monkeypatch)


@pytest.mark.parametrize("heard", [False, True], ids=["unheard", "unanswered"])
@pytest.mark.parametrize("killed", [False, True], ids=["broken", "killed"])
def test_wherever_logging_is_interrupted_it_ends_complete_and_single(publish, log, uri, wire, killed, heard):
    """Every call in turn: the wire breaks and the call is made again, or the process dies and a later one logs it."""
    client = _client(uri)

    def logged(where: str) -> dict[str, object]:
        try:
            run_id = log(*publish(where), EPOCHS)
            assert not (killed and wire.breaks_at), "a killed process goes on"
        except Gone:
            wire.reset()
            run_id = log(*publish(where), EPOCHS)
        wire.reset()
        return whole(client, uri, client.get_run(run_id).data.tags["robustboard.key"])

    log(*publish("counted"), EPOCHS)
    calls = wire.calls
    assert calls > 10
    expected = logged("whole")
    for breaks_at in range(1, calls + 1):
        wire.reset(breaks_at, heard=heard, for_good=killed)
        assert logged(f"broken-{breaks_at}") == expected, f"interrupted at call {breaks_at}"


def test_what_is_logged_is_not_logged_again(publish, log, uri):
    record, folder = publish()
    first = log(record, folder)
    before = [run.info.run_id for run in _runs(uri)]
    assert log(record, folder) == first
    assert [run.info.run_id for run in _runs(uri)] == before


def test_limits_of_the_store_do_not_lose_a_record(factories, publish, log, uri):
    """More than a hundred parameters, long values, odd names, a training of more than a thousand numbers."""
    hyper = {f"setting_{i}": i for i in range(230)} | {"long": "x" * 9000, "od*d/../name": 1}
    record, folder = publish(hyper=hyper)
    training = [{"epoch": float(i), "loss": 1.0 / i, "validation": 0.5} for i in range(1, 701)]
    run_id = log(record, folder, training)
    params = _client(uri).get_run(run_id).data.params
    assert {f"hyper.setting_{i}" for i in range(230)} <= set(params)
    assert params["hyper.long"] == "x" * 6000
    child = next(run for run in _runs(uri) if run.info.run_name == "train")
    assert len(_client(uri).get_metric_history(child.info.run_id, "loss")) == 700
    (read,) = tracking.read_records(uri)
    assert read.to_json() == record.to_json()


def test_counts_that_were_not_taken_are_left_out(publish, log, uri):
    record, folder = publish(cost={"train": {"seconds": 1.5}})
    log(record, folder)
    child = next(run for run in _runs(uri) if run.info.run_name == "train")
    assert child.data.metrics == {"seconds": 1.5}


def test_a_damaged_record_is_one_sentence(publish, log, uri, tmp_path):
    """A board that quietly lacks a row would be wrong."""
    run_id = log(*publish())
    (tmp_path / "runs" / mlflow_store.ARTIFACTS / run_id / "artifacts" / "record" / RECORD_FILE).write_text("{}")
    with pytest.raises(TrackingError, match=rf"run {run_id} .* cannot be read: .*record\.json"):
        tracking.read_records(uri)


def test_artifacts_that_are_gone_are_one_sentence(publish, log, uri, tmp_path):
    run_id = log(*publish())
    shutil.rmtree(tmp_path / "runs" / mlflow_store.ARTIFACTS)
    with pytest.raises(TrackingError, match=f"run {run_id}"):
        tracking.read_records(uri)


def test_an_empty_store_is_one_sentence(uri):
    with pytest.raises(TrackingError, match="holds no scored defense"):
        tracking.read_records(uri)


def test_a_missing_store_is_one_sentence_and_stays_missing(tmp_path):
    """A mistyped path must not leave an empty store there."""
    with pytest.raises(TrackingError, match="There is no MLflow store"):
        tracking.read_records(f"sqlite:///{tmp_path}/tyop/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def _write_bytes(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)


def _write_other(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE mails (subject TEXT)")


@pytest.mark.parametrize("write", [_write_bytes, _write_other, Path.touch, Path.mkdir])
@pytest.mark.parametrize("use", [mlflow_store.prepare, tracking.read_records])
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, write, use):
    """MLflow itself would make its tables in any database."""
    path = tmp_path / "x.db"
    write(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(TrackingError, match=r"^The MLflow store .*x\.db cannot be used: [^\n]*\.$"):
        use(f"sqlite:///{path}")
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "given",
    [
        "runs/mlflow.db",
        "mlflow.db",
        "file:///runs",
        "sqlite:/x.db",
        "sqlite://x/y.db",
        "sqlite+pysqlite:///x.db",
        "sqlite:///:memory:",
    ],
)
@pytest.mark.parametrize("use", [mlflow_store.prepare, tracking.read_records])
def test_what_is_no_uri_is_one_sentence_and_makes_nothing(tmp_path, monkeypatch, given, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match="is not the URI of an MLflow store"):
        use(given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["100%20", "why?"])
def test_a_path_that_a_uri_cannot_hold_is_one_sentence(tmp_path, folder):
    with pytest.raises(TrackingError, match="must be free of '%' and '\\?'"):
        mlflow_store.local_uri(tmp_path / folder)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TrackingError, match="cannot be"):
        mlflow_store.prepare(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_server_that_is_not_there_is_found_quickly():
    """MLflow's own defaults would try for minutes."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        start = time.monotonic()
        with pytest.raises(TrackingError, match="no server answers there"):
            mlflow_store.prepare(f"http://127.0.0.1:{held.getsockname()[1]}")
    assert time.monotonic() - start < 15


def test_a_password_is_not_shown():
    with pytest.raises(TrackingError) as caught:
        mlflow_store.prepare("http://keeper:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://a:b@host:5000/a", "http://***@host:5000/a"),
        ("postgresql://keeper:p@ss/w?rd@host/runs", "postgresql://***@host/runs"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dsecret", "mssql+pyodbc:///?***"),
        ("sqlite:////runs/digits-linf@1/mlflow.db", "sqlite:////runs/digits-linf@1/mlflow.db"),
        ("https://host/path", "https://host/path"),
    ],
)
def test_what_may_be_a_password_is_hidden_and_nothing_else(uri, shown):
    assert mlflow_store.without_password(uri) == shown


def test_two_first_users_get_one_experiment(uri, monkeypatch):
    """Both look, neither finds it, both make it: the second takes the first one's."""
    from mlflow import MlflowClient

    look, answers = MlflowClient.get_experiment_by_name, []

    def late(client, name):
        answers.append(None if not answers else look(client, name))
        return answers[-1]

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    mlflow_store.prepare(uri)
    assert answers[0] is None
    assert answers[1].name == mlflow_store.EXPERIMENT


def test_a_store_made_by_somebody_else_meanwhile_is_kept(template, tmp_path, monkeypatch):
    """Migrations take seconds; whoever ends them second must not replace a store that may hold runs by now."""
    from mlflow.store.tracking import sqlalchemy_store

    store, path = sqlalchemy_store.SqlAlchemyStore, tmp_path / "mlflow.db"

    def meanwhile(uri, root):
        if not path.exists():
            shutil.copy(template / "mlflow.db", uri.removeprefix("sqlite:///"))
            shutil.copy(template / "mlflow.db", path)
            with closing(sqlite3.connect(path)) as connection, connection:
                connection.execute("CREATE TABLE marker (x)")
        return store(uri, root)

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", meanwhile)
    mlflow_store.prepare(mlflow_store.local_uri(tmp_path))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'marker'").fetchone() == (1,)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_deleted_experiment_is_one_sentence(publish, log, uri):
    client = _client(uri)
    client.delete_experiment(client.get_experiment_by_name(mlflow_store.EXPERIMENT).experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        log(*publish())


def test_a_store_made_again_in_the_same_process_is_written(publish, log, uri, template, tmp_path):
    """MLflow keeps connections to files that are gone; writing into one of them would lose the record silently."""
    record, folder = publish()
    log(record, folder)
    (tmp_path / "runs" / "mlflow.db").unlink()
    shutil.copy(template / "mlflow.db", tmp_path / "runs" / "mlflow.db")
    with pytest.raises(TrackingError, match="holds no scored defense"):
        tracking.read_records(uri)
    log(record, folder)
    assert len(tracking.read_records(uri)) == 1


SCRIPT = """
import json, logging, os, sys, threading
from pathlib import Path
import numpy as np
from robustboard.bench import mlflow_store, tracking
from robustboard.leaderboard.record import load

def state():
    import mlflow
    from mlflow.tracking._tracking_service.utils import is_tracking_uri_set
    names = ("mlflow", "alembic", "sqlalchemy.engine", "urllib3")
    return {
        "environment": dict(os.environ),
        "levels": [logging.getLogger(name).level for name in names],
        "disabled": logging.root.manager.disable,
        "active": None if mlflow.active_run() is None else "a run",
        "uri": is_tracking_uri_set(),
    }

environment = dict(os.environ)
uri, folder = sys.argv[1:]
record = load(Path(folder))
images = np.zeros((2, 1, 4, 4), dtype=np.float32)
mlflow_store.prepare(uri)
after_import = state()
run = tracking.log_record(record, Path(folder), uri=uri, images=images, training=({"epoch": 1.0, "loss": 2.0},))
assert tracking.read_records(uri)[0].to_json() == record.to_json()
after = state()
assert dict(os.environ) == environment, sorted(set(os.environ.items()) ^ set(environment.items()))
assert after == after_import, (after_import, after)
assert after["active"] is None and after["disabled"] == 0 and after["levels"][0] < logging.ERROR, after
# The idle pool that a client downloads with is all that may stay: telemetry and asynchronous logging have threads too.
names = {thread.name.split("_")[0] for thread in threading.enumerate()}
assert names <= {"MainThread", "MlflowLocalArtifactRepository"}, names
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
"""


def test_nothing_of_the_process_steers_it_or_is_left_behind(publish, uri, tmp_path):
    """A host application has its own MLflow settings: they are neither obeyed nor changed, and stdout stays empty."""
    _, folder = publish()
    home = tmp_path / "home"
    home.mkdir()
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTEST", "CI"))}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT, uri, str(folder)],
        capture_output=True,
        text=True,
        cwd=home,
        env={
            **inherited,
            "MLFLOW_RUN_ID": "0" * 32,
            "MLFLOW_EXPERIMENT_NAME": "other",
            "MLFLOW_ACTIVE_MODEL_ID": "m-1",
            "_MLFLOW_TELEMETRY_SESSION_ID": "1" * 32,
        },
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr[-3000:]
    assert list(home.iterdir()) == []
    assert {run.info.experiment_id for run in _runs(uri)} == {
        _client(uri).get_experiment_by_name(mlflow_store.EXPERIMENT).experiment_id
    }


def test_log_levels_and_environment_are_put_back_after_a_failure(publish, log, uri, monkeypatch):
    from mlflow import MlflowClient

    levels = [logging.getLogger(name).level for name in ("mlflow", "alembic")]
    environment = dict(os.environ)

    def stop(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "log_artifacts", stop)
    with pytest.raises(TrackingError, match="cannot be used: disk full"):
        log(*publish())
    assert [logging.getLogger(name).level for name in ("mlflow", "alembic")] == levels
    assert {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} == {
        k: v for k, v in environment.items() if not k.startswith("PYTEST")
    }


def test_the_store_is_the_one_given_or_of_the_environment_or_the_local_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.store_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert mlflow_store.store_uri(None, tmp_path) == "http://host:5000"
    assert mlflow_store.store_uri("sqlite:///x.db", tmp_path) == "sqlite:///x.db"


@pytest.mark.slow
def test_first_users_at_once_share_one_store(tmp_path):
    """Each migrates a database of its own; one of them becomes the store, whole."""
    uri = mlflow_store.local_uri(tmp_path / "runs")
    code = f"from robustboard.bench import mlflow_store, tracking; mlflow_store.prepare({uri!r})"
    users = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for user in users:
        _, said = user.communicate(timeout=180)
        assert (user.returncode, said) == (0, "")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mlflow.db"]


@pytest.mark.slow
def test_a_server_shows_and_takes_runs(publish, log, uri, capfd):
    """`mlflow ui` on a local store shows the runs, and a server is a store like any other."""
    record, folder = publish()
    run_id = log(record, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*program, "--port", str(port), "--workers", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        start_new_session=True,
    )
    try:
        _wait_for(f"{address}/health")
        question = {"experiment_ids": ["1"], "filter": "tags.`robustboard.role` = 'score'"}
        found = _ask(f"{address}/api/2.0/mlflow/runs/search", question)["runs"]
        assert [run["info"]["run_id"] for run in found] == [run_id]
        shown = {metric["key"]: metric["value"] for metric in found[0]["data"]["metrics"]}
        assert shown["certified"] == record.metrics["certified"].value

        capfd.readouterr()
        second, folder = publish("b", name="trades", rows=2)
        tracking.log_record(second, folder, uri=address, images=IMAGES, training=EPOCHS)
        read = tracking.read_records(address)
        assert [one.to_json() for one in read] == [record.to_json(), second.to_json()]
        assert capfd.readouterr().out == ""
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=30)


def _ask(address: str, question: dict[str, object]) -> dict[str, list[dict]]:
    request = urllib.request.Request(
        address, data=json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{address} does not answer")


def test_a_check_makes_nothing(tmp_path: Path) -> None:
    """A run that is refused later must leave no store behind."""
    mlflow_store.check(mlflow_store.local_uri(tmp_path / "runs"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TrackingError, match="not a folder that can be written"):
        mlflow_store.check(mlflow_store.local_uri(tmp_path / "file"))
