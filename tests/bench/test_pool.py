"""Several processes with one model: the same record, and one sentence when one of them fails."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from robustboard.bench.cli import app
from robustboard.bench.pool import Pool, started
from robustboard.bench.process import WorkerProcess
from robustboard.errors import WorkerError
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
        # Whoever takes the first gradient dies, and the others live.
        if x.requires_grad and not Path({flag!r}).exists():
            Path({flag!r}).touch()
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


def test_a_process_that_dies_is_one_sentence(make_submission, quadrant_track, tmp_path):
    model = MORTAL.format(flag=str(tmp_path / "flag"))
    command = ["score", str(make_submission(model)), "--track", str(quadrant_track), "--jobs", "2", "--no-mlflow"]
    result = CliRunner().invoke(app, [*command, "--run-dir", str(tmp_path / "run")])
    assert isinstance(result.exception, WorkerError)
    assert "exit code 9" in str(result.exception)
    assert not (tmp_path / "run" / "record").exists()


def test_all_end_with_the_session(make_submission):
    with started(2, WorkerProcess) as workers:
        for worker in workers:
            worker.load(make_submission(name=f"linear-{id(worker)}"))
        Pool(workers).close()
        for worker in workers:
            with pytest.raises((WorkerError, OSError)):
                worker.call("predict", {}, {})
