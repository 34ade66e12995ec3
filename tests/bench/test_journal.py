"""The journal: whatever happens to a run, what was answered is kept, and the outcome is that of a quiet run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from robustboard.bench import journal as journals
from robustboard.bench.cli import app
from robustboard.bench.journal import Journal, Journaled, alone
from robustboard.bench.operations import Reply
from robustboard.errors import LostWorkerError, ModelError, OutputError
from robustboard.leaderboard.record import load

IDENTITY = {"weights": "a" * 64}


def reply(number: int) -> Reply:
    return Reply({"number": number}, {"images": np.full((number, 2), number, dtype=np.float32)}, 0.5, number, 2)


def question(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture
def written(tmp_path):
    """A journal of three answers."""
    with Journal(tmp_path / "journal.bin", IDENTITY) as journal:
        for number in (1, 2, 3):
            journal.keep(question(number), reply(number))
    return tmp_path / "journal.bin"


def recalled(path: Path) -> list[int]:
    with Journal(path, IDENTITY) as journal:
        found = [journal.recall(question(number)) for number in (1, 2, 3)]
    for number, one in enumerate(found, start=1):
        if one is not None:
            np.testing.assert_array_equal(one.arrays["images"], reply(number).arrays["images"])
            assert (one.count("number"), one.seconds, one.forwards, one.backwards) == (number, 0.5, number, 2)
    return [number for number, one in enumerate(found, start=1) if one is not None]


def test_answers_come_back_as_they_were_and_each_once(written):
    assert recalled(written) == [1, 2, 3]
    with Journal(written, IDENTITY) as journal:
        assert len(journal) == 3
        assert journal.recall(question(2)) is not None
        assert journal.recall(question(2)) is None
        # What this very run keeps is not given back: a question that is asked twice is meant twice.
        journal.keep(question(4), reply(4))
        assert journal.recall(question(4)) is None


def test_a_tail_that_was_torn_anywhere_is_dropped(written):
    """Every length that a power cut may leave: the answers before the tear are there, and the journal goes on."""
    content = written.read_bytes()
    ends = []
    for length in range(len(content) + 1):
        written.write_bytes(content[:length])
        found = recalled(written)
        assert found == [1, 2, 3][: len(found)]
        ends.append(len(found))
        if length % 17 == 0:
            with Journal(written, IDENTITY) as journal:
                journal.keep(question(3), reply(3))
            assert 3 in recalled(written)
    assert ends == sorted(ends)
    assert ends[-2:] == [2, 3]


def test_a_flipped_bit_ends_what_can_be_trusted(written):
    content = bytearray(written.read_bytes())
    content[len(content) // 2] ^= 1
    written.write_bytes(content)
    assert recalled(written) in ([], [1], [1, 2])


def test_answers_of_another_model_are_not_used(written):
    with Journal(written, {"weights": "b" * 64}) as journal:
        assert len(journal) == 0
        assert journal.recall(question(1)) is None


def test_a_full_disk_is_one_sentence_and_loses_nothing(written, monkeypatch):
    """Half of the segment gets to the disk."""
    write = os.pwrite
    with Journal(written, IDENTITY) as journal:
        left = [40]

        def pwrite(file, content, offset):
            if not left[0]:
                raise OSError(28, "No space left on device")
            done = write(file, bytes(content)[: left[0]], offset)
            left[0] -= done
            return done

        monkeypatch.setattr(journals.os, "pwrite", pwrite)
        with pytest.raises(OutputError, match="No space left on device"):
            journal.keep(question(4), reply(4))
        monkeypatch.undo()
        journal.keep(question(5), reply(5))
    with Journal(written, IDENTITY) as journal:
        assert journal.recall(question(4)) is None
        assert journal.recall(question(5)) is not None
    assert recalled(written) == [1, 2, 3]


def test_two_processes_do_not_share_a_run_directory(tmp_path):
    # A lock belongs to an open file, so a second one in this process is refused like another process.
    again = alone(tmp_path / "run")
    with alone(tmp_path / "run"), pytest.raises(OutputError, match="Another process is at work"):
        again.__enter__()
    with alone(tmp_path / "run"):
        pass


def test_half_written_files_of_a_killed_process_go_and_nothing_else(tmp_path):
    """A kill in the middle of a checkpoint would else leave its size on the disk each time; the soak found this."""
    run = tmp_path / "run"
    gone = [
        "checkpoints/.pgd-at.pt.ex8cj5yl",
        ".model.safetensors.abcd_123",
        "surrogates/standard/.standard.pt.00000000",
        ".record.owed.json.q1w2e3r4",
        ".challenged-0123456789ab-0123456789ab.owed.json.q1w2e3r4",
    ]
    stay = [
        "checkpoints/pgd-at.pt",
        "model.safetensors",
        "record.owed.json",
        "challenged-0123456789ab-0123456789ab.owed.json",
        ".model.safetensors.Settings",
        ".bashrc.12345678",
        "x/.y.pt.abcdefgh",
    ]
    for name in (*gone, *stay):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    with alone(run):
        left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {*stay, ".lock"}


class _Counting:
    """A session that answers with the number of the call."""

    jobs = 1

    def __init__(self):
        self.asked = []

    def call(self, operation, params, arrays, *, on_forwards=None):
        self.asked.append(operation)
        return Reply({"call": len(self.asked)}, {}, 0.0, 5, 0)

    def close(self):
        """Nothing to end."""


def test_a_question_is_its_operation_its_settings_and_its_images(tmp_path):
    images, other = np.zeros((1, 1, 2, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)
    questions = [
        ("predict", {}, {"images": images}),
        ("predict", {}, {"images": other}),
        ("pgd", {"seed": 0, "eps": "1/2"}, {"images": images}),
        ("pgd", {"seed": 1, "eps": "1/2"}, {"images": images}),
    ]
    first, second, told = _Counting(), _Counting(), []
    with Journal(tmp_path / "journal.bin", IDENTITY) as journal:
        session = Journaled(first, journal)
        before = [session.call(*one).count("call") for one in [*questions, questions[0]]]
    with Journal(tmp_path / "journal.bin", IDENTITY) as journal:
        session = Journaled(second, journal)
        after = [session.call(*one, on_forwards=told.append).count("call") for one in [*questions, questions[0]]]
        assert session.call("pgd", {"eps": "1/2", "seed": 2}, {"images": images}).count("call") == 1
        session.call("check", {}, {"images": images})
    assert before == after == [1, 2, 3, 4, 5]
    assert told == [5] * 5
    assert second.asked == ["pgd", "check"]


MORTAL = """
import os, torch
from pathlib import Path
from torch import nn

FOLDER = Path({folder!r})

class Net(nn.Module):
    def __init__(self, sign=1.0):
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.passes, self.sign = 0, sign

    def forward(self, x):
        self.passes += 1
        with (FOLDER / "passes").open("a") as file:
            file.write(".")
        # It dies as often as a command is patient with it, and then lives.
        deaths = len(list(FOLDER.glob("death-*")))
        if self.passes > {most} and deaths < {deaths} or 0 < deaths < {deaths}:
            (FOLDER / f"death-{{deaths}}").touch()
            os._exit(9)
        return self.sign * self.layer(x.flatten(1))

def build():
    return Net()

def other():
    return Net(sign=-1.0)
"""


@pytest.fixture
def mortal(make_submission, quadrant_track, tmp_path):
    """A submission whose process dies in the middle of its first run, that run, and how to run the command again."""
    manifest = make_submission(MORTAL.format(folder=str(tmp_path), most=800, deaths=3))

    def run(name: str, *options: str):
        command = ["score", str(manifest), "--track", str(quadrant_track), "--no-mlflow", *options]
        (tmp_path / "passes").unlink(missing_ok=True)
        done = CliRunner().invoke(app, [*command, "--run-dir", str(tmp_path / name)])
        return done, (tmp_path / "passes").stat().st_size

    first, _ = run("run")
    assert isinstance(first.exception, LostWorkerError)
    assert "exit code 9" in str(first.exception)
    assert "3 times in a row" in str(first.exception)
    assert (tmp_path / "run" / "journal.bin").stat().st_size > 1000
    return manifest, run


def test_a_run_goes_on_where_a_dead_process_left_it(mortal, tmp_path):
    """The same command asks only what is left: fewer passes, an equal table, and all passes in the record's cost."""
    _, run = mortal
    (done, passes), (_, quiet) = run("run"), run("quiet")
    assert done.exit_code == 0, done.output
    assert quiet - passes > 400
    assert not list(tmp_path.glob("*/journal.bin"))
    one, other = load(tmp_path / "run" / "record"), load(tmp_path / "quiet" / "record")
    pd.testing.assert_frame_equal(one.outcomes, other.outcomes)
    assert [note for note in one.notes if "lost 3 times" in note]
    assert not [note for note in other.notes if "lost" in note]
    assert {stage: cost.forwards for stage, cost in one.cost.items()} == {
        stage: cost.forwards for stage, cost in other.cost.items()
    }


def test_another_function_of_the_same_files_is_another_model(mortal, tmp_path):
    """Weights and code are the same, bit for bit; only the manifest names another function."""
    manifest, run = mortal
    manifest.write_text(manifest.read_text().replace("model.py:build", "model.py:other"))
    done, _ = run("run")
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "run" / "record").metrics["clean"].value == 0


def test_an_answer_that_cannot_be_used_is_not_kept_for_the_next_run(make_submission, quadrant_track, tmp_path):
    """A model that answers NaN once, in the middle: the journal goes, so that the next run asks again."""
    model = MORTAL.format(folder=str(tmp_path), most=60, deaths=1)
    # A verdict rests on a pass in inference mode.
    model = model.replace("if self.passes", "if torch.is_inference_mode_enabled() and self.passes")
    model = model.replace("os._exit(9)", "return x.new_full((len(x), 4), float('nan'))")
    command = ["score", str(make_submission(model)), "--track", str(quadrant_track), "--no-mlflow", "--run-dir"]
    first = CliRunner().invoke(app, [*command, str(tmp_path / "run")])
    assert isinstance(first.exception, ModelError)
    assert not (tmp_path / "run" / "journal.bin").exists()
    assert CliRunner().invoke(app, [*command, str(tmp_path / "run")]).exit_code == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; gives its place and a way to mount it anew with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)

    try:
        mount("size=64k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_costs_no_answer(make_submission, quadrant_track, tmp_path, small_disk):
    place, mount = small_disk
    command = ["score", str(make_submission()), "--track", str(quadrant_track), "--no-mlflow", "--run-dir"]
    first = CliRunner().invoke(app, [*command, str(place / "run")])
    assert isinstance(first.exception, OutputError)
    assert "No space left" in str(first.exception)
    assert "\n" not in str(first.exception)
    kept = (place / "run" / "journal.bin").stat().st_size
    assert kept > 4000
    mount("remount,size=16m")
    for folder in (place / "run", tmp_path / "quiet"):
        done = CliRunner().invoke(app, [*command, str(folder)])
        assert done.exit_code == 0, done.output
    pd.testing.assert_frame_equal(load(place / "run" / "record").outcomes, load(tmp_path / "quiet" / "record").outcomes)


def test_a_disk_that_admits_no_writing_is_one_sentence(make_submission, quadrant_track, small_disk):
    place, mount = small_disk
    mount("remount,ro")
    command = ["score", str(make_submission()), "--track", str(quadrant_track), "--no-mlflow"]
    done = CliRunner().invoke(app, [*command, "--run-dir", str(place / "run")])
    assert isinstance(done.exception, OutputError)
    assert "cannot be" in str(done.exception)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_five_kills_change_nothing(tmp_path):
    """SIGKILL to the whole process group at random moments, training included, until the run ends by itself."""
    code = "import sys; from robustboard.bench.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "score", "fgsm-at", "--track", "digits-linf@1", "--n", "60"]
    command += ["--set", "epochs=20", "--no-mlflow", "--run-dir"]

    def begin(name: str) -> subprocess.Popen[bytes]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*command, str(tmp_path / name)], start_new_session=True, **quiet)

    began = time.monotonic()
    with begin("quiet") as process:
        assert process.wait(timeout=600) == 0, process.stderr.read()
    whole = time.monotonic() - began
    draw, kills = random.Random(0), 0
    while True:
        with begin("killed") as process:
            # Each gets some seconds beyond its start, so that they are spread over the whole run.
            patience = draw.uniform(0.1, 1.0) * whole if kills < 25 else 600
            try:
                code = process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                continue
            assert code == 0, process.stderr.read()
        if kills >= 25:
            break
        # It ended before it was killed often enough: once more, from nothing.
        (tmp_path / "killed").rename(tmp_path / f"ended-{kills}")
    tables = [load(path / "record").outcomes for path in sorted(tmp_path.iterdir()) if (path / "record").is_dir()]
    assert len(tables) >= 2
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
