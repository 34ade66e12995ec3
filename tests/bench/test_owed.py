"""What a store is owed: kept on the disk from before the first attempt until the store has it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from typer.testing import CliRunner

from robustboard.bench import mlflow_store, owed, tracking
from robustboard.bench.cli import app
from robustboard.bench.journal import alone
from robustboard.bench.patience import SECONDS
from robustboard.errors import OutputError, StoreAwayError, TrackingError
from robustboard.leaderboard.record import RECORD_FILE

IMAGES = np.zeros((60, 1, 8, 8), dtype=np.float32)
TRAINING = ({"epoch": 1.0, "loss": float("nan")}, {"epoch": 2.0, "loss": 0.1 + 0.2, "gap": float("inf")})
NOBODY = "http://keeper:secret@127.0.0.1:9"


@pytest.fixture
def owe(publish):
    """Write a record that is owed; returns its folder."""

    def make(where: str = "a", **changes):
        record, folder = publish(where, **changes)
        owed.owe(record, folder, images=IMAGES, training=TRAINING)
        return folder

    return make


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(SECONDS, "0")


def _sync(*words: object):
    """Run `robustboard sync`: what it printed, or its error."""
    return CliRunner().invoke(app, ["sync", *map(str, words)])


def test_what_is_owed_is_logged_as_if_at_once(owe, publish, uri, monkeypatch):
    """The training's numbers and the images' shape are in no record."""
    given = {}
    monkeypatch.setattr(tracking, "log_record", lambda *_, **values: given.update(values))
    folder = owe()
    assert owed.log(folder, uri)
    assert (given["images"].shape, given["images"].nbytes) == (IMAGES.shape, IMAGES.nbytes)
    assert str(given["training"]) == str(list(TRAINING)), "not the numbers that the training told of"


def test_sync_logs_what_is_owed_once(owe, uri, tmp_path):
    folders = [owe("a", rows=1), owe("deep/b", rows=2)]
    done = _sync(tmp_path / "runs", "--mlflow", uri)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"Logged {folder} to {uri}" for folder in folders]
    assert len(tracking.read_records(uri)) == 2
    assert not list(tmp_path.rglob("*owed*"))
    assert not list(tmp_path.rglob(".lock"))
    again = _sync(tmp_path / "runs", "--mlflow", uri)
    assert (again.exit_code, again.stdout) == (0, "Nothing is owed to a store here.\n")


def test_the_store_of_the_environment_is_used(owe, uri, monkeypatch):
    folder = owe()
    assert "No MLflow store is named" in str(_sync(folder.parent).exception)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert _sync(folder.parent).exit_code == 0
    assert len(tracking.read_records(uri)) == 1


def test_a_store_that_is_away_stays_owed(owe, tmp_path):
    folders = [owe("a", rows=1), owe("b", rows=2)]
    error = _sync(tmp_path / "runs", "--mlflow", NOBODY).exception
    assert isinstance(error, StoreAwayError)
    assert str(error).endswith("no server answers there. Still owed: 2 records.")
    assert "secret" not in str(error)
    assert owed.find(tmp_path / "runs") == folders


def test_one_bad_record_does_not_keep_the_others(owe, uri, tmp_path):
    bad, good = owe("a", rows=1), owe("b", rows=2)
    (bad / RECORD_FILE).write_text("{}")
    done = _sync(tmp_path / "runs", "--mlflow", uri)
    assert isinstance(done.exception, TrackingError)
    assert str(done.exception) == "Still owed: one record."
    assert str(bad) in done.stderr
    assert done.stdout == f"Logged {good} to {uri}\n"
    assert owed.find(tmp_path / "runs") == [bad]


def test_a_record_that_is_not_the_one_owed_is_one_sentence(owe, publish, uri):
    folder = owe(rows=1)
    publish("a", rows=2)
    with pytest.raises(TrackingError, match="was changed after it was written"):
        owed.log(folder, uri)
    (folder / RECORD_FILE).unlink()
    with pytest.raises(TrackingError, match="is no longer there"):
        owed.log(folder, uri)
    folder.with_name("record.owed.json").write_text('{"record_sha256": 1}')
    with pytest.raises(TrackingError, match=r"record\.owed\.json cannot be read"):
        owed.log(folder, uri)


def test_no_such_folder_is_one_sentence(tmp_path):
    assert "There is no run directory" in str(_sync(tmp_path / "nowhere", "--mlflow", NOBODY).exception)


def test_two_processes_do_not_log_one_record(owe, uri, tmp_path):
    """Whoever comes second is told, or finds that nothing is owed any more."""
    folder = owe()
    with alone(folder.parent):
        error = _sync(folder.parent, "--mlflow", uri).exception
    assert isinstance(error, OutputError)
    assert "Another process is at work" in str(error)
    assert owed.find(tmp_path / "runs") == [folder]
    assert owed.log(folder, uri)
    assert not owed.log(folder, uri)


def test_processes_wait_for_each_other_in_a_local_store(owe, uri, tmp_path, monkeypatch):
    """SQLite has one writer at a time; several runs may end together."""
    monkeypatch.setenv(SECONDS, "60")
    for place in ("one", "two"):
        for number in range(2):
            owe(f"{place}/{number}", name=f"{place}-{number}", rows=number)
    code = "from robustboard.bench.cli import main; main()"
    users = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code, "sync", tmp_path / "runs" / place, "--mlflow", uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in ("one", "two")
    ]
    for user in users:
        said, _ = user.communicate(timeout=180)
        assert (user.returncode, said.count("Logged")) == (0, 2), said
    assert len(tracking.read_records(uri)) == 4


def test_a_record_that_is_not_noted_as_owed_is_logged_without_a_note(publish, uri, monkeypatch):
    """A finished run that was asked not to log; its directory is held, and is the same afterwards."""
    _, folder = publish()
    before = sorted(folder.parent.rglob("*"))
    held = []
    log = tracking.log_record

    def watched(*given, **more):
        held.append((folder.parent / ".lock").exists())
        assert not owed.is_owed(folder)
        return log(*given, **more)

    monkeypatch.setattr(tracking, "log_record", watched)
    for _ in range(2):
        owed.ensure_logged(folder, uri, images=IMAGES)
    assert held == [True, True]
    assert len(tracking.read_records(uri)) == 1
    with pytest.raises(StoreAwayError):
        owed.ensure_logged(folder, NOBODY, images=IMAGES)
    assert sorted(folder.parent.rglob("*")) == before


def test_what_is_owed_is_logged_as_noted(owe, uri, monkeypatch):
    given = {}
    monkeypatch.setattr(tracking, "log_record", lambda *_, **values: given.update(values))
    folder = owe()
    owed.ensure_logged(folder, uri, images=np.zeros((1, 1, 1, 1)))
    assert given["images"].shape == IMAGES.shape
    assert len(given["training"]) == len(TRAINING)
    assert not owed.is_owed(folder)


def test_a_directory_that_cannot_be_written_is_logged_all_the_same(publish, uri, monkeypatch):
    """Such as the finished runs of a colleague; here by what the system is said to answer, which lets root do all."""
    _, folder = publish()
    monkeypatch.setattr(owed.os, "access", lambda place, mode: place != folder.parent)
    monkeypatch.setattr(owed, "alone", None)
    owed.ensure_logged(folder, uri, images=IMAGES)
    assert len(tracking.read_records(uri)) == 1


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str | None]]]:
    """A server that lets nobody in, and the credentials that it was shown."""
    shown: list[str | None] = []

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", shown
    server.shutdown()
    thread.join()
    server.server_close()


def test_credentials_go_through_and_their_refusal_is_final(owe, proxy, monkeypatch):
    address, shown = proxy
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "keeper")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv(SECONDS, "60")
    begun = time.monotonic()
    with pytest.raises(TrackingError, match="401") as caught:
        owed.log(owe(), f"http://{address}")
    assert not isinstance(caught.value, StoreAwayError)
    assert time.monotonic() - begun < 10
    assert shown == ["Basic a2VlcGVyOnNlY3JldA=="]


def test_a_check_tells_what_is_away_from_what_is_refused(proxy):
    with pytest.raises(StoreAwayError, match=r"http://\*\*\*@127\.0\.0\.1:9 cannot be used: no server answers there"):
        mlflow_store.check(NOBODY)
    with pytest.raises(TrackingError) as caught:
        mlflow_store.check(f"http://keeper:secret@{proxy[0]}")
    assert not isinstance(caught.value, StoreAwayError)
    assert "secret" not in str(caught.value)


def test_a_run_whose_store_is_away_ends_well_and_is_logged_later(make_submission, quadrant_track, uri, tmp_path):
    """Warned before, told after, exit code 0; what is owed holds no password, and goes with the record."""
    command = ["score", str(make_submission()), "--track", str(quadrant_track), "--run-dir", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*command, "--mlflow", NOBODY])
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if "no server answers there" in line]
    assert len(lines) == 2
    assert "The run goes on" in lines[0]
    assert f"robustboard sync {tmp_path / 'run'} --mlflow" in lines[1]
    file = tmp_path / "run" / "record.owed.json"
    assert json.loads(file.read_text())["images"] == {"shape": [40, 1, 4, 4], "nbytes": 40 * 16 * 4}
    assert "secret" not in done.output
    assert not [word for word in ("secret", "keeper", "127.0.0.1") if word in file.read_text()]

    kept = file.read_bytes()
    assert _sync(tmp_path / "run", "--mlflow", uri).exit_code == 0
    assert len(tracking.read_records(uri)) == 1
    assert not file.exists()

    file.write_bytes(kept)
    assert CliRunner().invoke(app, [*command, "--no-mlflow"]).exit_code == 0
    assert not file.exists(), "a record that was replaced is still owed"
