"""Detection and false alarms: how they are counted, and (slow) what they are on trained panels."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from robustboard.bench.datasets import data_folders, load_dataset
from robustboard.bench.detection import HONEST, Case, Panel, _attacks_only, run_panel, show
from robustboard.bench.evaluate import evaluate
from robustboard.bench.masks import MASKS
from robustboard.bench.protocol import load_track, resolve, select, training_data
from robustboard.bench.session import LocalSession
from robustboard.bench.surrogates import surrogates_of
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.leaderboard.findings import Diagnosis, Finding

CPU = torch.device("cpu")


def _diagnosis(*spoke: str) -> Diagnosis:
    findings = [
        Finding(
            name=name,
            looks_for="It.",
            threshold="Then.",
            verdict="suspicious" if name in spoke else "ok",
            decides=True,
            sentence="Found.",
        )
        for name in ("zero-gradients", "unbounded", "transfer")
    ]
    return Diagnosis(version=1, examples=64, findings=tuple(findings))


@pytest.fixture
def panel() -> Panel:
    return Panel(
        "t@1",
        (
            Case("seen", 0, "zero-gradients", _diagnosis("zero-gradients", "unbounded")),
            Case("seen by another only", 0, "zero-gradients", _diagnosis("unbounded")),
            Case("missed", 0, "transfer", _diagnosis()),
            Case("honest", 0, None, _diagnosis()),
            Case("accused", 0, None, _diagnosis("transfer")),
        ),
    )


def test_only_the_right_reason_counts_as_detected(panel):
    assert (panel.detection.count, panel.detection.n) == (1, 3)
    assert (panel.false_alarms.count, panel.false_alarms.n) == (1, 2)
    assert panel.detection.interval == pytest.approx((0.0615, 0.7923), abs=1e-3)


def test_the_panel_is_printed_and_is_plain_json(panel):
    out = io.StringIO()
    show(panel, Console(file=out, width=200))
    assert "Detected for the right reason: 1 of 3 [6.1%, 79.2%]" in out.getvalue()
    assert "False alarms: 1 of 2" in out.getvalue()
    content = panel.as_json()
    assert content["detection"]["count"] == 1
    assert [case["right"] for case in content["cases"]] == [True, False, False, True, False]


@pytest.mark.slow
def test_the_digits_panel_is_told_apart(tmp_path):
    found = run_panel("digits-linf@1", seeds=[0], runs=tmp_path)
    assert {case.name for case in found.cases} >= {*MASKS, *HONEST, "distillation"}
    for case in found.cases:
        assert case.right, f"{case.name}: {case.spoke}"


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_on_mnist_raise_no_alarm(name, data_file, tmp_path):
    """Trained on a sixth of MNIST, four epochs: enough for each method to be itself."""
    data_file("mnist.npz")
    track = load_track("mnist-linf@1")
    dataset = load_dataset(track.dataset, data_dirs=data_folders(()))
    whole = training_data(track, dataset)
    part = TrainingData(
        whole.name,
        Split(whole.train.images[:10_000], whole.train.labels[:10_000]),
        Split(whole.validation.images[:1000], whole.validation.labels[:1000]),
        whole.classes,
    )
    model = registry.create(name, {**track.hyper.get(name, {}), "epochs": 4}).fit(
        part, track.threat, seed=0, device=CPU, progress=NoProgress(), checkpoints=CheckpointStore()
    )
    short = resolve(_attacks_only(track.limited(100)), dataset)
    surrogates = surrogates_of(whole, track.threat, folder=tmp_path)
    diagnosis = evaluate(
        LocalSession(model, CPU), short, select(short, dataset), surrogates=lambda: surrogates
    ).diagnosis
    assert [one.sentence for one in diagnosis.findings if one.speaks] == []
