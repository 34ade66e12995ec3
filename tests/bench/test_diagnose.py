"""The diagnostics on a trained network behind every mask, on the network itself, and against the gate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from robustboard.attacks.threat import ThreatModel
from robustboard.bench import surrogates as surrogates_module
from robustboard.bench.cascade import _clean, _pgd
from robustboard.bench.crossed_audit import Audit
from robustboard.bench.datasets import load_dataset
from robustboard.bench.diagnose import breaks_contract, chosen_rows, diagnose
from robustboard.bench.evaluate import _gate, evaluate
from robustboard.bench.examiner import Examiner
from robustboard.bench.masks import MASKS
from robustboard.bench.measures import MEASURES
from robustboard.bench.operations import Reply
from robustboard.bench.protocol import load_track, select, training_data
from robustboard.bench.session import LocalSession
from robustboard.bench.surrogates import surrogates_of, transferred
from robustboard.bench.verdicts import Verdicts
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress
from robustboard.errors import GateError, ModelError, WorkerError
from robustboard.leaderboard.findings import Diagnosis

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    track = load_track("digits-linf@1").limited(100)
    small = {"bounds": track.bounds.model_copy(update={"methods": ()})}
    small["corruptions"] = track.corruptions.model_copy(update={"names": ()})
    dataset = load_dataset(track.dataset)
    track = track.model_copy(update=small)
    return track, select(track, dataset), training_data(track, dataset)


@pytest.fixture(scope="module")
def train(digits):
    track, _, data = digits

    def fit(name: str, **overrides: object) -> nn.Module:
        return registry.create(name, overrides).fit(
            data, track.threat, seed=0, device=CPU, progress=NoProgress(), checkpoints=CheckpointStore()
        )

    return fit


@pytest.fixture(scope="module")
def network(train):
    return train("standard", epochs=20)


@pytest.fixture(scope="module")
def surrogates(digits):
    track, _, data = digits
    return surrogates_of(data, track.threat)


def _examined(model: nn.Module, digits) -> tuple[Examiner, Verdicts]:
    """An evaluation up to its first attack: what the diagnostics compare with."""
    track, examples, _ = digits
    examiner = Examiner(LocalSession(model, CPU), track, examples, NoProgress())
    verdicts = Verdicts(examples.hashes, examples.labels)
    examiner.check()
    _clean(examiner, verdicts)
    pgd = track.attacks.pgd
    _pgd(examiner, verdicts, verdicts.clean, range(pgd.restarts * len(pgd.losses)))
    return examiner, verdicts


def _spoke(diagnosis: Diagnosis) -> dict[str, str]:
    return {one.name: one.verdict for one in diagnosis.findings if one.verdict in ("suspicious", "invalid")}


STATUS = MappingProxyType(
    {
        "inner-clamp": "suspicious",
        "input-quantisation": "suspicious",
        "noise": "invalid",
        "logit-scale-1000": "ok",
        "stop-gradient": "suspicious",
        "detached-input": "invalid",
        "autograd-detector": "invalid",
    }
)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_a_mask_is_seen_for_the_right_reason(name, network, digits, surrogates):
    torch.manual_seed(0)  # of the noise alone: everything of ours is keyed
    examiner, verdicts = _examined(MASKS[name].wrap(network), digits)
    diagnosis = diagnose(examiner, verdicts, lambda: surrogates).diagnosis
    assert MASKS[name].seen_by in _spoke(diagnosis)
    assert diagnosis.verdict != "ok"
    assert diagnosis.status == STATUS[name]
    assert breaks_contract(examiner) == (STATUS[name] == "invalid")
    assert bool(diagnosis.reasons) == (STATUS[name] != "ok")


def test_the_same_network_without_a_mask_is_clear(network, digits, surrogates):
    examiner, verdicts = _examined(network, digits)
    first = diagnose(examiner, verdicts, lambda: surrogates)
    assert _spoke(first.diagnosis) == {}
    assert first.contradictions == ()
    assert first.diagnosis.examples == 64
    again = diagnose(*_examined(network, digits), lambda: surrogates)
    assert again == first, "all draws are keyed, so that a diagnosis repeats to the last digit"


def test_a_distilled_network_is_flagged_and_its_number_stands(train, digits, surrogates):
    examiner, verdicts = _examined(train("distillation", epochs=40), digits)
    diagnosis = diagnose(examiner, verdicts, lambda: surrogates).diagnosis
    assert {"saturated-softmax", "loss-gap"} <= set(_spoke(diagnosis))
    assert (diagnosis.verdict, diagnosis.status) == ("suspicious", "ok")
    assert len(diagnosis.flags) >= 2


def test_examples_are_drawn_before_any_attack(network, digits):
    """The subset is the same whatever the attacks broke: nothing has thinned it."""
    examiner, verdicts = _examined(network, digits)
    rows = chosen_rows(examiner, verdicts)
    assert verdicts.clean[rows].all()
    assert verdicts.broken[rows].any()
    assert (~verdicts.broken[rows]).any()
    fresh = Verdicts(examiner.examples.hashes, examiner.labels)
    fresh.clean = verdicts.clean.copy()
    np.testing.assert_array_equal(chosen_rows(examiner, fresh), rows)


def test_breaking_a_certified_example_fires_the_gate(network, digits):
    """Square and PGD break some of these; had a bound proved one of them, that would be a bug, and is not published."""
    examiner, verdicts = _examined(network, digits)
    untouched = Verdicts(examiner.examples.hashes, examiner.labels)
    untouched.clean = verdicts.clean.copy()
    untouched.certified_by = ["crown" if right else None for right in untouched.clean]
    found = diagnose(examiner, untouched, None)
    assert found.contradictions
    assert {one.broken_by for one in found.contradictions} == {"Square Attack"}
    audit = Audit(contradictions=list(found.contradictions))
    with pytest.raises(GateError, match="both certified and broken"):
        _gate(examiner, untouched, audit)


def test_without_correct_examples_nothing_is_measured(network, digits):
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images):
            logits = self.network(images)
            return logits * torch.where(logits == logits.amax(1, keepdim=True), -1.0, 1.0)

    examiner, verdicts = _examined(Wrong(), digits)
    verdicts.clean[:] = False
    diagnosis = diagnose(examiner, verdicts, None).diagnosis
    assert diagnosis.examples == 0
    assert {one.name for one in diagnosis.findings if one.verdict == "not run"} >= {"unbounded", "binarization"}


def test_a_measurement_that_the_model_does_not_bear_is_a_finding(network, digits, monkeypatch):
    examiner, verdicts = _examined(network, digits)

    def refuse(stage, questions):
        yield from (ModelError(f"The model's logits are not finite numbers in {name}.") for name, _ in questions)

    monkeypatch.setattr(examiner, "measures", refuse)
    diagnosis = diagnose(examiner, verdicts, None).diagnosis
    assert diagnosis.status == "suspicious"
    assert any("not finite numbers in unbounded" in reason for reason in diagnosis.reasons)


class FailsOnFaintImages(nn.Module):
    """Its code raises on what the measurements alone show it: pixels drawn in from the faces of the box."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images):
        if bool((images > 0).all()):
            raise IndexError("no such pixel")
        return self.network(images)


def test_a_models_own_error_in_a_measurement_is_a_finding(network, digits):
    examiner, verdicts = _examined(FailsOnFaintImages(network), digits)
    diagnosis = diagnose(examiner, verdicts, None).diagnosis
    found = {one.name: one for one in diagnosis.findings}["finite-differences"]
    assert found.verdict == "suspicious"
    assert "IndexError: no such pixel" in found.sentence


Change = Callable[[Reply], Reply]


def _told(**values: object) -> Change:
    """Other values than the model's process found; a name's underscores are spaces."""
    return lambda reply: replace(reply, values={**reply.values, **{k.replace("_", " "): v for k, v in values.items()}})


def _sent(**arrays: np.ndarray | None) -> Change:
    """Other arrays than the model's process found; None leaves one out."""
    return lambda reply: replace(
        reply, arrays={name: array for name, array in {**reply.arrays, **arrays}.items() if array is not None}
    )


def _silent(reply: Reply) -> Reply:
    return replace(reply, values={}, arrays={})


def _answering(session: LocalSession, measure: str, change: Change) -> LocalSession:
    """A session whose answer to one measurement is changed."""
    call = session.call

    def changed(operation: str, params: Mapping[str, Any], arrays: Mapping[str, np.ndarray], **options: Any) -> Reply:
        reply = call(operation, params, arrays, **options)
        return change(reply) if params.get("measure") == measure else reply

    session.call = changed
    return session


NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def few(digits, network):
    """Ten examples, attacked once."""
    track, _, data = digits
    track = track.limited(10)
    return _examined(network, (track, select(track, load_dataset(track.dataset)), data))


@pytest.mark.parametrize(
    ("measure", "change"),
    [
        *[(measure, _silent) for measure in MEASURES],
        ("autograd mode", _told(change=NAN)),
        ("autograd mode", _told(change=-1.0)),
        ("autograd mode", _told(change=True)),
        ("gradients", _told(zero_margin=NAN)),
        ("gradients", _told(zero_margin=1.5)),
        ("gradients", _told(median_gap=INF)),
        ("gradients", _told(mean_largest_logit=10**400)),
        ("gradients", _told(faces_alive=1, faces_dead=2)),
        ("gradients", _told(faces_alive=10**9)),
        ("gradients", _sent(steepest=None)),
        ("gradients", _sent(steepest=np.zeros(3))),
        ("gradients", _sent(random=np.zeros(10, dtype=np.int64))),
        ("losses", _told(ce=None)),
        ("losses", _told(dlr=11)),
        ("losses", _told(single_step=0.5)),
        ("unbounded", _told(survived="abc")),
        ("unbounded", _told(survived=-5)),
        ("unbounded", _told(survived=INF)),
        ("binarization", _told(built=2, found=3)),
        ("square", _sent(adversarial=np.zeros((10, 1, 8, 8), dtype=np.int64))),
        ("more work", _sent(adversarial=np.zeros((2, 2), dtype=np.float32))),
    ],
)
def test_an_answer_that_makes_no_sense_is_one_sentence(measure, change, few, network, monkeypatch):
    examiner, verdicts = few
    monkeypatch.setattr(examiner, "session", _answering(LocalSession(network, CPU), measure, change))
    with pytest.raises(WorkerError, match=r"its answer is not used|the answer is not used"):
        diagnose(examiner, verdicts, None)


def test_slopes_that_are_no_numbers_differ(few, network, monkeypatch):
    examiner, verdicts = few
    change = _sent(steepest=np.full(len(chosen_rows(examiner, verdicts)), NAN))
    monkeypatch.setattr(examiner, "session", _answering(LocalSession(network, CPU), "gradients", change))
    found = {one.name: one for one in diagnose(examiner, verdicts, None).diagnosis.findings}["finite-differences"]
    assert found.verdict == "suspicious"
    assert found.evidence["differ"] == found.evidence["n"]
    assert found.evidence["median departure along the gradient"] == 2.0


def test_a_random_model_is_judged_but_never_bounded(network, digits):
    """The verdict is possible and means nothing: the record is invalid, with its evidence, and nothing is proved."""
    bounded = digits[0].limited(20).model_copy(update={"bounds": load_track("digits-linf@1").bounds})
    part = select(bounded, load_dataset(bounded.dataset))
    found = evaluate(LocalSession(MASKS["noise"].wrap(network), CPU), bounded, part)
    assert found.diagnosis.status == "invalid"
    assert found.bound_methods == ()
    assert not found.outcomes["certified"].any()
    assert any("Bounds were not run" in note for note in found.notes)
    assert [warning.check for warning in found.warnings if warning.stage == "checks"] == ["randomised"]


def test_surrogates_follow_from_the_training_data(digits, surrogates, tmp_path):
    track, _, data = digits
    assert [one.name for one in surrogates] == ["standard", "fgsm-at"]
    kept = surrogates_of(data, track.threat, folder=tmp_path)
    found = surrogates_of(data, track.threat, folder=tmp_path)
    assert [one.sha256 for one in kept] == [one.sha256 for one in found] == [one.sha256 for one in surrogates]


def test_jobs_in_threads_train_surrogates_one_after_the_other(digits, monkeypatch):
    """They share torch's generators and its thread count: at once, each would get other weights than alone."""
    busy, overlaps = threading.Lock(), []

    def train(name, settings, data, threat, folder, progress):
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.02)
        if not overlaps[-1]:
            busy.release()
        return name

    monkeypatch.setattr(surrogates_module, "_train", train)
    track, _, data = digits
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: surrogates_of(data, track.threat), range(4)))
    assert found == [surrogates_module.RECIPES] * 4
    assert not any(overlaps)


def test_transferred_images_stay_in_the_ball(digits, surrogates):
    examples = digits[1]
    images, labels = examples.tensor()[:20], torch.from_numpy(examples.labels[:20])
    for norm, eps in (("linf", "1/10"), ("l2", "1/2")):
        threat = ThreatModel.parse(norm, eps)
        found = transferred(surrogates[0], images, labels, threat=threat, keys=examples.hashes[:20])
        assert bool(threat.contains(found, images).all())
        with torch.no_grad():
            assert (surrogates[0].model(found).argmax(1) != labels).float().mean() > 0.3


@pytest.mark.parametrize("name", sorted(set(MASKS) - {"noise", "input-quantisation"}))
def test_a_mask_changes_no_prediction(name, network, digits):
    """The network behind it is as weak as before: only the adversary's view is spoiled."""
    images = digits[1].tensor()
    with torch.inference_mode():
        assert torch.equal(MASKS[name].wrap(network)(images).argmax(1), network(images).argmax(1))
