"""Networks that nobody here trained, on the images that the verification literature reports on.

What other people's code says of them, on the 200 images each: `cifar_cnn_a_adv` at 2/255 has clean accuracy 70.0 %,
AutoAttack 50.5 %, CROWN 35.5 %; `mnist_cnn_a_adv` at 3/10 has 97.5, 76.5 and 1.0 %. The best complete verifiers leave
48.5 and 76.0 % provable, so a robust accuracy below that would be an attack outside the ball.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _score(folder: Path, *words: str) -> dict[str, Any]:
    """The record that `robustboard score --json` prints."""
    command = [sys.executable, "-c", "from robustboard.bench.cli import main; main()", "score"]
    where = [str(folder / "defense.toml"), "--track", str(folder / "track.toml"), "--runs", str(folder / "runs")]
    done = subprocess.run(
        [*command, *where, "--no-mlflow", "--json", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


@pytest.mark.parametrize(
    ("data", "clean", "crown", "least", "most"),
    [("cifar", 0.700, 0.355, 0.485, 0.505), ("mnist", 0.975, 0.010, 0.760, 0.765)],
)
def test_the_cascade_agrees_with_other_peoples_numbers(third_party, data, clean, crown, least, most):
    record = _score(third_party(data))
    metrics = record["metrics"]
    assert metrics["clean"]["value"] == pytest.approx(clean)
    assert metrics["certified/crown"]["value"] == pytest.approx(crown)
    assert least <= metrics["robust"]["value"] <= most
    assert "autoattack" not in metrics
    findings = record["diagnostics"]["gradients"]["findings"]
    assert [one["sentence"] for one in findings if one["verdict"] not in ("ok", "not run")] == []
    assert record["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(("data", "autoattack"), [("cifar", 0.505), ("mnist", 0.765)])
def test_the_reference_engine_reproduces_autoattack(third_party, data, autoattack):
    metrics = _score(third_party(data), "--attack-engine", "reference")["metrics"]
    assert metrics["autoattack"]["value"] == pytest.approx(autoattack)
    assert metrics["robust"]["value"] <= metrics["autoattack"]["value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "nodes", "certified", "provable"), [("cifar", 1500, 0.40, 0.485), ("mnist", 200, 0.10, 0.760)]
)
def test_complete_verification_proves_more_than_bounds(third_party, data, nodes, certified, provable):
    """Within half an hour on two cores; the best complete verifiers, on GPUs, prove `provable`."""
    metrics = _score(third_party(data), "--complete", str(nodes))["metrics"]
    assert metrics["certified"]["value"] >= certified
    assert metrics["robust"]["value"] >= provable
