"""Where claims are measured: what an experiment sees is what the protocol trains and judges."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from robustboard.bench.claims.laboratory import Laboratory
from robustboard.defenses.adapter import NoProgress
from robustboard.errors import TrackError

TRACK = "digits-linf@1"
QUICK = {"epochs": 2, "architecture": "mlp-16"}


class Steps(NoProgress):
    def __init__(self) -> None:
        self.stages: list[str] = []

    def begin(self, stage: str, total: int) -> None:
        del total
        self.stages.append(stage)


def test_setup_is_the_track_s_data(tmp_path) -> None:
    laboratory = Laboratory(tmp_path)
    setup = laboratory.setup(TRACK)
    assert len(setup.test) == len(setup.keys) == 360
    assert setup.keys == tuple(sorted(setup.keys))
    assert setup.threat == setup.track.threat
    few = laboratory.setup(TRACK, limit=50)
    assert len(few.data.train) == 50
    assert torch.equal(few.data.train.images, setup.data.train.images[:50])
    assert len(few.data.validation) == len(setup.data.validation)
    assert len(laboratory.dataset(TRACK).test) >= 360


def test_an_unknown_track_is_one_sentence(tmp_path) -> None:
    with pytest.raises(TrackError, match=r"\.$"):
        Laboratory(tmp_path).setup("nothing@1")


def test_the_network_under_both_measures_is_the_same(tmp_path) -> None:
    """Trained here, then judged by the protocol: one training, one set of weights, and a kept record is not remade."""
    progress = Steps()
    laboratory = Laboratory(tmp_path, progress=progress)
    trained = laboratory.network("standard", TRACK, **QUICK)
    assert trained.seconds > 0
    record = laboratory.record("standard", TRACK, n=6, **QUICK)
    assert record.n == 6
    (weights,) = tmp_path.rglob("model.safetensors")
    state = load_file(weights)
    assert all(torch.equal(value, state[name]) for name, value in trained.model.state_dict().items())

    again = laboratory.network("standard", TRACK, **QUICK)
    assert math.isnan(again.seconds)
    progress.stages.clear()
    assert laboratory.record("standard", TRACK, n=6, **QUICK).to_json() == record.to_json()
    assert progress.stages == []
    assert laboratory.record("standard", TRACK, n=7, **QUICK).n == 7


def test_other_seeds_settings_and_limits_are_other_networks(tmp_path) -> None:
    laboratory = Laboratory(tmp_path)
    first = laboratory.network("standard", TRACK, **QUICK).model
    others = [
        laboratory.network("standard", TRACK, seed=1, **QUICK).model,
        laboratory.network("standard", TRACK, lr=0.02, **QUICK).model,
        laboratory.network("standard", TRACK, limit=60, **QUICK).model,
    ]
    weights = [next(iter(model.parameters())) for model in (first, *others)]
    for place, one in enumerate(weights):
        assert not any(torch.equal(one, other) for other in weights[:place])
    assert len(list(tmp_path.rglob("checkpoints"))) == 4
