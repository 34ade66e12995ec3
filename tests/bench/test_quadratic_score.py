"""A quadratic network on the board: certified by the board's own bounds, in this process and in the worker."""

from __future__ import annotations

from fractions import Fraction
from importlib import util

import numpy as np
import pytest
import torch
from quadrants import quadrant_weights, quadrants
from torch import nn

import robustboard
from robustboard.attacks import own_certificates
from robustboard.attacks.keyed import content_hash
from robustboard.attacks.quadratic import QuadraticNetwork
from robustboard.bench.process import WorkerProcess
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense
from robustboard.bench.session import LocalSession
from robustboard.errors import GateError
from robustboard.leaderboard.record import load
from robustboard.leaderboard.site import render_site

MODEL = """
import torch
from torch import nn
from robustboard.attacks.quadratic import QuadraticNetwork

def build():
    return nn.Sequential(nn.Flatten(), QuadraticNetwork(torch.zeros(8, 16), torch.zeros(8, 4)))
"""
DISGUISED = MODEL.replace("    return", "    class QuadraticNetwork(globals()['QuadraticNetwork']): pass\n    return")


DATA = quadrants()


def weights() -> dict[str, np.ndarray]:
    """The linear network that compares the quadrants, as a quadratic one: sigma(t) - sigma(-t) = 2 b t = t."""
    linear = quadrant_weights()["layer.weight"]
    return {
        "directions": np.concatenate([linear, -linear]),
        "offsets": np.zeros(8, dtype=np.float32),
        "outputs": np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32),
        "coefficients": np.array([0.09, 0.5, 0.47], dtype=np.float32),
    }


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), QuadraticNetwork(torch.zeros(8, 16), torch.zeros(8, 4)))
    model[1].load_state_dict({name: torch.from_numpy(value) for name, value in weights().items()})
    return model


def track(**changes: object) -> robustboard.Track:
    content = {
        "id": "quadrants-linf@1",
        "dataset": "arrays",
        "threat": {"norm": "linf", "eps": "1/20"},
        "n": 40,
        "corruptions": {"names": ["gaussian_noise"], "severities": [1]},
        "audit": {"certified_sample": 0, "smallest_margins": 0},
        **changes,
    }
    return robustboard.track_from(content)


def radii() -> np.ndarray:
    """The L-inf distance of each image to the decision boundary, negative where it is misclassified."""
    images, labels = DATA
    means = images.reshape(-1, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(-1, 4) / 255
    own = means[np.arange(len(labels)), labels]
    means[np.arange(len(labels)), labels] = -np.inf
    return (own - means.max(axis=1)) / 2


def metrics(record: robustboard.Record) -> dict[str, float]:
    return {name: metric.value for name, metric in record.metrics.items()}


def assert_sandwich(record: robustboard.Record) -> None:
    values = metrics(record)
    assert 0 < values["certified/quadratic"] == values["certified"] <= values["robust"] <= values["clean"]


@pytest.fixture(scope="module")
def record() -> robustboard.Record:
    audited = track(bounds={"methods": []}, audit={"certified_sample": 5, "smallest_margins": 5})
    return robustboard.score(network(), track=audited, data=DATA, name="quadratic")


def test_verdicts_are_the_truth(record):
    """The certificate alone settles what no attack breaks: on a linear function it is exact."""
    truth = np.where(radii() > 0.05, "certified", "broken")
    truth[radii() <= 0] = "misclassified"
    verdicts = record.outcomes.set_index("example")["verdict"]
    np.testing.assert_array_equal([verdicts[content_hash(image)] for image in DATA[0]], truth)
    assert set(truth) >= {"certified", "broken"}
    assert set(record.outcomes["certified_by"].dropna()) == {"quadratic"}


def test_the_method_is_named_wherever_a_method_is(record):
    assert record.bound_methods == ("quadratic",)
    assert_sandwich(record)
    assert any("Shor's relaxation" in note for note in record.notes)
    assert record.audit.certified_attacked == 10
    assert record.audit.broken_bounded == min(5, (record.outcomes["verdict"] == "broken").sum())
    pages = render_site([record])
    assert any(b"certified by quadratic" in page for page in pages.values())


@pytest.mark.skipif(util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
def test_it_runs_after_the_methods_of_the_track_and_leaves_the_track_alone():
    plain = track()
    record = robustboard.score(network(), track=plain, data=DATA)
    assert record.track.content["bounds"] == plain.frozen()["bounds"]
    assert record.bound_methods == ("ibp", "crown-ibp", "quadratic"), "CROWN cannot run on a quadratic activation"
    assert [note for note in record.notes if "CROWN" in note] == [
        "auto_LiRPA's CROWN and alpha-CROWN do not bound a quadratic activation."
    ]
    assert_sandwich(record)


def test_an_l2_track_is_certified_by_the_exact_ball():
    """On 8 x 8 images, which Square takes in L2; the gradient between two quadrants' means has length sqrt(2 / 16)."""
    images = DATA[0].repeat(2, axis=2).repeat(2, axis=3)
    linear = weights()["directions"][:4].reshape(4, 4, 4).repeat(2, axis=1).repeat(2, axis=2).reshape(4, 64) / 4
    model = nn.Sequential(
        nn.Flatten(),
        QuadraticNetwork(torch.from_numpy(np.concatenate([linear, -linear])), torch.from_numpy(weights()["outputs"])),
    )
    record = robustboard.score(
        model,
        track=track(id="quadrants-l2@1", threat={"norm": "l2", "eps": "1/4"}, bounds={"methods": []}),
        data=(images, DATA[1]),
    )
    by_hash = record.outcomes.set_index("example")["certified"]
    certified = np.array([by_hash[content_hash(image)] for image in images])
    np.testing.assert_array_equal(certified, 2 * radii() / np.sqrt(2 / 16) > 0.25)
    assert 0 < certified.sum() < 40
    assert_sandwich(record)


def test_other_networks_are_not_offered_it():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    hooked = network()
    hooked.register_forward_hook(lambda module, inputs, output: output)
    arrays = {"images": DATA[0][:4].astype(np.float32) / 255}
    for model, offered in ((network(), ["quadratic"]), (linear, []), (hooked, [])):
        session = LocalSession(model, torch.device("cpu"))
        assert session.call("check", {"classes": 4}, arrays).values["own_bounds"] == offered


def test_the_gate_fires_on_a_certificate_of_half_the_ball(monkeypatch):
    """The audit bounds what PGD broke with the board's own certificate too."""
    certify = own_certificates.certify
    monkeypatch.setattr(
        own_certificates,
        "certify",
        lambda *args, threat, **more: certify(*args, threat=threat.scaled(Fraction(1, 2)), **more),
    )
    with pytest.raises(GateError, match=r"both certified and broken \(by quadratic and pgd\)"):
        robustboard.score(network(), track=track(bounds={"methods": []}), data=DATA)


def test_a_submission_is_certified_in_its_own_process(make_submission, quadrant_track, tmp_path, record):
    with quadrant_track.open("a") as file:
        file.write('corruptions = {names = ["gaussian_noise"], severities = [1]}\n')
        file.write("bounds = {methods = []}\naudit = {certified_sample = 0, smallest_margins = 0}\n")
    state = {f"1.{name}": value for name, value in weights().items()}
    submitted = score_defense(
        Request(str(make_submission(MODEL, weights=state)), track=quadrant_track, threads=1, runs=tmp_path / "runs")
    )
    assert metrics(submitted.record) == metrics(record)
    assert_sandwich(load(submitted.folder))


def test_a_submission_in_disguise_is_not_offered_it(make_submission):
    state = {f"1.{name}": value for name, value in weights().items()}
    with WorkerProcess() as worker:
        worker.load(make_submission(DISGUISED, weights=state))
        reply = worker.call("check", {"classes": 4}, {"images": DATA[0][:4].astype(np.float32) / 255})
    assert reply.values["own_bounds"] == []
