"""Training seeds: each is scored once, a finished run is read, and the spread is that of the records."""

from __future__ import annotations

from dataclasses import replace

import pytest

from robustboard.bench import places, training_seeds
from robustboard.bench.process import WorkerProcess
from robustboard.bench.request import Request
from robustboard.bench.training_seeds import run_training_seeds
from robustboard.errors import DefenseError
from robustboard.leaderboard.record import load_all

TRACK = """
id = "small-linf@1"
dataset = "digits"
threat = {norm = "linf", eps = "1/10"}
n = 12
bounds = {methods = ["ibp"]}
audit = {certified_sample = 0, smallest_margins = 0}
corruptions = {names = ["contrast"], severities = [1]}
training = {train = 600, validation = 60}
"""


def test_seeds_are_scored_once_and_read_afterwards(tmp_path, monkeypatch):
    (tmp_path / "track.toml").write_text(TRACK)
    request = Request(
        defense="standard",
        track=tmp_path / "track.toml",
        threads=1,
        runs=tmp_path / "runs",
        overrides={"epochs": 2},
    )
    with WorkerProcess() as worker:
        monkeypatch.setattr(places, "WorkerProcess", lambda **_: worker)
        monkeypatch.setattr(worker, "close", lambda: None)
        spread = run_training_seeds(request, [1, 0])
        monkeypatch.undo()
    records = sorted(load_all(tmp_path / "runs"), key=lambda record: record.seeds["training"])
    assert spread.seeds == (0, 1)
    assert spread.n == 12
    for name, found in spread.metrics.items():
        assert list(found.values) == [record.metrics[name].value for record in records]

    monkeypatch.setattr(training_seeds, "score_defense", None)
    assert run_training_seeds(request, [0, 1]) == spread
    with pytest.raises(TypeError, match="not callable"):
        run_training_seeds(request, [0, 2])
    # A record of another kind of device is not the one that is asked for.
    with pytest.raises(TypeError, match="not callable"):
        run_training_seeds(replace(request, device="cuda"), [0, 1])


def test_without_a_sound_record_there_is_no_spread(monkeypatch):
    monkeypatch.setattr(training_seeds, "training_spreads", lambda records: {})
    monkeypatch.setattr(training_seeds, "_finished", lambda request: request)
    with pytest.raises(DefenseError, match="No training of standard has a record that is ok"):
        run_training_seeds(Request(defense="standard", track="digits-linf@1"), [0, 1])


def test_a_submission_has_no_training_seeds(make_submission, quadrant_track):
    with pytest.raises(DefenseError, match="one trained network"):
        run_training_seeds(Request(defense=str(make_submission()), track=quadrant_track), [0, 1])
