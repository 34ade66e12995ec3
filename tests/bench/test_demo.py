"""The demo: everything it promises in one run (slow), and that one failure or interrupt ends every job at once."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from robustboard.bench import demo
from robustboard.bench.process import WorkerProcess
from robustboard.bench.progress import Bars
from robustboard.defenses import registry
from robustboard.errors import DefenseError, OutputError, WorkerError
from robustboard.leaderboard.record import load_all


def test_one_failing_job_ends_the_others_and_is_the_one_that_is_named(monkeypatch, tmp_path):
    """A demo that goes on for minutes after its first error, or names a job that was only ended, helps nobody."""
    ended = []

    def score(request, bar, *, workers):
        if request.defense == "bad":
            time.sleep(0.3)
            raise DefenseError("bad is bad.")
        with WorkerProcess(workers=workers) as worker:
            worker._process.wait(timeout=60)
            ended.append(request.defense)
            raise WorkerError("ended")

    monkeypatch.setattr(demo, "score_defense", score)
    began = time.monotonic()
    bars = Bars(Console(file=io.StringIO()))
    with pytest.raises(DefenseError, match="bad is bad"):
        demo._score_all(["slow", "bad", "later"], runs=tmp_path, jobs=2, bars=bars)
    assert time.monotonic() - began < 50
    assert ended in ([], ["slow"]), "a job that had not begun must not begin any more"


def test_a_site_that_cannot_be_written_is_refused_before_any_training(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.tex").write_text("not a site")
    with pytest.raises(OutputError, match="not a RobustBoard site"):
        demo.run_demo(runs=tmp_path / "runs", out=tmp_path / "site", jobs=1, bars=Bars(Console(file=io.StringIO())))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_demo_trains_scores_and_shows_every_defense(tmp_path):
    command = [sys.executable, "-c", "from robustboard.bench.cli import main; main()", "demo"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "site"), "--runs", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    records = {record.defense.name: record for record in load_all(tmp_path / "runs", ignore={"mlflow-artifacts"})}
    assert set(records) == set(registry.names())
    for name, record in records.items():
        assert record.defense.title in page
        assert name in done.stdout
        assert record.metrics["undecided"].value == 0
    trained = records["pgd-at"]
    assert trained.metrics["clean"].value >= 0.97
    assert trained.metrics["robust"].value >= 0.80
    assert trained.cost["train"].seconds < 60
    assert records["standard"].metrics["robust"].value < 0.5 < records["crown-ibp"].metrics["certified"].value
