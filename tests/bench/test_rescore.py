"""The second pass over stored adversarial examples: every way in which a file and a table can disagree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quadrants import QuadrantNet, quadrants
from torch import nn

import robustboard
from robustboard.bench.datasets import from_arrays
from robustboard.bench.evaluate import evaluate
from robustboard.bench.perturbed_file import write_perturbed
from robustboard.bench.protocol import resolve, select
from robustboard.bench.rescore import rescore
from robustboard.bench.session import LocalSession
from robustboard.errors import GateError


@pytest.fixture(scope="module")
def judged():
    """A session, its track, the examples, and what an evaluation without the slow parts found."""
    track = robustboard.track_from(
        {
            "id": "quadrants-linf@1",
            "dataset": "arrays",
            "threat": {"norm": "linf", "eps": "1/10"},
            "n": 40,
            "batch_size": 16,
            "bounds": {"methods": ["crown"]},
            "audit": {"certified_sample": 1, "smallest_margins": 0},
            "corruptions": {"names": ["contrast"], "severities": [1]},
        }
    )
    dataset = from_arrays(*quadrants())
    track, examples = resolve(track, dataset), select(track, dataset)
    session = LocalSession(QuadrantNet(), torch.device("cpu"))
    found = evaluate(session, track, examples)
    rows = sorted(found.adversarial)
    assert len(rows) >= 4, "the test data must hold broken examples"
    return session, track, examples, found.outcomes, np.array(rows), np.stack([found.adversarial[row] for row in rows])


def test_what_an_evaluation_stored_holds_again(judged, tmp_path):
    session, track, examples, outcomes, rows, images = judged
    write_perturbed(tmp_path / "a.npz", rows, images, examples.hashes)
    assert rescore(session, track, examples, outcomes, tmp_path / "a.npz") == len(rows)


def _clean(images, examples, rows):
    spoiled = images.copy()
    spoiled[0] = examples.floats()[rows[0]]
    return rows, spoiled


def _outside(images, examples, rows):
    spoiled = images.copy()
    spoiled[-1] = np.clip(spoiled[-1] + 0.5, 0, 1)
    return rows, spoiled


DISAGREEMENTS = {
    "an image that breaks nothing": (_clean, r"in the second pass .* is classified correctly"),
    "an image outside the ball": (_outside, r"cannot be checked again, .* lie outside"),
    "an image too few": (lambda images, examples, rows: (rows[1:], images[1:]), r"table differ on example "),
    "another example's images": (
        lambda images, examples, rows: (np.r_[rows[1:], rows[0]], images),
        "cannot be checked again|classified correctly",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_a_disagreement_is_a_broken_gate(judged, tmp_path, case):
    session, track, examples, outcomes, rows, images = judged
    spoil, words = DISAGREEMENTS[case]
    write_perturbed(tmp_path / "a.npz", *spoil(images, examples, rows), examples.hashes)
    with pytest.raises(GateError, match=words) as caught:
        rescore(session, track, examples, outcomes, tmp_path / "a.npz")
    assert caught.value.exit_code == 1


def test_a_missing_or_damaged_file_is_a_broken_gate(judged, tmp_path):
    session, track, examples, outcomes, *_ = judged
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    for name in ("missing.npz", "damaged.npz"):
        with pytest.raises(GateError, match="cannot be checked again"):
            rescore(session, track, examples, outcomes, tmp_path / name)


def test_a_model_that_has_changed_since_is_a_broken_gate(judged, tmp_path):
    _, track, examples, outcomes, rows, images = judged
    write_perturbed(tmp_path / "a.npz", rows, images, examples.hashes)
    right = LocalSession(_Answers(examples), torch.device("cpu"))
    with pytest.raises(GateError, match="classified correctly"):
        rescore(right, track, examples, outcomes, tmp_path / "a.npz")


class _Answers(nn.Module):
    """A model that knows the labels of the examples that its images are nearest to."""

    def __init__(self, examples) -> None:
        super().__init__()
        self.register_buffer("known", examples.tensor().flatten(1))
        self.register_buffer("labels", torch.from_numpy(examples.labels))

    def forward(self, x):
        nearest = torch.cdist(x.flatten(1), self.known).argmin(dim=1)
        return nn.functional.one_hot(self.labels[nearest], 4).float() * 9
