"""The evaluation on a network whose true robustness is known: a linear one, where the distance is a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from quadrants import QuadrantNet, quadrants
from torch import nn

import robustboard
from robustboard.attacks import bounds
from robustboard.attacks.kernels import ensembles
from robustboard.attacks.keyed import content_hash
from robustboard.attacks.threat import ThreatModel
from robustboard.bench import operations, verdicts
from robustboard.bench.operations import Reply
from robustboard.bench.session import LocalSession
from robustboard.errors import GateError, ModelError, WorkerError

DATA = quadrants()


def _track(**changes):
    content = {
        "id": "quadrants-linf@1",
        "dataset": "arrays",
        "threat": {"norm": "linf", "eps": "1/20"},
        "n": 40,
        "corruptions": {"names": ["gaussian_noise"], "severities": [1, 5]},
        **changes,
    }
    return robustboard.track_from(content)


def _true_radius() -> np.ndarray:
    """The L-inf distance to the decision boundary of each image: half the lead of its quadrant's mean brightness."""
    images, labels = DATA
    means = images.reshape(-1, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(-1, 4) / 255
    own = means[np.arange(len(labels)), labels]
    means[np.arange(len(labels)), labels] = -np.inf
    return (own - means.max(axis=1)) / 2


@pytest.fixture(scope="module")
def record():
    return robustboard.score(QuadrantNet(), track=_track(), data=DATA)


def test_verdicts_are_the_truth(record):
    """CROWN is exact on a linear network, so every example is settled as its distance to the boundary says."""
    radius = _true_radius()
    truth = np.where(radius > 0.05, "certified", "broken")
    truth[radius <= 0] = "misclassified"
    by_rank = record.outcomes.set_index("example")["verdict"]
    found = np.array([by_rank[content_hash(image)] for image in DATA[0]])
    np.testing.assert_array_equal(found, truth)
    assert set(truth) >= {"certified", "broken"}, "the test data must hold both"


def test_the_sandwich_holds(record):
    values = {name: metric.value for name, metric in record.metrics.items()}
    assert values["certified"] <= values["robust"] <= values["pgd"] <= values["clean"]


def test_the_audit_crosses_what_the_cascade_skipped(record):
    assert record.audit.broken_bounded == min(5, (record.outcomes["verdict"] == "broken").sum())
    assert record.audit.certified_attacked == min(120, (record.outcomes["verdict"] == "certified").sum())
    checks = record.audit.broken_bounded + record.audit.certified_attacked
    assert record.audit.upper_limit == pytest.approx(3 / checks)


def test_the_reference_engine_attacks_every_correct_example():
    reference = robustboard.score(QuadrantNet(), track=_track(), data=DATA, engine="reference")
    outcomes = reference.outcomes
    assert outcomes["autoattack"].notna().equals(outcomes["clean"])
    assert reference.metrics["autoattack"].value == reference.metrics["robust"].value == (_true_radius() > 0.05).mean()


def test_the_cascade_never_claims_autoattack(record):
    assert "autoattack" not in record.metrics
    assert record.outcomes["autoattack"].isna().all()


def test_verdicts_do_not_depend_on_the_order_of_the_data(record):
    images, labels = DATA
    order = np.random.default_rng(1).permutation(len(labels))
    again = robustboard.score(QuadrantNet(), track=_track(), data=(images[order], labels[order]))
    by_content = [
        one.outcomes.sort_values("example", ignore_index=True).drop(columns="index") for one in (again, record)
    ]
    assert by_content[0].equals(by_content[1])


def _half(certify):
    return lambda *args, threat, **kw: certify(*args, threat=threat.scaled(Fraction(1, 2)), **kw)


def test_the_gate_fires_on_a_verifier_of_half_the_ball(monkeypatch):
    monkeypatch.setattr(bounds, "certify", _half(bounds.certify))
    with pytest.raises(GateError, match=r"example.*both certified and broken \(by \S+ and pgd\)"):
        robustboard.score(QuadrantNet(), track=_track(), data=DATA)


def _wide(pgd):
    return lambda *args, threat, **kw: pgd(*args, threat=threat.scaled(Fraction(11, 10)), **kw)


def test_the_gate_fires_on_an_attack_that_leaves_the_ball(monkeypatch):
    monkeypatch.setattr(operations, "pgd", _wide(operations.pgd))
    with pytest.raises(GateError, match="PGD left the linf ball of radius 1/20 on example"):
        robustboard.score(QuadrantNet(), track=_track(), data=DATA)


def test_the_gate_fires_even_when_the_ball_check_is_wrong_too(monkeypatch):
    """The bounds do not rely on the ball check: they contradict an example of 1.1 eps by themselves."""
    contains = ThreatModel.contains
    monkeypatch.setattr(operations, "pgd", _wide(operations.pgd))
    monkeypatch.setattr(
        ThreatModel, "contains", lambda self, found, images: contains(self.scaled(Fraction(11, 10)), found, images)
    )
    with pytest.raises(GateError, match="both certified and broken"):
        robustboard.score(QuadrantNet(), track=_track(), data=DATA)


class NanOnBright(QuadrantNet):
    """A model that answers NaN for the perturbed images only."""

    def forward(self, x):
        logits = super().forward(x)
        bright = (x.flatten(1).amax(1) * 255).frac() > 1e-3
        return torch.where(bright.view(-1, 1), torch.nan, logits)


def test_nan_under_attack_stops_the_run():
    with pytest.raises(ModelError, match="not finite"):
        robustboard.score(NanOnBright(), track=_track(), data=DATA)


class Noisy(QuadrantNet):
    """Another answer each time, on the same image."""

    def forward(self, x):
        return super().forward(x + 0.02 * torch.randn_like(x))


def test_a_model_that_breaks_the_contract_is_recorded_as_invalid():
    """Its number is written down with the reason why it means nothing; no bound is claimed for it."""
    torch.manual_seed(0)
    record = robustboard.score(Noisy(), track=_track(), data=DATA)
    assert record.status == "invalid"
    assert "draws at random" in record.reasons[0]
    assert record.bound_methods == ()
    assert record.metrics["certified"].value == 0
    warnings = record.diagnostics["autoattack"]
    assert {"stage": "checks", "check": "randomised"}.items() <= warnings[0].items()


def test_an_honest_network_is_ok_with_its_evidence(record):
    assert (record.status, record.reasons) == ("ok", ())
    findings = {one["name"]: one for one in record.diagnostics["gradients"]["findings"]}
    assert findings["unbounded"]["evidence"] == {"n": int(record.outcomes["clean"].sum()), "survived": 0}
    assert findings["transfer"]["verdict"] == "not run", "four-line data has no training images"
    assert record.cost["diagnostics"].forwards > 1000


def test_two_classes_run_without_the_attack_that_needs_four():
    images, labels = DATA

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = QuadrantNet()

        def forward(self, x):
            logits = self.net(x)
            return torch.stack([logits[:, :2].amax(1), logits[:, 2:].amax(1)], dim=1)

    record = robustboard.score(Two(), track=_track(), data=(images, labels // 2), engine="reference")
    assert record.outcomes["apgd_t"].isna().all()
    assert record.outcomes["square"].notna().any()
    assert "autoattack" not in record.metrics


def _lying(monkeypatch, operation: str, change: Callable[[Reply], Reply], *, after: int = 0) -> None:
    """Let every session change its answers to one operation, from some call on."""
    call, asked = LocalSession.call, []

    def changed(self, name, params, arrays, **options):
        reply = call(self, name, params, arrays, **options)
        asked.extend([name] * (name == operation))
        return change(reply) if name == operation and len(asked) > after else reply

    monkeypatch.setattr(LocalSession, "call", changed)


def _told(**values: object) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, values={**reply.values, **values})


def _behaves(**values: object) -> Callable[[Reply], Reply]:
    return lambda reply: _told(behaviour={**reply.values["behaviour"], **values})(reply)


def _sent(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Reply], Reply]:
    return lambda reply: replace(reply, arrays={**reply.arrays, name: change(reply.arrays[name])})


def _silent(reply: Reply) -> Reply:
    return replace(reply, values={}, arrays={})


def _hidden() -> nn.Module:
    """The same function with a hidden layer, for complete verification is of networks with ReLUs."""
    net = QuadrantNet()
    last = nn.Linear(16, 4)
    last.load_state_dict(net.layer.state_dict())
    identity = nn.Linear(16, 16)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(16))
        identity.bias.zero_()
    return nn.Sequential(nn.Flatten(), identity, nn.ReLU(), last)


def _quick(operation: str, monkeypatch):
    """A run that is short and asks for the operation; complete verification is asked where nothing else proves."""
    if operation != "attack":
        monkeypatch.setattr(ensembles, "STAGES", {"standard": ()})
    if operation == "complete":
        monkeypatch.setattr(verdicts.Verdicts, "bounded", _none_but_complete(verdicts.Verdicts.bounded))
    return _track(n=8, attacks={"pgd": {"steps": 1, "restarts": 1}}, bounds={"methods": ["ibp"]})


def _none_but_complete(bounded):
    def enter(self, method, rows, certified, margins):
        bounded(self, method, rows, certified & method.startswith("complete"), margins)

    return enter


@pytest.mark.parametrize(
    ("operation", "change"),
    [
        *[
            (operation, _silent)
            for operation in ("check", "reference_checks", "predict", "pgd", "certify", "attack", "complete")
        ],
        ("check", _told(behaviour=None)),
        ("check", _told(own_bounds="all")),
        ("check", _behaves(repeat_change=float("nan"))),
        ("check", _behaves(autograd_change=float("inf"))),
        ("check", _behaves(batch_change=-1.0)),
        ("check", _behaves(batch_change=True)),
        ("check", _behaves(gradient="x\n" * 10_000)),
        ("reference_checks", _told(warnings=None)),
        ("reference_checks", _told(warnings=[1, 2])),
        ("reference_checks", _told(warnings=["x" * 10_000])),
        ("attack", _sent("adversarial", lambda images: images[:, :, 1:])),
        ("predict", _sent("logits", lambda logits: logits > 0)),
        ("pgd", _sent("adversarial", lambda images: images.astype(np.float64))),
        ("pgd", _sent("adversarial", lambda images: images[1:])),
        ("certify", _told(notes=None)),
        ("certify", _sent("certified", lambda certified: certified.astype(np.float32))),
        ("certify", _sent("margins", lambda margins: margins[:, 1:])),
        ("certify", _sent("excluded", lambda excluded: excluded[:, 1:])),
        ("complete", _told(notes=[None])),
        ("complete", _told(methods=[])),
    ],
)
def test_an_answer_that_makes_no_sense_is_one_sentence(operation, change, monkeypatch):
    """What a stranger's process says is believed in nothing, not even in being there."""
    track = _quick(operation, monkeypatch)
    _lying(monkeypatch, operation, change)
    with pytest.raises(WorkerError, match=r"not used|did not say how it verified") as caught:
        robustboard.score(_hidden(), track=track, data=DATA, complete=10)
    assert len(str(caught.value)) < 200


def test_bounds_that_are_no_numbers_certify_nothing(monkeypatch):
    def nothing(reply: Reply) -> Reply:
        lies = {"margins": reply.arrays["margins"] * np.nan, "certified": np.ones_like(reply.arrays["certified"])}
        return replace(reply, arrays={**reply.arrays, **lies})

    _lying(monkeypatch, "certify", nothing)
    with pytest.raises(WorkerError, match="no numbers"):
        robustboard.score(QuadrantNet(), track=_track(), data=DATA)


def test_a_method_that_is_wrong_of_one_example_proves_nothing_of_any(monkeypatch):
    """Whatever part of the examples the wrong bound was found in, and however they are parted."""
    _lying(monkeypatch, "certify", _told(wrong=True), after=1)
    record = robustboard.score(QuadrantNet(), track=_track(batch_size=10), data=DATA)
    assert not record.outcomes["certified"].any()


def test_the_gate_fires_on_bounds_that_certified_before_they_were_seen_to_be_wrong(monkeypatch):
    _lying(monkeypatch, "certify", _told(wrong=True), after=1)
    with pytest.raises(GateError, match="ibp bounds certified examples, and contradict"):
        robustboard.score(QuadrantNet(), track=_track(), data=DATA)


def test_more_notes_than_a_record_holds_are_left_out(monkeypatch):
    monkeypatch.setattr(ensembles, "STAGES", {"standard": ()})
    _lying(monkeypatch, "certify", _told(notes=[f"Note {number}." for number in range(500)]))
    record = robustboard.score(QuadrantNet(), track=_track(), data=DATA)
    assert 10 < len(record.notes) <= 100


def test_a_network_is_either_verified_or_not(monkeypatch):
    """Proofs that were entered before such an answer would stand in a record that names no method for them."""
    track = _quick("complete", monkeypatch)
    _lying(monkeypatch, "complete", _told(reason="It cannot be read."), after=1)
    with pytest.raises(WorkerError, match="none can be verified"):
        robustboard.score(_hidden(), track=track, data=DATA, complete=10)
