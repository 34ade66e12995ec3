"""The spread over attack seeds: what other seeds find is counted and kept, and never becomes a verdict."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import robustboard
from robustboard.bench import attack_seeds
from robustboard.bench.attack_seeds import SUBSET, study_attack_seeds
from robustboard.bench.datasets import from_arrays
from robustboard.bench.protocol import resolve, select
from robustboard.errors import GateError


class _NoSession:
    """A model that nobody may ask: the attacks of these tests are scripted."""

    def call(self, *args, **kwargs):
        raise AssertionError("no model is needed here")

    def close(self):
        """Nothing to let go."""


@pytest.fixture(scope="module")
def task():
    """A track of 130 examples, more than the subset."""
    images = np.random.default_rng(0).integers(0, 256, size=(130, 1, 4, 4), dtype=np.uint8)
    track = robustboard.track_from(
        {"id": "noise-linf@1", "dataset": "arrays", "threat": {"norm": "linf", "eps": "1/10"}, "n": 130}
    )
    dataset = from_arrays(images, np.arange(130) % 4)
    return resolve(track, dataset), select(track, dataset)


def table(verdicts: list[str]) -> pd.DataFrame:
    found = pd.Series(verdicts)
    by = found.map({"broken": "pgd", "by complete": "complete"})
    return pd.DataFrame(
        {
            "verdict": found.replace("by complete", "broken"),
            "clean": found != "misclassified",
            "certified": found == "certified",
            "broken_by": by.astype("string"),
        }
    )


def scripted(breaks):
    """An attack that breaks what `breaks(seed, row)` says, and tells which examples it was shown."""
    shown = []

    def attack(examiner, verdicts):
        # The protocol's own seeds are zero.
        seed = examiner.track.attacks.pgd.seed
        assert seed == examiner.track.attacks.autoattack.seed
        shown.append(verdicts.clean.copy())
        for row in np.flatnonzero(verdicts.clean):
            if breaks(seed, row):
                verdicts.broken_by[row] = "pgd"
                verdicts.adversarial[int(row)] = np.full((1, 4, 4), seed / 10, dtype=np.float32)

    return attack, shown


def test_other_seeds_are_counted_on_one_subset(task, monkeypatch):
    track, examples = task
    assert (track.attacks.pgd.seed, track.attacks.autoattack.seed) == (0, 0)
    verdicts = ["undecided"] * 100 + ["broken"] * 20 + ["misclassified"] * 10
    attack, shown = scripted(lambda seed, row: row >= 100 or (seed == 1 and row % 10 == 0) or row == 7)
    monkeypatch.setattr(attack_seeds, "attack", attack)
    study = study_attack_seeds(_NoSession(), track, examples, table(verdicts), seeds=2)
    assert study is not None
    assert (shown[0] == shown[1]).all()
    assert not shown[0][120:].any(), "a misclassified example is not attacked"
    drawn = np.flatnonzero(shown[0])
    undecided = drawn[drawn < 100]
    one = [row for row in undecided if row % 10 and row != 7]
    two = [row for row in undecided if row != 7]
    spread = study.spread
    assert spread.n == SUBSET
    assert spread.seeds == (0, 1, 2)
    assert [round(value * SUBSET) for value in spread.model_dump()["values"]] == [len(undecided), len(one), len(two)]
    assert sorted(study.breaks) == sorted(set(undecided) - set(one))
    assert spread.would_break == len(study.breaks) > 0
    assert (spread.min, spread.max) == (len(one) / SUBSET, len(undecided) / SUBSET)
    assert spread.sd == pytest.approx(np.std([len(undecided), len(one), len(two)], ddof=1) / SUBSET)


def test_what_complete_verification_alone_broke_says_nothing_of_the_seeds(task, monkeypatch):
    """No seed of the attacks breaks it, so the values do not differ; where one does, nothing new is broken."""
    monkeypatch.setattr(attack_seeds, "SUBSET", 130)
    verdicts = ["undecided"] * 90 + ["by complete"] * 40
    for breaks, values in ((lambda *_: False, (1.0, 1.0)), (lambda _, row: row >= 117, (1.0, 0.9))):
        monkeypatch.setattr(attack_seeds, "attack", scripted(breaks)[0])
        study = study_attack_seeds(_NoSession(), *task, table(verdicts), seeds=1)
        assert study is not None
        assert study.spread.model_dump()["values"] == pytest.approx(values)
        assert (study.spread.would_break, study.breaks) == (0, {})


def test_the_first_seed_that_breaks_an_example_gives_its_image(task, monkeypatch):
    attack, _ = scripted(lambda seed, row: seed >= 2)
    monkeypatch.setattr(attack_seeds, "attack", attack)
    study = study_attack_seeds(_NoSession(), *task, table(["undecided"] * 130), seeds=3)
    assert study is not None
    assert {float(image.max()) for image in study.breaks.values()} == {np.float32(0.2)}


def test_a_seed_that_breaks_a_certified_example_is_a_contradiction(task, monkeypatch):
    attack, _ = scripted(lambda seed, row: row == 3)
    monkeypatch.setattr(attack_seeds, "attack", attack)
    monkeypatch.setattr(attack_seeds, "SUBSET", 130)
    with pytest.raises(GateError, match=r"with another attack seed pgd breaks example [0-9a-f]{12}, certified"):
        study_attack_seeds(_NoSession(), *task, table(["certified"] * 130), seeds=1)


def test_without_other_seeds_there_is_nothing_to_study(task):
    assert study_attack_seeds(_NoSession(), *task, table(["undecided"] * 130), seeds=0) is None
