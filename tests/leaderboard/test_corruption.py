"""The drop against clean accuracy and mCE: by hand, against a bootstrap, and where they are not defined."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from robustboard.bench.corruptions import SETS
from robustboard.errors import RecordError
from robustboard.leaderboard.corruption import RIFT_18, STANDARD_15, mean_corruption_error, relative_drop

Table = Callable[..., pd.DataFrame]


def test_the_sets_are_those_of_the_papers() -> None:
    names = SETS["cifar10-c-style"].names
    assert names[:15] == STANDARD_15
    assert set(RIFT_18) == set(names) - {"glass_blur"}
    assert len(RIFT_18) == 18


def test_the_drop_is_the_lost_share_of_clean_accuracy(make_table: Table) -> None:
    frame = make_table(n=150)
    columns = [column for column in frame if column.startswith("corruption/")]
    drop = relative_drop(frame)
    assert drop is not None
    assert drop.value == pytest.approx(1 - frame[columns].to_numpy().mean() / frame["clean"].mean())
    assert drop.n == 150
    assert drop.low < drop.value < drop.high


def test_the_drop_may_be_negative_and_is_at_most_one() -> None:
    helped = pd.DataFrame({"clean": [True, False, False, False], "corruption/fog/1": [True, True, True, True]})
    drop = relative_drop(helped)
    assert drop is not None
    assert drop.value == -3.0
    lost = relative_drop(pd.DataFrame({"clean": [True, False], "corruption/fog/1": [False, False]}))
    assert lost is not None
    assert (lost.value, lost.high) == (1.0, 1.0)


def test_the_drop_of_a_model_that_is_always_wrong_is_not_defined() -> None:
    assert relative_drop(pd.DataFrame({"clean": [False], "corruption/fog/1": [True]})) is None
    assert relative_drop(pd.DataFrame({"clean": [True]})) is None


def test_one_example_has_no_drop_since_it_has_no_interval() -> None:
    assert relative_drop(pd.DataFrame({"clean": [True], "corruption/fog/1": [True]})) is None


def test_the_interval_of_the_drop_agrees_with_a_bootstrap(make_table: Table) -> None:
    frame = make_table(n=400, seed=5)
    columns = [column for column in frame if column.startswith("corruption/")]
    shares, clean = frame[columns].to_numpy(bool).mean(axis=1), frame["clean"].to_numpy(bool)
    drawn = np.random.default_rng(0).integers(0, 400, size=(4000, 400))
    drops = 1 - shares[drawn].mean(axis=1) / clean[drawn].mean(axis=1)
    drop = relative_drop(frame)
    assert drop is not None
    assert (drop.low, drop.high) == pytest.approx(np.quantile(drops, [0.025, 0.975]), abs=0.004)


def test_mce_weighs_each_corruption_by_the_error_of_the_reference() -> None:
    def table(fog: list[float], snow: list[float]) -> pd.DataFrame:
        places = np.arange(100)
        wrong = {f"fog/{s}": e for s, e in enumerate(fog, 1)} | {f"snow/{s}": e for s, e in enumerate(snow, 1)}
        return pd.DataFrame({f"corruption/{name}": places >= 100 * error for name, error in wrong.items()})

    model, reference = table([0.1, 0.3], [0.2, 0.2]), table([0.2, 0.6], [0.1, 0.3])
    assert mean_corruption_error(model, reference) == pytest.approx((0.4 / 0.8 + 0.4 / 0.4) / 2)
    assert mean_corruption_error(reference, reference) == pytest.approx(1)
    with pytest.raises(RecordError, match="no error under fog"):
        mean_corruption_error(model, table([0, 0], [0.1, 0.1]))
    with pytest.raises(RecordError, match="the same corruptions and severities"):
        mean_corruption_error(model, reference.drop(columns="corruption/fog/2"))
