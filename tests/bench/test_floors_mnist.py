"""Floors on `mnist-linf@1`, so that a row of the board means something: each run takes minutes, training included."""

from __future__ import annotations

import pytest

from robustboard.bench.request import Request
from robustboard.bench.score import score_defense


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "floors"),
    [("pgd-at", {"clean": 0.98, "robust": 0.92}), ("crown-ibp", {"clean": 0.97, "certified": 0.90})],
)
def test_defenses_are_really_trained_on_mnist(data_file, tmp_path, defense, floors):
    folder = data_file("mnist.npz").parent
    request = Request(defense=defense, track="mnist-linf@1", runs=tmp_path, data_dirs=(folder,))
    metrics = score_defense(request).record.metrics
    for name, floor in floors.items():
        assert metrics[name].value >= floor
