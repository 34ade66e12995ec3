"""Training seeds side by side: which records belong together, and the numbers against the standard library's."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest

from robustboard.leaderboard.record import Record
from robustboard.leaderboard.training_spread import training_spreads

Build = Callable[..., Record]


def test_records_that_differ_in_their_seed_alone_make_one_spread(scored: Build) -> None:
    holds = {0: 0.7, 1: 0.6, 2: 0.75}
    trained = [scored("a", {"hold": hold}, seeds={"training": seed}) for seed, hold in holds.items()]
    others = [scored("a", hyper={"epochs": 5}, seeds={"training": 0}), scored("b", seeds={"attack": 0})]
    spreads = list(training_spreads([*others, *reversed(trained)]).values())
    assert [spread.seeds for spread in spreads] == [(0, 1, 2), (0,)]
    robust = spreads[0].metrics["robust"]
    values = [record.metrics["robust"].value for record in trained]
    assert robust.values == tuple(values)
    assert robust.mean == pytest.approx(statistics.mean(values))
    assert robust.sd == pytest.approx(statistics.stdev(values))
    assert (robust.min, robust.max) == (min(values), max(values))
    assert spreads[1].metrics["robust"].sd is None


def test_of_one_seed_before_and_after_a_challenge_the_lower_counts(scored: Build) -> None:
    pair = [scored("a", {"hold": hold}, seeds={"training": 0}) for hold in (0.7, 0.5)]
    (spread,) = training_spreads(pair).values()
    assert spread.metrics["robust"].values == (pair[1].metrics["robust"].value,)


def test_records_of_another_effort_are_no_other_seed(scored: Build) -> None:
    plain = scored("a", seeds={"training": 0})
    thorough = scored("a", seeds={"training": 1}, effort={"complete_nodes": 1000})
    assert sorted(spread.seeds for spread in training_spreads([plain, thorough]).values()) == [(0,), (1,)]


def test_records_in_doubt_are_left_out_and_named(scored: Build) -> None:
    doubt = {"status": "invalid", "reasons": ["The model answers otherwise each time."]}
    sound = [scored("a", {"hold": hold}, seeds={"training": seed}) for seed, hold in enumerate((0.7, 0.6))]
    doubtful = scored("a", {"hold": 0.9}, seeds={"training": 2}, **doubt)
    (spread,) = training_spreads([doubtful, *sound]).values()
    assert (spread.seeds, spread.left_out) == ((0, 1), (2,))
    assert [spread.metrics] == [one.metrics for one in training_spreads(sound).values()]
    assert training_spreads([doubtful]) == {}
