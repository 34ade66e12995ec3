"""MixTrain's floor on `mnist-linf@1`: minutes of training on one core, and most digits are certified."""

from __future__ import annotations

import pytest

from robustboard.bench.request import Request
from robustboard.bench.score import score_defense


@pytest.mark.slow
def test_mixtrain_certifies_mnist(data_file, tmp_path):
    folder = data_file("mnist.npz").parent
    request = Request(defense="mixtrain", track="mnist-linf@1", runs=tmp_path, data_dirs=(folder,))
    metrics = score_defense(request).record.metrics
    assert metrics["clean"].value >= 0.93
    assert metrics["certified"].value >= 0.75
