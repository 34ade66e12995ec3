"""The soak itself: what it calls equal, and that it sees what is not (the soak in full is slow)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soak
from typer.testing import CliRunner

from robustboard.bench.cli import app
from robustboard.bench.retrying import Losses
from robustboard.errors import LostWorkerError
from robustboard.leaderboard.record import StageCost, load, save


@pytest.fixture
def folders(make_submission, quadrant_track, tmp_path):
    """A real run directory, and a copy of it."""
    command = ["score", str(make_submission()), "--track", str(quadrant_track), "--no-mlflow"]
    done = CliRunner().invoke(app, [*command, "--run-dir", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two"


def test_differences_are_seen_in_tables_passes_images_and_files(folders):
    one, two = folders
    assert soak.differences(one, two) == []
    record = load(two / "record")
    losses = Losses()
    losses.add(LostWorkerError("Gone.", how="ended by SIGKILL during attack", silent=False))
    survived = record.model_copy(update={"notes": (*record.notes, *losses.notes())})
    assert survived.notes != record.notes
    save(survived, record.outcomes, two / "record")
    assert soak.differences(one, two) == []
    save(record.model_copy(update={"notes": (*record.notes, "Another.")}), record.outcomes, two / "record")
    assert soak.differences(one, two) == ["notes differ"]
    table = record.outcomes.copy()
    row = table.index[table["certified"]][0]
    table.loc[row, "margin_lower"] += 0.5
    cost = {**record.cost, "pgd": StageCost(seconds=1.0, forwards=1, backwards=2)}
    save(record.model_copy(update={"cost": cost}), table, two / "record")
    with np.load(two / "adversarial.npz") as stored:
        fields = dict(stored)
    fields["images"] = fields["images"] * np.float32(0.5)
    np.savez(two / "adversarial.npz", **fields)
    (two / "journal.bin").touch()
    found = soak.differences(one, two)
    assert "the column margin_lower differs" in found
    assert "the passes of pgd differ" in found
    assert "images of the stored images differ" in found
    assert "only one folder has journal.bin" in found
    assert len(found) == 5


def test_processes_are_found_by_their_token_whoever_their_parent_is(tmp_path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = [sys.executable, "-c", child]
    subprocess.run(command, check=True, env={soak.TOKEN: "a-token", "PATH": ""})
    (orphan,) = soak.processes("a-token")
    assert soak.processes("a-toke") == []
    life = soak.Life(subprocess.Popen([sys.executable, "-c", ""]), "a-token", tmp_path / "log")
    life.log.touch()
    life.process.wait()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(soak, "LINGER", 0.2)
        with pytest.raises(soak.SoakError, match=rf"the processes \[{orphan}\] were left over"):
            life.check_end(0)
    # A killed process takes a moment to end.
    deadline = time.monotonic() + 10
    while soak.processes("a-token") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert soak.processes("a-token") == []


@pytest.mark.parametrize(
    ("kills", "code", "said", "explained"),
    [
        ({}, 0, "", True),
        ({}, 2, "robustboard: The model's process was ended.", False),
        ({"a worker killed": 2}, 2, "robustboard: The model's process was ended by SIGKILL.", False),
        ({"a worker killed": 3}, 2, "robustboard: The model's process was ended by SIGKILL, 3 times in a row.", True),
        ({"a worker killed": 1}, 0, "", True),
        ({"a worker killed": 3}, 2, "Traceback (most recent call last)", False),
        ({"a worker killed": 3}, 2, "robustboard: This is a bug of RobustBoard: KeyError", False),
        ({"a worker killed": 1}, -9, "", False),
        ({"parent killed": 1}, -9, "", True),
        ({"parent terminated": 1}, 143, "", True),
        ({"parent interrupted": 1}, 143, "", False),
        ({"parent interrupted": 1}, 130, "", True),
        ({"parent interrupted": 1}, -2, "", True),
        ({"parent interrupted": 1}, -2, "Traceback (most recent call last)", False),
    ],
)
def test_an_end_must_be_explained_by_what_was_done(tmp_path, kills, code, said, explained):
    (tmp_path / "log").write_text(said)
    life = soak.Life(None, "no such token", tmp_path / "log", soak.Counter(kills))
    if explained:
        life.check_end(code)
    else:
        with pytest.raises(soak.SoakError, match=r"the command ended with|After"):
            life.check_end(code)


@pytest.mark.slow
def test_a_minute_of_kills_changes_nothing(capsys):
    assert soak.main(["--minutes", "1", "--seed", "1", "--jobs", "2"]) == 0
    assert "every round ended like the undisturbed run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_minute_of_kills_changes_nothing_for_a_third_party_network(capsys, data_file):
    assert isinstance(data_file("mnist_cnn_a_adv.npz"), Path)
    assert soak.main(["--minutes", "1", "--seed", "2", "--jobs", "1", "--network", "mnist", "--n", "20"]) == 0
    assert "every round ended like the undisturbed run" in capsys.readouterr().out
