"""An estimate in real processes: what it says, and that it leaves every folder as it was. No test asks for seconds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustboard.bench import estimate as module
from robustboard.bench.datasets import load_dataset
from robustboard.bench.estimate import estimate
from robustboard.bench.protocol import load_track, training_data
from robustboard.bench.request import Request
from robustboard.bench.surrogates import RECIPES
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress
from robustboard.errors import RobustBoardError

ALWAYS = {"start", "data", "the model's process", "contract", "clean", "pgd", "diagnostics", "corruptions", "end"}


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder, with its digest and when it was last written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in files
    }


def test_the_command_prints_every_stage_and_writes_nothing(make_submission, quadrant_track, tmp_path):
    manifest, home = make_submission(), tmp_path / "home"
    home.mkdir()
    before = contents(tmp_path)
    words = ("score", manifest, "--track", quadrant_track, "--complete", 10, "--estimate", "--json")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from robustboard.bench.cli import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=home,
        env={key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["defense"], found["track"], found["n"]) == ("linear", "quadrants-linf@1", 40)
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert {*ALWAYS, "load", "bounds: set-up", "bounds: ibp", "complete verification", "audit", "mlflow"} <= set(stages)
    for stage in (found, *stages.values()):
        assert 0 <= stage["low"] <= stage["seconds"] <= stage["high"]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()), abs=0.01 * len(stages))
    assert "upper limit" in " ".join(found["notes"])
    assert found["estimate_seconds"] > 0
    after = {name: state for name, state in contents(tmp_path).items() if "__pycache__" not in name}
    assert after == before, "an estimate wrote into the submission, the current folder or a run directory"


@pytest.fixture
def trainings_alone(monkeypatch):
    """What an evaluation costs is the first test's subject."""
    monkeypatch.setattr(module._Run, "_evaluation", lambda *_: None)


@pytest.mark.usefixtures("trainings_alone")
def test_a_finished_run_is_read_and_left_alone(tmp_path, monkeypatch):
    """Its training has been done, so none is timed; its surrogates are there, so none is trained."""
    folder = tmp_path / "run"
    request = Request("standard", "digits-linf@1", n=12, overrides={"epochs": "1"}, run_dir=folder, threads=1)
    track = load_track(request.track)
    registry.create("standard", request.overrides).fit(
        training_data(track, load_dataset("digits")),
        track.threat,
        seed=0,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=CheckpointStore(folder / "checkpoints"),
    )
    for name in ("model.safetensors", *(f"surrogates/{recipe}/{recipe}.pt" for recipe in RECIPES)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    before = contents(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a training was timed that has been done")

    monkeypatch.setattr(module._Run, "_training", refuse)
    found = estimate(request)
    assert [stage.stage for stage in found.stages] == ["start", "data", "the model's process", "training", "end"]
    assert found.notes == ()
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("trainings_alone")
def test_a_training_is_extrapolated_and_kept_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TRAINING_SECONDS", 0.0)
    request = Request("pgd-at", "digits-linf@1", n=12, overrides={"epochs": "2"}, runs=tmp_path / "runs", threads=1)
    found = estimate(request)
    assert {"training", "surrogates"} <= {stage.stage for stage in found.stages}
    (note,) = found.notes
    assert "128 and 256 of 1294 images" in note
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_scored_is_not_estimated(tmp_path):
    with pytest.raises(RobustBoardError, match="pgd-at"):
        estimate(Request("pgd-att", "digits-linf@1", runs=tmp_path))
    with pytest.raises(RobustBoardError, match="leave out --ray"):
        estimate(Request("pgd-at", "digits-linf@1", runs=tmp_path, ray="auto"))
