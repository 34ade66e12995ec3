"""A sweep: which cells it has, what it refuses, and that it goes on as a whole after whatever stopped it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow_runs import whole
from rich.console import Console
from typer.testing import CliRunner

from robustboard.bench import finished as finishing
from robustboard.bench import owed, places, ray_cluster, tracking
from robustboard.bench import score as scoring
from robustboard.bench import sweep as sweeps
from robustboard.bench.cli import app
from robustboard.bench.entrants import SubmittedEntrant
from robustboard.bench.journal import alone
from robustboard.bench.mlflow_store import local_uri, open_store
from robustboard.bench.patience import SECONDS
from robustboard.bench.process import WorkerProcess
from robustboard.bench.progress import Bars
from robustboard.bench.ray_cluster import Cluster
from robustboard.bench.request import Request, prepare
from robustboard.bench.sweep import plan
from robustboard.bench.sweepfile import read_sweep
from robustboard.defenses.adapter import NoProgress
from robustboard.errors import FindingError, GateError, OutputError, RobustBoardError, SweepError, TrackingError
from robustboard.leaderboard.record import load

TRACK = """
id = "small-linf@1"
dataset = "digits"
threat = {norm = "linf", eps = "1/10"}
n = 12
bounds = {methods = ["ibp"]}
audit = {certified_sample = 0, smallest_margins = 0}
corruptions = {names = ["contrast"], severities = [1]}
training = {train = 200, validation = 60}
"""
TWO = """
tracks = ["track.toml"]
defenses = ["standard"]
seeds = [0, 1]
threads = 1
[hyper.standard]
epochs = 2
"""
MOODY = """
import os
from pathlib import Path
from torch import nn

def build():
    if not Path({flag!r}).exists():
        os._exit(9)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture(scope="module")
def process():
    with WorkerProcess() as worker:
        yield worker


@pytest.fixture
def one_process(process, monkeypatch):
    """All cells of the test in one process after another: starting one takes longer than what is asked of it here."""
    monkeypatch.setattr(places, "WorkerProcess", lambda **_: process)
    monkeypatch.setattr(process, "close", lambda: None)


@pytest.fixture
def quick(monkeypatch):
    """Without the diagnostic that trains networks of its own: half of the time of such small cells."""
    monkeypatch.setattr(scoring, "surrogates_of", lambda *_, **__: ())


@pytest.fixture
def write(tmp_path):
    """Write the track and a sweep beside it; returns the sweep's path."""

    def go(text: str = TWO) -> Path:
        (tmp_path / "track.toml").write_text(TRACK)
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return go


@pytest.fixture
def run(tmp_path):
    """Run `robustboard sweep` in this process, with its runs in the test's folder and no store."""

    def go(path: Path, *options: str):
        return CliRunner().invoke(app, ["sweep", str(path), "--runs", str(tmp_path / "runs"), *options])

    return go


def cells_of(path: Path, **changes: object):
    base = Request(defense="", track="", runs=path.parent / "runs", **changes)
    return plan(read_sweep(path), path, base, side_by_side=2, progress=NoProgress())


def test_cells_are_tracks_by_defenses_by_settings_by_seeds(write, make_submission):
    manifest = make_submission()
    path = write(
        """
        tracks = ["track.toml", "digits-linf@1"]
        defenses = ["fgsm-at", "linear/defense.toml", "standard"]
        seeds = [3, 1]
        [hyper.fgsm-at]
        epochs = [2, 4]
        """.replace("linear/defense.toml", str(manifest.relative_to(write().parent)))
    )
    cells = cells_of(path)
    found = [(cell.track, cell.defense, dict(cell.settings), cell.seed) for cell in cells]
    assert found == [
        (track, *rest)
        for track in ("small-linf@1", "digits-linf@1")
        for rest in [
            *(("fgsm-at", {"epochs": epochs}, seed) for epochs in ("2", "4") for seed in (3, 1)),
            ("linear", {}, None),
            *(("standard", {}, seed) for seed in (3, 1)),
        ]
    ]
    assert len({cell.folder for cell in cells}) == len(cells)
    # What `score --set epochs=4 --seed 1` has begun is gone on with, and the other way round.
    alike = Request("fgsm-at", "digits-linf@1", seed=1, overrides={"epochs": "4"}, runs=path.parent / "runs")
    assert prepare(alike).folder in {cell.folder for cell in cells}
    assert {cell.state for cell in cells} == {"to do"}
    assert not (path.parent / "runs").exists()


def test_cells_side_by_side_share_out_the_cores(write, monkeypatch):
    asked = []
    monkeypatch.setattr(sweeps, "threads_for", lambda numbers, jobs: asked.append((numbers, jobs)) or 3)
    assert [cell.request.threads for cell in cells_of(write(TWO.replace("threads = 1", "")), jobs=4)] == [3, 3]
    assert asked == [(64, 8), (64, 8)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('defenses = ["standard"]', "the key tracks is missing"),
        ('tracks = []\ndefenses = ["standard"]', "tracks must be a list that is not empty"),
        ('tracks = "digits-linf@1"\ndefenses = ["standard"]', "tracks must be a list, not 'digits-linf@1'"),
        (TWO + "[tracks]", "is not valid TOML"),
        ("\x00", "is not valid TOML"),
        (f"seeds = [{'9' * 5000}]", "is not valid TOML"),
        (f"seeds = {'[' * 3000}", "is not valid TOML"),
        (f"seedz = [1]\n{TWO}", "the key seedz is not known; allowed are attack_engine, attack_seeds"),
        (TWO.replace("[0, 1]", "[0, -1]"), "seeds.1 must be greater than or equal to 0, not -1"),
        (TWO.replace("[0, 1]", "[0, 0]"), "seeds must be a list without repetition"),
        (TWO.replace("[0, 1]", "[true]"), "seeds.0 must be a whole number, not True"),
        (TWO.replace("[0, 1]", "[]"), "seeds must be a list that is not empty"),
        (TWO.replace("standard", "standart"), "The defense 'standart' is unknown"),
        (TWO.replace("track.toml", "no/track.toml"), "no/track.toml"),
        (TWO.replace("track.toml", "digits-linv@1"), "did you mean digits-linf@1"),
        (TWO.replace('"standard"', '"a/defense.toml"').replace("hyper.standard", "x"), "the key x is not known"),
        (TWO.replace('["standard"]', '["standard", "a/defense.toml"]'), "There is no file"),
        (TWO.replace("hyper.standard", "hyper.trades"), "hyper.trades belongs to no defense of this sweep"),
        (TWO.replace("hyper.standard", "hyper").replace("epochs", "standard"), "hyper.standard must be a table"),
        (TWO.replace("epochs = 2", "epochz = 2"), "standard has no hyper-parameter 'epochz'"),
        (TWO.replace("epochs = 2", 'epochs = "many"'), "epochs must be a whole number"),
        (TWO.replace("epochs = 2", "epochs = []"), "hyper.standard.epochs must be a list that is not empty"),
        (TWO.replace("epochs = 2", "epochs = nan"), "hyper.standard.epochs.0 must be true or false, a finite number"),
        (TWO.replace("epochs = 2", "epochs = [[2]]"), "hyper.standard.epochs.0 must be true or false, a finite"),
        (TWO.replace("epochs = 2", "epochs = [2, 2]"), "hyper.standard.epochs must be a list without repetition"),
        (TWO.replace("epochs = 2", 'epochs = ["2", 2]'), "is there twice"),
        (TWO.replace('["track.toml"]', '["track.toml", "./track.toml"]'), "is there twice"),
        (TWO.replace('"standard"', '"standard\\u0007"'), "text without control characters"),
        (f"side_by_side = 0\n{TWO}", "side_by_side must be greater than or equal to 1"),
        (f"attack_engine = 'warp'\n{TWO}", "attack_engine must be 'cascade', 'reference' or 'fast', not 'warp'"),
        (TWO.replace("[0, 1]", str(list(range(10_001)))), "these are 10001 cells"),
        # Counted before they are written down: there is no room for so many.
        (TWO + "".join(f"{key} = {list(range(100))}\n" for key in "abcdefgh"), "these are 20000000000000000 cells"),
        ("# " + "x" * (1 << 20), "larger than one megabyte"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(write, tmp_path, text, sentence):
    path = write(text)
    with pytest.raises(RobustBoardError) as refused:
        cells_of(path)
    said = str(refused.value)
    assert sentence in said
    assert str(path) in said
    assert "\n" not in said
    assert said.endswith(".")
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("missing.toml", "bytes.toml", "."):
        with pytest.raises(SweepError, match=r"There is no file|is not valid TOML|cannot be read"):
            read_sweep(tmp_path / name)


@pytest.fixture
def moody(make_submission, tmp_path):
    """A submission whose process dies until a file is there; returns its path in a sweep.toml, and that file."""
    flag = tmp_path / "mended"
    weights = {"1.weight": np.eye(10, 64, dtype=np.float32), "1.bias": np.zeros(10, np.float32)}
    manifest = make_submission(MOODY.format(flag=str(flag)), weights=weights)
    return f"{manifest.parent.name}/{manifest.name}", flag


def test_one_that_fails_stops_no_other_and_is_tried_again(quick, run, write, moody, tmp_path):
    name, flag = moody
    path = write(TWO.replace("[0, 1]", "[1]").replace('"standard"]', f'"{name}", "standard"]'))
    first = run(path, "--no-mlflow")
    assert isinstance(first.exception, SweepError)
    assert first.exception.exit_code == 2
    assert str(first.exception).startswith("1 of 2 cells failed; the same command")
    (said,) = [line for line in first.stdout.splitlines() if line.startswith("small-linf@1/linear/files-")]
    assert "exit code 9" in said
    (record,) = tmp_path.glob("runs/small-linf@1/standard/seed-1-*/record/record.json")
    written = record.stat().st_mtime_ns

    flag.touch()
    planned = json.loads(run(path, "--dry-run", "--json").stdout)
    assert [(one["defense"], one["seed"], one["state"]) for one in planned] == [
        ("linear", None, "to do"),
        ("standard", 1, "finished"),
    ]
    second = run(path, "--no-mlflow", "--json")
    assert second.exit_code == 0, second.output
    assert [one["state"] for one in json.loads(second.stdout)] == ["scored", "finished"]
    assert json.loads(second.stdout)[1]["robust"] == load(record.parent).metrics["robust"].value
    assert record.stat().st_mtime_ns == written


def test_a_finished_record_of_something_else_is_not_taken(one_process, quick, run, write, tmp_path, monkeypatch):
    path = write(TWO.replace("[0, 1]", "[0]"))
    assert run(path, "--no-mlflow").exit_code == 0
    (cell,) = cells_of(path)
    assert cell.state == "finished"
    assert [one.state for one in cells_of(path, attack_seeds=1)] == ["begun"]
    assert [one.state for one in cells_of(path, device="cuda")] == ["begun"]
    assert [one.state for one in cells_of(path, complete=5)] == ["to do"]
    with monkeypatch.context() as patched:
        patched.setattr(finishing, "package_versions", lambda: {"robustboard": "9.9"})
        assert [one.state for one in cells_of(path)] == ["begun"]
    # Killed between its record and its end, a run leaves its journal; a younger one belongs to a later run.
    for age, left in ((-1, False), (1, True)):
        journal, record = cell.folder / "journal.bin", cell.folder / "record" / "record.json"
        journal.touch()
        os.utime(journal, ns=(record.stat().st_mtime_ns + age * 10**9,) * 2)
        assert run(path, "--no-mlflow").exit_code == 0
        assert journal.exists() is left
    journal.unlink()
    (tmp_path / "track.toml").write_text(TRACK.replace("200", "190"))
    assert [one.state for one in cells_of(path)] == ["begun"]
    (tmp_path / "track.toml").write_text(TRACK)
    (cell.folder / "record" / "outcomes.parquet").write_bytes(b"PAR1")
    assert [one.state for one in cells_of(path)] == ["begun"]


def test_another_function_of_the_same_files_is_another_cell(make_submission):
    manifest = make_submission()
    one = SubmittedEntrant(manifest).key
    manifest.write_text(manifest.read_text().replace("model.py:build", "model.py:other"))
    assert SubmittedEntrant(manifest).key != one


def test_a_cell_that_another_process_works_on_is_left_to_it(one_process, quick, run, write, tmp_path):
    path = write()
    with alone(cells_of(path)[0].folder):
        done = run(path, "--no-mlflow", "--json")
    assert isinstance(done.exception, SweepError)
    found = json.loads(done.stdout)
    assert [one["state"] for one in found] == ["failed", "scored"]
    assert "Another process is at work" in found[0]["reason"]


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (GateError("Gate: a bug."), FindingError, "Gate: a bug."),
        (OSError(28, "No space left on device", "x"), SweepError, "The file system refused x: No space left"),
        (KeyError("oops"), SweepError, "This is a bug of RobustBoard: KeyError: 'oops'"),
    ],
)
def test_whatever_a_cell_ends_with_is_a_sentence(run, write, monkeypatch, error, kind, sentence):
    def score(request, bar, *, workers):
        raise error

    monkeypatch.delenv("ROBUSTBOARD_DEBUG", raising=False)
    monkeypatch.setattr(sweeps, "score_defense", score)
    done = run(write(), "--no-mlflow")
    assert type(done.exception) is kind
    assert str(done.exception).startswith("2 of 2 cells failed")
    assert done.stdout.count(sentence) == 2


def test_an_interrupt_ends_work_that_is_done_in_this_process_too(write, monkeypatch):
    """Surrogates are trained in the sweep's own process, where no worker can be killed."""
    ended = []

    def score(request, bar, *, workers):
        if request.seed == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 30
        try:
            while time.monotonic() < deadline:
                bar.advance()
                time.sleep(0.01)
        except BaseException as error:
            ended.append(isinstance(error, Exception))
            raise

    monkeypatch.setattr(sweeps, "score_defense", score)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweeps.run_sweep(cells_of(write()), side_by_side=2, uri=None, bars=Bars(Console(file=io.StringIO())))
    assert time.monotonic() - began < 20
    # An ordinary error could make the run take its journal away.
    assert ended == [False, False]


def test_surrogates_are_trained_until_the_caller_ends_it(write):
    """Their training is not shown, and stops at the step at which the caller's progress raises."""

    class Stopped(BaseException):
        pass

    class Ends(NoProgress):
        told = 0

        def advance(self, steps=1):
            assert steps == 0
            self.told += 1
            if self.told == 3:
                raise Stopped

    made, ends = prepare(cells_of(write())[0].request), Ends()
    with pytest.raises(Stopped):
        scoring._surrogates(made.track, made.dataset, progress=ends)()
    assert ends.told == 3


def test_tables_that_are_nested_too_deeply_are_a_sentence(run, write):
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # some libraries raise it
    try:
        done = run(write(f"{'.'.join('a' * 1500)} = 1"), "--no-mlflow")
    finally:
        sys.setrecursionlimit(before)
    assert isinstance(done.exception, SweepError)
    assert "is not valid TOML" in str(done.exception)


def test_a_store_that_fails_loses_no_record(one_process, quick, run, write, tmp_path, monkeypatch):
    """The cell is finished all the same; the next sweep logs it, and the one after that has nothing to do."""

    def refuse(*_, **__):
        raise TrackingError("The MLflow store cannot be used: it is full.")

    path = write(TWO.replace("[0, 1]", "[0]"))
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "log_record", refuse)
        done = run(path, "--json")
    assert "1 could not be logged" in str(done.exception)
    (one,) = json.loads(done.stdout)
    assert (one["state"], one["robust"]) == ("scored", load(Path(one["folder"]) / "record").metrics["robust"].value)
    assert "it is full" in one["reason"]

    monkeypatch.setattr(sweeps, "score_defense", None)
    for _ in range(2):
        done = run(path, "--json")
        assert done.exit_code == 0
        assert [one["state"] for one in json.loads(done.stdout)] == ["finished"]
        uri = local_uri(tmp_path / "runs")
        with open_store(uri, make=False) as client:
            whole(client, uri, tracking.run_key(load(Path(one["folder"]) / "record"), Path(one["folder"]) / "record"))


def test_no_cell_waits_for_a_store_that_is_away(one_process, quick, run, write, tmp_path, monkeypatch):
    """Both records are owed, the sweep ends well, and `sync` logs them."""
    monkeypatch.setenv(SECONDS, "0")
    asked = []
    log = tracking.log_record
    monkeypatch.setattr(tracking, "log_record", lambda *args, **more: asked.append(0) or log(*args, **more))
    done = run(write(TWO), "--mlflow", "http://127.0.0.1:9")
    assert done.exit_code == 0, done.output
    assert "Still owed to the store, which is away: 2 records" in " ".join(done.output.split())
    assert len(asked) == 1
    logged = CliRunner().invoke(app, ["sync", str(tmp_path / "runs"), "--mlflow", local_uri(tmp_path / "runs")])
    assert logged.exit_code == 0, logged.output
    assert len(tracking.read_records(local_uri(tmp_path / "runs"))) == 2


def test_only_what_was_noted_counts_as_owed(one_process, quick, run, write, tmp_path, monkeypatch):
    """Of finished cells that the store may well have, nothing is claimed and nothing written."""
    path, away = write(TWO), ("--mlflow", "http://127.0.0.1:9")
    assert run(path, "--no-mlflow").exit_code == 0
    monkeypatch.setenv(SECONDS, "0")
    monkeypatch.setattr(sweeps, "score_defense", None)
    done = run(path, *away)
    assert done.exit_code == 0, done.output
    assert "Still owed" not in done.output
    assert not list(tmp_path.rglob("*owed*"))
    cell = cells_of(path)[0]
    owed.owe(cell.record, cell.folder / "record", images=cell.images, training=())
    assert "Still owed to the store, which is away: one record" in " ".join(run(path, *away).output.split())


def test_a_finished_cell_may_lie_where_nothing_can_be_written(one_process, quick, run, write, monkeypatch):
    path = write(TWO.replace("[0, 1]", "[0]"))
    assert run(path, "--no-mlflow").exit_code == 0
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert [cell.state for cell in cells_of(path)] == ["finished"]
    with pytest.raises(OutputError, match="cannot be made"):
        cells_of(path, complete=5)


@pytest.mark.parametrize(
    ("room", "side_by_side", "at_a_time", "each"), [(1, 3, 1, 1), (2, 3, 2, 1), (5, 2, 2, 2), (9, 1, 1, 9)]
)
def test_cells_on_a_cluster_wait_for_no_worker_of_another(write, monkeypatch, room, side_by_side, at_a_time, each):
    """All workers of the cells that are worked on at a time fit into the cluster, which is simulated."""

    @contextlib.contextmanager
    def connected(address, demand):
        assert (address, demand.jobs) == ("auto", None)
        yield Cluster(demand, room)

    monkeypatch.setattr(ray_cluster, "connected", connected)
    cells = cells_of(write(TWO.replace("[0, 1]", "[0, 1, 2]")), ray="auto")
    with sweeps._ground(cells, side_by_side) as (ready, found):
        assert found == at_a_time
        assert [cell.request.jobs for cell in ready] == [each] * 3
        assert found * each <= room


def test_cells_without_a_cluster_are_what_they_were(write):
    cells = cells_of(write())
    with sweeps._ground(cells, 7) as found:
        assert found == (cells, 7)


@pytest.fixture
def begin(tmp_path):
    """Start `robustboard sweep` in a process group of its own."""

    def go(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", "from robustboard.bench.cli import main; main()", "sweep", str(path)]
        return subprocess.Popen(
            [*command, "--runs", str(tmp_path / "runs"), "--no-mlflow"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return go


def _stop(process: subprocess.Popen[str], number: signal.Signals, when: Callable[[], object]) -> tuple[int, str]:
    """Signal the whole process group as soon as something is there; its exit code, and what it said."""
    with process:
        deadline = time.monotonic() + 120
        while not when() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        return process.wait(timeout=60), process.stderr.read()


def _records(runs: Path) -> dict[str, Path]:
    return {path.parts[-3]: path for path in runs.rglob("record.json")}


def test_a_sweep_that_was_stopped_goes_on_as_a_whole(one_process, run, write, begin, tmp_path):
    """Terminated inside the first cell and killed inside the second; it ends with the tables of a quiet sweep."""
    path, runs = write(), tmp_path / "runs"
    code, said = _stop(begin(path), signal.SIGTERM, lambda: list(runs.rglob("journal.bin")))
    assert code == 128 + signal.SIGTERM
    assert "the same command goes on" in said
    assert [cell.state for cell in cells_of(path)] == ["begun", "to do"]

    code, _ = _stop(begin(path), signal.SIGKILL, lambda: _records(runs))
    assert code == -signal.SIGKILL
    ((name, record),) = _records(runs).items()
    written = record.stat().st_mtime_ns
    assert run(path, "--no-mlflow").exit_code == 0
    found = _records(runs)
    assert found[name].stat().st_mtime_ns == written
    assert not list(runs.rglob("journal.bin"))

    shutil.copytree(runs / "small-linf@1" / "surrogates", tmp_path / "quiet" / "small-linf@1" / "surrogates")
    base = Request(defense="", track="", threads=1, runs=tmp_path / "quiet")
    cells = plan(read_sweep(path), path, base, side_by_side=1, progress=NoProgress())
    bars = Bars(Console(file=io.StringIO()))
    quiet = {one.cell.folder.name: one.record for one in sweeps.run_sweep(cells, side_by_side=1, uri=None, bars=bars)}
    assert quiet.keys() == found.keys()
    for name, record in found.items():
        pd.testing.assert_frame_equal(load(record.parent).outcomes, quiet[name].outcomes)
