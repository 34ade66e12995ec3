"""Several processes with one model: the same record, and one sentence when one of them fails."""

from __future__ import annotations

import re
import time

import pytest
from typer.testing import CliRunner

from robustboard.bench import asking
from robustboard.bench.asking import Request
from robustboard.bench.cli import app
from robustboard.bench.operations import Reply
from robustboard.bench.pool import Pool
from robustboard.bench.process import WorkerProcess
from robustboard.bench.retrying import RETRIES
from robustboard.errors import LostWorkerError, WorkerError
from robustboard.leaderboard.record import load

MORTAL = """
import os, torch
from pathlib import Path
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        # Whoever takes a gradient dies, as often as that is wanted.
        deaths = len(list(Path({folder!r}).glob("death-*")))
        if x.requires_grad and deaths < {deaths}:
            (Path({folder!r}) / f"death-{{deaths}}").touch()
            os._exit(9)
        return self.layer(x.flatten(1))

def build():
    return Net()
"""


def outcomes_of(tmp_path, name: str, *command: str):
    result = CliRunner().invoke(app, ["score", *command, "--run-dir", str(tmp_path / name), "--no-mlflow"])
    assert result.exit_code == 0, result.output
    record = load(tmp_path / name / "record")
    return record.outcomes, record.checkpoint_sha256


def test_a_submission_gets_the_same_record_from_two(make_submission, quadrant_track, tmp_path):
    command = str(make_submission()), "--track", str(quadrant_track)
    one, two = (outcomes_of(tmp_path, jobs, *command, "--jobs", jobs) for jobs in ("1", "2"))
    assert one[0].equals(two[0])
    assert one[1] == two[1]


def test_a_defense_that_is_trained_here_gets_the_same_record_from_two(tmp_path):
    """The second process takes the training of the first from its checkpoints."""
    command = "standard", "--track", "digits-linf@1", "--n", "40", "--set", "epochs=2"
    one, two = (outcomes_of(tmp_path, jobs, *command, "--jobs", jobs) for jobs in ("1", "2"))
    assert one[0].equals(two[0])
    assert one[1] == two[1]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_model_that_ends_its_process_every_time_is_one_sentence(make_submission, quadrant_track, tmp_path, jobs):
    model = MORTAL.format(folder=str(tmp_path), deaths=99)
    command = ["score", str(make_submission(model)), "--track", str(quadrant_track), "--jobs", jobs, "--no-mlflow"]
    result = CliRunner().invoke(app, [*command, "--run-dir", str(tmp_path / "run")])
    assert isinstance(result.exception, LostWorkerError)
    assert re.search(r"exit code 9 during check.*, 3 times in a row\.$", str(result.exception))
    assert not (tmp_path / "run" / "record").exists()
    # The contract is checked in all processes side by side, and two that die at once may leave one mark.
    assert 1 + RETRIES <= len(list(tmp_path.glob("death-*"))) <= int(jobs) * (1 + RETRIES)


HAWKER = """
from torch import nn
from robustboard import errors

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        if len(x) > 16:
            raise errors.{error}("Buy my product.")
        return self.layer(x.flatten(1))

def build():
    return Net()
"""


@pytest.mark.parametrize("error", ["NoRoomError", "LostWorkerError", "GateError"])
def test_what_only_the_board_can_know_a_model_cannot_say(make_submission, quadrant_track, tmp_path, error):
    """Else a stranger's code could end workers for good, or have itself asked again."""
    manifest = make_submission(HAWKER.format(error=error))
    command = ["score", str(manifest), "--track", str(quadrant_track), "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--no-mlflow"])
    assert type(result.exception) is WorkerError
    assert not (tmp_path / "run").exists()


def test_an_error_while_questions_are_made_leaves_nobody_at_work():
    """The later questions are not asked, and the interrupt reaches the session."""
    asked, closed = [], []

    class Session:
        jobs = 2

        def call(self, operation, params, arrays, *, on_forwards=None):
            asked.append(params["number"])
            time.sleep(0.2)
            return Reply({}, {})

        def close(self):
            closed.append(True)

    def questions():
        for number in range(6):
            yield Request("measure", {"number": number}, {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(asking.asked(Session(), questions()))
    assert closed == [True]
    assert len(asked) < 6


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_process_that_dies_is_replaced_and_the_record_says_so(make_submission, quadrant_track, tmp_path, jobs):
    """Once in `check`, which the new process must learn anew, and the outcome is that of a quiet run."""
    model = MORTAL.format(folder=str(tmp_path), deaths=1)
    command = str(make_submission(model)), "--track", str(quadrant_track), "--jobs", jobs
    lossy, _ = outcomes_of(tmp_path, "lossy", *command)
    quiet, _ = outcomes_of(tmp_path, "quiet", *command)
    assert lossy.equals(quiet)
    (note,) = (note for note in load(tmp_path / "lossy" / "record").notes if "lost" in note)
    assert "lost 1 time (ended with exit code 9 during check)" in note
    assert not [note for note in load(tmp_path / "quiet" / "record").notes if "lost" in note]


def test_all_end_with_the_session(make_submission):
    with WorkerProcess() as first, WorkerProcess() as second:
        workers = [first, second]
        for worker in workers:
            worker.load(make_submission(name=f"linear-{id(worker)}"))
        Pool(workers).close()
        for worker in workers:
            with pytest.raises((WorkerError, OSError)):
                worker.call("predict", {}, {})
