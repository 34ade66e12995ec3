"""How many threads a model gets by default, and how old a process is."""

from __future__ import annotations

import subprocess
import sys
import time

from robustboard.bench import environment
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense


def test_a_model_of_larger_images_gets_every_core(monkeypatch):
    monkeypatch.setattr(environment, "cores", lambda: 6)
    assert environment.threads_for(28 * 28) == 6
    assert environment.threads_for(8 * 8) == 1


def test_digits_are_scored_on_one_thread_unless_told_otherwise(tmp_path):
    def threads(**asked: int) -> int:
        request = Request(defense="ibp", track="digits-linf@1", n=5, runs=tmp_path, overrides={"epochs": 1}, **asked)
        return score_defense(request).record.environment.threads

    assert threads() == 1
    assert threads(threads=2) == 2


def test_the_age_of_a_process_counts_its_imports_and_its_waiting():
    code = "import time; time.sleep(0.5); from robustboard.bench.environment import process_age; print(process_age())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    elapsed = time.monotonic() - began
    assert 0.45 <= float(done.stdout) <= elapsed + 0.1
