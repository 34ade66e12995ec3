"""Our whole verdict (attacks, bounds, crossed audit, corruptions) beside AutoAttack alone, in one run on one machine.

Run with `make bench`. The ratio of the two times and both robust accuracies are printed after the table; nothing here
passes or fails on time.
"""

from __future__ import annotations

import time

import pytest
import torch

import robustboard
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.datasets import load_dataset
from robustboard.bench.protocol import load_track, select, training_data
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress

TRACK = "digits-linf@1"


@pytest.fixture(scope="module", params=["standard", "pgd-at", "crown-ibp"])
def network(request):
    track = load_track(TRACK)
    data = training_data(track, load_dataset(track.dataset))
    defense = registry.create(request.param, {})
    return request.param, defense.fit(
        data,
        track.threat,
        seed=0,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=CheckpointStore(None),
    )


def _reference_seconds(model: torch.nn.Module, threat: ThreatModel) -> tuple[float, float]:
    """Seconds of unmodified AutoAttack on all of the track's examples, and its robust accuracy."""
    from pyautoattack import AutoAttack

    examples = select(load_track(TRACK), load_dataset("digits"))
    labels = torch.from_numpy(examples.labels)
    attack = AutoAttack(model, norm="Linf", eps=float(threat.eps), seed=0, device="cpu")
    began = time.perf_counter()
    adversarial, _ = attack.run_standard_evaluation(examples.tensor(), labels, batch_size=360)
    seconds = time.perf_counter() - began
    return seconds, float((model(adversarial).argmax(1) == labels).float().mean())


@pytest.mark.benchmark(group="whole verdict on digits")
def test_our_verdict_beside_autoattack(benchmark, network):
    name, model = network
    torch.set_num_threads(1)
    record = benchmark.pedantic(lambda: robustboard.score(model, track=TRACK), rounds=3)
    reference, accuracy = _reference_seconds(model, load_track(TRACK).threat)
    benchmark.extra_info |= {
        "defense": name,
        "autoattack_seconds_over_ours": round(reference / benchmark.stats.stats.median, 2),
        "robust": record.metrics["robust"].value,
        "autoattack": accuracy,
    }
    # AutoAttack's own number is an upper limit for ours, up to the examples that its draws decide by chance.
    assert record.metrics["robust"].value <= accuracy + 2 / record.n
