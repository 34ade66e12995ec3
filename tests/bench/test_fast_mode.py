"""The fast mode: another protocol on the same examples, never mixed with the standard one."""

from __future__ import annotations

import numpy as np
import pytest
from quadrants import QuadrantNet, quadrants
from typer.testing import CliRunner

import robustboard
from robustboard.bench.cli import app
from robustboard.bench.protocol import load_track
from robustboard.leaderboard.record import load
from robustboard.leaderboard.site import render_site

DATA = quadrants()


def _track():
    return robustboard.track_from(
        {
            "id": "quadrants-linf@1",
            "dataset": "arrays",
            "threat": {"norm": "linf", "eps": "1/20"},
            "n": 40,
            "corruptions": {"names": ["gaussian_noise"], "severities": [1]},
        }
    )


@pytest.fixture(scope="module")
def both():
    """A network of which the truth is known, in both modes."""
    return {
        engine: robustboard.score(QuadrantNet(), track=_track(), data=DATA, engine=engine)
        for engine in ("cascade", "fast")
    }


def test_it_is_a_track_of_its_own():
    track = load_track("mnist-linf@1")
    fast = track.hurried()
    assert fast.id == "mnist-linf-fast@1"
    assert fast.hash != track.hash
    assert fast.hurried() is fast
    assert fast.limited(50).id == "mnist-linf-fast-n50@1"
    assert (fast.n, fast.threat, fast.batch_size) == (track.n, track.threat, track.batch_size)


def test_it_breaks_what_can_be_broken_and_proves_nothing(both):
    """On a linear network an attack by gradients is exact, so robust must be what the standard mode calls so."""
    standard, fast = both["cascade"], both["fast"]
    assert fast.metrics["robust"].value == standard.metrics["robust"].value
    assert standard.metrics["certified"].value > 0.3
    assert not fast.bound_methods
    assert fast.metrics["certified"].value == 0
    assert any("no bounds" in note for note in fast.notes)
    outcomes = fast.outcomes
    assert outcomes["fast"].notna().any()
    assert outcomes[["apgd_ce", "apgd_t", "fab_t", "square"]].isna().all(axis=None)
    assert set(outcomes["broken_by"].dropna()) <= {"pgd", "fast"}


def test_a_board_keeps_the_modes_apart(both):
    page = render_site(list(both.values()))["index.html"].decode()
    assert "quadrants-linf@1" in page
    assert "quadrants-linf-fast@1" in page


def test_the_command_says_what_it_did_not_try(make_submission, quadrant_track, tmp_path):
    command = ["score", str(make_submission()), "--track", str(quadrant_track), "--attack-engine", "fast"]
    result = CliRunner().invoke(app, [*command, "--run-dir", str(tmp_path / "run"), "--no-mlflow"])
    assert result.exit_code == 0, result.output
    assert "quadrants-linf-fast@1" in result.output
    assert "no bounds" in result.output
    assert "certified" not in result.output
    record = load(tmp_path / "run" / "record")
    assert record.track.id == "quadrants-linf-fast@1"
    np.testing.assert_array_equal(record.outcomes["certified"], False)
