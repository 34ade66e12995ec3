"""The command line, run as its users run it: what it prints, its exit codes, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from robustboard.leaderboard.record import load

FAULTS = Path(__file__).resolve().parents[1] / "faults"


@pytest.fixture
def run(tmp_path):
    """Run `robustboard ...` in an empty folder; returns the finished process."""

    def go(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        home = tmp_path / "cwd"
        home.mkdir(exist_ok=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ROBUSTBOARD_", "MLFLOW_"))}
        return subprocess.run(
            [sys.executable, "-c", "from robustboard.bench.cli import main; main()", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=home,
            env={**clean, "COLUMNS": "160", **environment},
            timeout=300,
            check=False,
        )

    return go


def _refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one sentence of a refusal; anything more, or a traceback, fails."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("robustboard: ")
    assert "Traceback" not in done.stderr
    return last


def test_a_submission_is_scored_end_to_end(run, make_submission, quadrant_track, tmp_path):
    """Score, record, MLflow store, and the same table from records and from the store."""
    done = run("score", make_submission(), "--track", quadrant_track, "--runs", tmp_path / "runs", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    (folder,) = (tmp_path / "runs" / "quadrants-linf@1" / "linear").iterdir()
    record = load(folder / "record")
    assert printed["metrics"]["robust"]["value"] == record.metrics["robust"].value
    assert record.code_sha256 is not None
    with np.load(folder / "adversarial.npz") as stored:
        assert len(stored["index"]) == (record.outcomes["verdict"] == "broken").sum()

    by_records = run("leaderboard", "--records", tmp_path / "runs", "--out", tmp_path / "one")
    by_store = run("leaderboard", "--mlflow", f"sqlite:///{tmp_path}/runs/mlflow.db", "--out", tmp_path / "two")
    assert (by_records.returncode, by_store.returncode) == (0, 0), by_records.stderr + by_store.stderr
    pages = [sorted(p.relative_to(site) for p in site.rglob("*") if p.is_file()) for site in _sites(tmp_path)]
    assert pages[0] == pages[1]
    for page in pages[0]:
        one, two = (site / page for site in _sites(tmp_path))
        assert one.read_bytes() == two.read_bytes(), f"{page} differs between records and store"


def _sites(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [("half_eps", "both certified and broken"), ("wide_attack", "left the linf ball")],
)
def test_the_gate_leaves_exit_code_one_a_sentence_and_no_record(
    run, make_submission, quadrant_track, tmp_path, fault, sentence
):
    done = run(
        "score",
        make_submission(),
        "--track",
        quadrant_track,
        "--runs",
        tmp_path / "runs",
        "--json",
        PYTHONPATH=str(FAULTS / fault),
    )
    said = _refused(done, code=1)
    assert sentence in said
    assert "example" in said
    assert not list((tmp_path / "runs").rglob("record.json"))
    assert not list((tmp_path / "runs").rglob("mlflow.db"))


def test_an_unknown_track_is_one_sentence(run):
    assert "digits-linf@1" in _refused(run("score", "standard", "--track", "digits-linv@1"))


def test_an_unknown_defense_is_one_sentence(run):
    assert "pgd-at" in _refused(run("score", "pgd-att", "--track", "digits-linf@1"))


def test_missing_data_is_one_sentence(run, tmp_path):
    said = _refused(run("score", "standard", "--track", "cifar100-linf@1", HOME=str(tmp_path), XDG_CACHE_HOME=""))
    assert "cifar100" in said.lower()
    assert "ROBUSTBOARD_DATA" in said


MODELS = {
    "probabilities": ("return self.layer(x.flatten(1)).softmax(1)", "probabilities"),
    "nan": ("return self.layer(x.flatten(1)) * float('nan')", "NaN"),
    "shape": ("return self.layer(x.flatten(1))[:, :3]", r"(N, 4)"),
    "crash": ("import os; os._exit(5)", "exit code 5"),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_that_breaks_the_contract_is_one_sentence(run, make_submission, quadrant_track, tmp_path, name):
    body, sentence = MODELS[name]
    model = f"""
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
    def forward(self, x):
        {body}
def build():
    return Net()
"""
    done = run("score", make_submission(model), "--track", quadrant_track, "--runs", tmp_path / "runs", "--json")
    assert sentence in _refused(done)
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()], "something was half-written"


def test_a_bad_override_is_one_sentence(run):
    assert "epochs" in _refused(run("score", "standard", "--track", "digits-linf@1", "--set", "epochs"))
    assert "epochs" in _refused(run("score", "standard", "--track", "digits-linf@1", "--set", "epocs=3"))


def test_a_run_directory_that_cannot_be_made_is_one_sentence(run, make_submission, quadrant_track, tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    done = run("score", make_submission(), "--track", quadrant_track, "--runs", tmp_path / "runs")
    assert "runs" in _refused(done)


def test_no_records_is_one_sentence(run, tmp_path):
    assert "record" in _refused(run("leaderboard", "--records", tmp_path, "--out", tmp_path / "site"))
    assert not (tmp_path / "site").exists()


def test_a_store_that_is_no_store_is_one_sentence(run, tmp_path):
    (tmp_path / "x.db").write_bytes(b"not a database at all" * 100)
    said = _refused(run("leaderboard", "--mlflow", f"sqlite:///{tmp_path}/x.db", "--out", tmp_path / "site"))
    assert "MLflow store" in said


@pytest.mark.parametrize("command", ["tracks", "defenses"])
def test_lists_parse_as_json(run, command):
    done = run(command, "--json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) >= 6
