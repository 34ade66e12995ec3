"""Complete verification in the evaluation: nothing stays undecided, and the gate watches it like anything else."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import robustboard
from robustboard.attacks.complete import verify
from robustboard.attacks.kernels import ensembles
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense
from robustboard.errors import GateError
from robustboard.leaderboard.record import load, save
from robustboard.leaderboard.site import render_site

NODES = 20_000
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10))
"""


def _track(**changes):
    content = {
        "id": "complete-linf@1",
        "dataset": "arrays",
        "threat": {"norm": "linf", "eps": "1/10"},
        "n": 40,
        "batch_size": 15,
        # A weak attack and one bound leave both kinds of examples open.
        "attacks": {"pgd": {"steps": 1, "restarts": 1}},
        "bounds": {"methods": ["ibp"]},
        "corruptions": {"names": ["contrast"], "severities": [1]},
    }
    return robustboard.track_from(content | changes)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = np.round(data.images[:, None] * 255 / 16).astype(np.uint8)
    return images[:60], data.target[:60].astype(np.int64), images[60:], data.target[60:]


@pytest.fixture(scope="module")
def model(digits):
    """A small network after adversarial training."""
    images, labels = torch.from_numpy(digits[2]).float() / 255, torch.from_numpy(digits[3])
    threat = ThreatModel.parse("linf", "1/10")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space: dict[str, object] = {}
        exec(MODEL, space)
        network = space["build"]()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(8):
            for batch in torch.randperm(len(labels)).split(128):
                part, own = images[batch], labels[batch]
                bad = ascend(network, part, own, threat=threat, start=part, steps=2, step_size=0.07)
                optimizer.zero_grad()
                functional.cross_entropy(network(bad), own).backward()
                optimizer.step()
    return network.eval()


@pytest.fixture(autouse=True)
def _weak_attacks_alone(monkeypatch):
    """The other attacks would leave complete verification no counter-example to find, and take most of the time."""
    monkeypatch.setattr(ensembles, "STAGES", {"standard": ()})


@pytest.fixture(scope="module")
def record(model, digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensembles, "STAGES", {"standard": ()})
        return robustboard.score(model, track=_track(), data=digits[:2], complete=NODES)


def test_nothing_stays_undecided(record, model, digits):
    before = robustboard.score(model, track=_track(), data=digits[:2])
    assert before.metrics["undecided"].value > 0.3, "the test needs examples that only complete verification settles"
    assert record.metrics["undecided"].value == 0
    assert not any("left examples open" in note for note in record.notes)
    assert (
        record.metrics["certified"].value == record.metrics["robust"].value == record.metrics["robust/complete"].value
    )
    outcomes = record.outcomes
    assert (outcomes["broken_by"] == "complete").sum() >= 3
    assert (outcomes["certified_by"] == "complete-bab").sum() >= 3
    named = (outcomes["broken_by"] == "complete").fillna(value=False)
    assert (~outcomes["complete"].fillna(value=True)).tolist() == named.tolist()
    settled = before.outcomes["verdict"] != "undecided"
    assert outcomes.loc[settled, "verdict"].equals(before.outcomes.loc[settled, "verdict"])


def test_the_record_says_what_ran(record, model, digits, tmp_path):
    assert record.effort == {"complete_nodes": NODES}
    assert "complete-bab" in record.bound_methods
    assert record.cost["complete"].seconds > 0
    assert record.audit.broken_bounded == 5
    saved = save(record, record.outcomes, tmp_path)
    assert load(tmp_path) == saved
    assert "complete-bab" in "".join(str(page) for page in render_site([saved]).values())
    without = robustboard.score(model, track=_track(), data=digits[:2])
    assert without.effort == {}
    assert "complete" not in without.outcomes
    assert without.track.hash == record.track.hash


def test_verdicts_do_not_depend_on_the_order_or_the_batches(record, model, digits):
    order = np.random.default_rng(1).permutation(60)
    data = digits[0][order], digits[1][order]
    again = robustboard.score(model, track=_track(batch_size=7), data=data, complete=NODES)
    columns = ["example", "verdict", "broken_by", "certified_by", "margin_lower"]
    first, second = (one.outcomes.sort_values("example", ignore_index=True)[columns] for one in (record, again))
    assert first.equals(second)


def test_a_small_budget_leaves_examples_open_with_a_note(model, digits):
    record = robustboard.score(model, track=_track(n=60), data=digits[:2], complete=10)
    assert record.metrics["undecided"].value > 0
    assert "Complete verification left examples open because their nodes were used up." in record.notes


def _of(factor):
    settle = verify.settle
    return lambda *args, threat, **kw: settle(*args, threat=threat.scaled(Fraction(*factor)), **kw)


def test_the_gate_fires_on_a_verifier_of_half_the_ball(model, digits, monkeypatch):
    """The crossed audit asks it about what PGD broke."""
    track = _track(attacks={"pgd": {"steps": 20, "restarts": 2}})
    monkeypatch.setattr(verify, "settle", _of((1, 2)))
    with pytest.raises(GateError, match=r"both certified and broken \(by complete-bab and pgd\)"):
        robustboard.score(model, track=track, data=digits[:2], complete=NODES)


def test_the_gate_fires_on_a_counter_example_outside_the_ball(model, digits, monkeypatch):
    monkeypatch.setattr(verify, "settle", _of((11, 10)))
    with pytest.raises(GateError, match="complete verification left the linf ball of radius 1/10"):
        robustboard.score(model, track=_track(), data=digits[:2], complete=NODES)


def test_a_counter_example_that_does_not_hold_breaks_nothing(model, digits, monkeypatch):
    settle = verify.settle

    def unconfirmed(model, images, *args, **kw):
        found = settle(model, images, *args, **kw)
        found.adversarial.copy_(images)
        return found

    monkeypatch.setattr(verify, "settle", unconfirmed)
    record = robustboard.score(model, track=_track(), data=digits[:2], complete=NODES)
    assert record.metrics["undecided"].value > 0
    assert not (record.outcomes["broken_by"] == "complete").any()


def test_a_network_that_cannot_be_verified_stays_undecided_with_the_reason(model, digits):
    record = robustboard.score(nn.Sequential(model, nn.Tanh()).eval(), track=_track(), data=digits[:2], complete=NODES)
    assert record.metrics["undecided"].value > 0
    assert "complete" not in record.outcomes
    assert "Complete verification does not know the operation Tanh." in record.notes


def test_the_worker_and_a_notebook_agree(model, digits, make_submission, tmp_path):
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    manifest = make_submission(MODEL, name="small-mlp", weights=weights)
    np.savez(tmp_path / "data.npz", images=digits[0], labels=digits[1])
    text = """
id = "complete-linf@1"
dataset = {npz = "data.npz"}
threat = {norm = "linf", eps = "1/10"}
n = 20
[attacks.pgd]
steps = 1
restarts = 1
[bounds]
methods = ["ibp"]
[corruptions]
names = ["contrast"]
severities = [1]
"""
    (tmp_path / "track.toml").write_text(text)
    request = Request(
        str(manifest), tmp_path / "track.toml", threads=1, complete=500, runs=tmp_path / "runs", load_seconds=120
    )
    scored = score_defense(request)
    assert scored.folder.parent.name.endswith("-complete-500")
    assert scored.record.effort == {"complete_nodes": 500}
    here = robustboard.score(model, track=tmp_path / "track.toml", complete=500)
    columns = ["example", "verdict", "certified_by", "broken_by"]
    assert scored.record.outcomes[columns].equals(here.outcomes[columns])
    assert here.outcomes["certified_by"].str.startswith("complete").any()
