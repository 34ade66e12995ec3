"""The command line, run as its users run it: what it prints, its exit codes, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from robustboard.bench.datasets import load_dataset
from robustboard.bench.entrants import find_entrant
from robustboard.bench.protocol import load_track
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
            [sys.executable, "-P", "-c", "from robustboard.bench.cli import main; main()", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=home,
            env={**clean, "COLUMNS": "160", **environment},
            timeout=300,
            check=False,
        )

    return go


def _refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one sentence of a refusal, after the lines of the stages that ran; a traceback fails."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("robustboard: ")]
    assert len(said) == 1
    assert done.stderr.rstrip().endswith(said[0])
    assert "Traceback" not in done.stderr
    return said[0]


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
    [
        ("half_eps", "both certified and broken"),
        ("wide_attack", "left the linf ball"),
        ("stale_store", "stored adversarial"),
    ],
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


def test_an_unknown_defense_is_one_sentence_even_where_its_data_are_missing(run, tmp_path):
    said = _refused(run("score", "pgd-att", "--track", "cifar100-linf@1", HOME=str(tmp_path), XDG_CACHE_HOME=""))
    assert "pgd-at" in said


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
    words = ("--track", quadrant_track, "--runs", tmp_path / "runs", "--json", "--no-mlflow")
    assert sentence in _refused(run("score", make_submission(model), *words))
    assert not (tmp_path / "runs").exists(), "something was half-written"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import time\ndef build(): time.sleep(600)", "silent for 2 seconds during load"),
        ("def build(): raise ValueError('no luck')", "ValueError: no luck"),
    ],
    ids=["hangs", "raises"],
)
def test_a_model_that_fails_to_load_is_one_sentence(run, make_submission, quadrant_track, tmp_path, code, sentence):
    words = ("--track", quadrant_track, "--runs", tmp_path / "runs", "--load-seconds", 2, "--no-mlflow")
    assert sentence in _refused(run("score", make_submission(code), *words))
    assert not (tmp_path / "runs").exists()


def test_a_truncated_weight_file_is_one_sentence(run, make_submission, quadrant_track, tmp_path):
    manifest = make_submission()
    weights = manifest.with_name("weights.npz")
    weights.write_bytes(weights.read_bytes()[:100])
    words = ("--track", quadrant_track, "--runs", tmp_path / "runs", "--no-mlflow")
    assert "truncated" in _refused(run("score", manifest, *words))
    assert not (tmp_path / "runs").exists()


def test_a_gate_takes_back_the_record_of_the_same_run(run, make_submission, quadrant_track, tmp_path):
    """A record that the same command now contradicts must not stay to be published."""
    words = ("score", make_submission(), "--track", quadrant_track, "--runs", tmp_path / "runs", "--no-mlflow")
    assert run(*words).returncode == 0
    assert list((tmp_path / "runs").rglob("record.json"))
    _refused(run(*words, "--json", PYTHONPATH=str(FAULTS / "half_eps")), code=1)
    assert not list((tmp_path / "runs").rglob("record.json"))


def test_other_weights_are_another_run(make_submission, quadrant_track):
    """Two networks of one name and code must not share, and so mix, a run directory."""
    track = load_track(quadrant_track)
    data = load_dataset(track.dataset)
    manifest = make_submission()

    def key() -> str:
        return find_entrant(str(manifest), {}, track, data, seed=0).key

    before = key()
    assert key() == before
    np.savez(manifest.with_name("weights.npz"), **{"layer.weight": np.ones((4, 16)), "layer.bias": np.zeros(4)})
    assert key() != before


def test_a_module_of_the_current_folder_does_not_reach_the_worker(run, make_submission, quadrant_track, tmp_path):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "random.py").write_text("raise RuntimeError('not the real one')")
    done = run("score", make_submission(), "--track", quadrant_track, "--runs", tmp_path / "runs", "--no-mlflow")
    assert done.returncode == 0, done.stderr


def test_markup_in_a_title_is_text(run, make_submission, quadrant_track, tmp_path):
    manifest = make_submission()
    manifest.write_text(manifest.read_text().replace("A linear network", "Linear [beta=6] [/x]"))
    done = run("score", manifest, "--track", quadrant_track, "--runs", tmp_path / "runs", "--no-mlflow")
    assert done.returncode == 0, done.stderr
    assert "Linear [beta=6] [/x]" in done.stdout


def test_an_interrupt_ends_the_run_and_its_model(make_submission, quadrant_track, tmp_path):
    """Ctrl-C while a model works: one sentence, exit code 130, and no process left behind."""
    code = "import os, time\ndef build():\n    open('PID', 'w').write(str(os.getpid()))\n    time.sleep(600)"
    marker = tmp_path / "pid"
    command = [sys.executable, "-c", "from robustboard.bench.cli import main; main()", "score"]
    command += [str(make_submission(code.replace("PID", str(marker)))), "--track", str(quadrant_track)]
    command += ["--runs", str(tmp_path / "runs"), "--no-mlflow"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in said
    assert not Path(f"/proc/{marker.read_text()}").exists()


@pytest.mark.parametrize("words", [(), ("score",), ("nope",), ("score", "standard", "--track", "t", "--n", "0")])
def test_misuse_is_exit_code_two(run, words):
    done = run(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_version_is_the_installed_one(run):
    from importlib.metadata import version

    assert run("--version").stdout == f"robustboard {version('robustboard')}\n"


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


def test_claims_are_listed_with_their_rules(run):
    done = run("claims", "rift", "--json")
    assert done.returncode == 0
    listed = json.loads(done.stdout)
    assert {one["defense"] for one in listed} == {"rift"}
    assert all(one["rule"] and one["paper"] for one in listed)


def test_an_unknown_claim_is_one_sentence(run):
    assert "There is no claim 'perpetual-motion'" in _refused(run("claims", "--verify", "perpetual-motion"))
