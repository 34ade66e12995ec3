"""The curve: what is reused is what a run at each radius by itself would have found, and no contradiction gets by."""

from __future__ import annotations

import json
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quadrants import quadrants
from torch import nn
from typer.testing import CliRunner

import robustboard
from robustboard.attacks import bounds
from robustboard.attacks.kernels import ensembles
from robustboard.attacks.threat import ThreatModel
from robustboard.bench import curve as curves
from robustboard.bench import operations
from robustboard.bench.cli import app
from robustboard.bench.curve import bisection_order, parse_grid, trace
from robustboard.bench.datasets import from_arrays
from robustboard.bench.evaluate import evaluate
from robustboard.bench.process import WorkerProcess
from robustboard.bench.protocol import load_track, resolve, select
from robustboard.bench.recall import Located, bring_back, recall_entrant, recall_examples
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense
from robustboard.bench.session import LocalSession
from robustboard.defenses.adapter import NoProgress
from robustboard.errors import GateError, OutputError, TrackError

DATA = quadrants()
GRID = [ThreatModel("linf", Fraction(step, 100)) for step in (3, 6, 9, 10, 11)]


def network() -> nn.Module:
    """A small network with hidden units, so that IBP leaves a gap to the attacks; trained for some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    images, labels = torch.from_numpy(DATA[0]).float() / 255, torch.from_numpy(DATA[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def no_square(monkeypatch):
    """The attacks less APGD-T and the thousands of Square queries, for what does not depend on them."""
    monkeypatch.setattr(ensembles, "STAGES", {"standard": ("apgd_ce", "fab_t")})


@pytest.fixture(scope="module")
def task():
    """A session with the network, its track and the examples."""
    track = robustboard.track_from(
        {
            "id": "quadrants-linf@1",
            "dataset": "arrays",
            "threat": {"norm": "linf", "eps": "9/100"},
            "n": 16,
            "batch_size": 16,
            "attacks": {"pgd": {"steps": 10, "restarts": 1}},
            "bounds": {"methods": ["ibp"]},
            "audit": {"certified_sample": 2, "smallest_margins": 2},
            "corruptions": {"names": ["contrast"], "severities": [1]},
        }
    )
    dataset = from_arrays(*DATA)
    track, examples = resolve(track, dataset), select(track, dataset)
    return LocalSession(network(), torch.device("cpu")), track, examples


def alone(session, track, examples, threat):
    """The outcomes of a run at one radius by itself."""
    return evaluate(session, track.model_copy(update={"threat": threat}), examples).outcomes


def test_reused_verdicts_are_those_of_a_run_at_each_radius(task, no_square):
    session, track, examples = task
    traced = trace(session, track, examples, GRID)
    seen, attacked = set(), 0
    for place, threat in enumerate(GRID):
        outcomes = alone(session, track, examples, threat)
        assert traced.verdict(place) == outcomes["verdict"].tolist(), threat.text
        seen |= set(outcomes["verdict"])
        attacked += outcomes["fab_t"].notna().sum()
    assert seen >= {"broken", "certified", "undecided"}, "the test must see all of the sandwich"
    assert 0 < traced.attacked < attacked
    assert traced.judged < 0.7 * traced.clean.sum() * len(GRID)
    assert traced.audit.broken_bounded == (traced.broken < len(GRID)).sum()
    assert traced.audit.certified_attacked == min(4, (traced.certified >= 0).sum())


def test_a_trace_repeats_and_a_part_of_the_grid_says_the_same(task, monkeypatch):
    monkeypatch.setattr(ensembles, "STAGES", {"standard": ("apgd_ce",)})
    session, track, examples = task
    first, part = trace(session, track, examples, GRID), trace(session, track, examples, GRID[1::2])
    again = trace(session, track, examples, GRID[1::2])
    for place in range(2):
        assert again.verdict(place) == part.verdict(place) == first.verdict(1 + 2 * place)


def test_bounds_on_half_the_ball_are_caught(task, no_square, monkeypatch):
    real = bounds.certify

    def half(*args, threat, **kwargs):
        return real(*args, threat=threat.scaled(Fraction(1, 2)), **kwargs)

    monkeypatch.setattr(operations.bounds, "certify", half)
    with pytest.raises(GateError, match=r"^Gate: .*certified") as caught:
        trace(*task, GRID)
    assert caught.value.exit_code == 1


def test_certified_at_a_larger_radius_and_broken_at_a_smaller_is_a_contradiction(task, monkeypatch):
    """The image that breaks the first example at the last radius lies within the second; the third was certified."""
    order = []

    def scripted(examiner, verdicts, *, unbounded, spared):
        del unbounded, spared
        order.append(examiner.threat.text)
        row = np.flatnonzero(examiner.labels >= 0)[0]
        if examiner.threat == GRID[2]:
            verdicts.certified_by[row], verdicts.margins[row] = "crown", 0.1
        if examiner.threat == GRID[-1]:
            verdicts.broken_by[row] = "pgd"
            verdicts.adversarial[int(row)] = examiner.images[row] + np.float32(0.05)

    monkeypatch.setattr(curves, "settle", scripted)
    words = r"example [0-9a-f]{12} is certified at eps 9/100 by crown and broken at 3/50 by pgd"
    with pytest.raises(GateError, match=words):
        trace(*task, GRID)
    assert order[0] == "9/100", "the middle of the grid comes first"


@given(st.integers(0, 300))
def test_every_radius_has_its_turn_once(count):
    assert sorted(bisection_order(count)) == list(range(count))


def test_the_grid_is_read_as_exact_fractions_in_any_order():
    track = load_track("digits-linf@1")
    found = parse_grid(["1/10", "0.05", "8/255"], track)
    assert [threat.text for threat in found] == ["8/255", "1/20", "1/10"]
    default = [threat.eps for threat in parse_grid([], track)]
    assert default == [Fraction(step, 40) for step in range(1, 9)]
    wide = track.model_copy(update={"threat": ThreatModel("linf", Fraction(3, 4))})
    assert max(threat.eps for threat in parse_grid([], wide)) <= 1


@pytest.mark.parametrize(
    ("grid", "words"),
    [(["1/10", "0.1"], "names the radius 1/10 twice"), (["0"], "positive"), (["x"], "fraction"), (["2"], "too large")],
)
def test_a_wrong_grid_is_one_sentence(grid, words):
    with pytest.raises(TrackError, match=words):
        parse_grid(grid, load_track("digits-linf@1"))


def test_the_command_writes_the_same_drawing_and_numbers_each_time(
    make_submission, quadrant_track, tmp_path, monkeypatch
):
    """A submission, in a process of its own; one process serves both runs."""
    words = ["curve", str(make_submission()), "--track", str(quadrant_track), "--eps", "1/40,1/20", "--n", "4"]
    runs = [tmp_path / "one", tmp_path / "two"]
    with WorkerProcess() as worker:
        monkeypatch.setattr(curves, "WorkerProcess", lambda **_: nullcontext(worker))
        for folder in runs:
            out = [part for name in ("c.svg", "c.json") for part in ("--out", str(folder / name))]
            result = CliRunner().invoke(app, [*words, *out, "--threads", "1"])
            assert result.exit_code == 0, result.output
            assert "every attack ran" in result.output
    for name in ("c.svg", "c.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    content = json.loads((runs[0] / "c.json").read_text())
    assert [point["eps"] for point in content["points"]] == ["1/40", "1/20"]
    assert len(content["examples"]) == content["n"] == 4


def test_another_ending_is_refused_before_any_work():
    result = CliRunner().invoke(app, ["curve", "standard", "--track", "digits-linf@1", "--out", "curve.png"])
    assert isinstance(result.exception, OutputError)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "run_curve", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    for out in (tmp_path / "file" / "curve.svg", tmp_path / "folder.svg"):
        result = CliRunner().invoke(app, ["curve", "standard", "--track", "digits-linf@1", "--out", str(out)])
        assert isinstance(result.exception, OutputError), result.exception
        assert "cannot be made" in str(result.exception)


def test_a_curve_that_cannot_be_written_after_all_is_printed(make_submission, quadrant_track, tmp_path, monkeypatch):
    words = ["curve", str(make_submission()), "--track", str(quadrant_track), "--eps", "1/40", "--n", "2"]

    def full(path, text):
        raise OutputError(f"{path} cannot be written: No space left on device.")

    monkeypatch.setattr("robustboard.files.write_text", full)
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "c.json"), "--threads", "1", "--json"])
    assert isinstance(result.exception, OutputError)
    assert [point["eps"] for point in json.loads(result.stdout)["points"]] == ["1/40"]


@pytest.mark.slow
def test_reused_verdicts_of_a_trained_defense_are_those_of_whole_runs(tmp_path):
    """The whole protocol on an adversarially trained network: minutes."""
    scored = score_defense(Request(defense="pgd-at", track="digits-linf@1", n=30, threads=1, run_dir=tmp_path))
    located = Located(scored.record, scored.folder, tmp_path)
    recalled = recall_examples(scored.record)
    with WorkerProcess() as worker:
        bring_back(worker, located, recall_entrant(scored.record, recalled), NoProgress())
        grid = parse_grid([], recalled.track)
        traced = trace(worker, recalled.track, recalled.examples, grid)
        for place, threat in enumerate(grid):
            outcomes = alone(worker, recalled.track, recalled.examples, threat)
            assert traced.verdict(place) == outcomes["verdict"].tolist(), threat.text
