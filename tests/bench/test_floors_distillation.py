"""What distillation must show on `mnist-linf@1`: nearly robust to cross-entropy, undefended to the protocol."""

from __future__ import annotations

import pytest
import torch

from robustboard.attacks.pgd import pgd
from robustboard.bench.claims.laboratory import Laboratory

TRACK = "mnist-linf@1"


@pytest.mark.slow
def test_distillation_masks_gradients_and_adds_no_robustness(data_file, tmp_path):
    """At T = 100, CE-PGD leaves at least 90 %; the protocol leaves within five points of what standard training has."""
    lab = Laboratory(tmp_path, data_dirs=(data_file("mnist.npz").parent,))
    distilled = lab.network("distillation", TRACK)
    images, labels, keys = distilled.test.images[:500], distilled.test.labels[:500], distilled.keys[:500]
    found = pgd(
        distilled.model,
        images,
        labels,
        threat=distilled.threat,
        keys=keys,
        seed=0,
        steps=40,
        restarts=1,
        step_size=distilled.threat.radius / 10,
        losses=("ce",),
    )
    with torch.no_grad():
        survived = (distilled.model(found).argmax(dim=1) == labels).float().mean().item()
    assert survived >= 0.90

    defended, undefended = lab.record("distillation", TRACK).metrics, lab.record("standard", TRACK).metrics
    assert defended["clean"].value >= 0.98
    assert abs(defended["robust"].value - undefended["robust"].value) <= 0.05
