"""The numbers of a record: each against a count made by hand, and the laws between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustboard.errors import RecordError
from robustboard.leaderboard.corruption import RIFT_18, STANDARD_15
from robustboard.leaderboard.metrics import Metric, check_metrics, derive_metrics
from robustboard.leaderboard.outcomes import ATTACKS
from robustboard.leaderboard.statistics import mean_interval, wilson

METHODS = ("ibp", "crown-ibp", "crown")
Table = Callable[..., pd.DataFrame]


def counts(frame: pd.DataFrame) -> dict[str, int]:
    return {verdict: int((frame["verdict"] == verdict).sum()) for verdict in set(frame["verdict"])}


def test_headline_metrics_are_counts_of_verdicts(make_table: Table) -> None:
    frame = make_table(n=200)
    found, metrics = counts(frame), derive_metrics(frame, bound_methods=METHODS)
    expected = {
        "clean": 200 - found["misclassified"],
        "robust": found["certified"] + found["undecided"],
        "certified": found["certified"],
        "undecided": found["undecided"],
        "pgd": int((frame["clean"] & frame["pgd"].fillna(False)).sum()),
    }
    for name, count in expected.items():
        assert metrics[name].value == count / 200
        assert (metrics[name].low, metrics[name].high) == wilson(count, 200)
        assert metrics[name].n == 200


def test_autoattack_is_a_metric_only_where_it_ran_on_every_correct_example(make_table: Table) -> None:
    frame = make_table(reference=True)
    metrics = derive_metrics(frame, bound_methods=METHODS)
    assert metrics["autoattack"].value == metrics["robust"].value
    row = int(np.flatnonzero(frame["verdict"] == "certified")[0])
    frame.loc[row, "autoattack"] = pd.NA
    assert "autoattack" not in derive_metrics(frame, bound_methods=METHODS)
    assert "autoattack" not in derive_metrics(make_table(), bound_methods=METHODS)


def test_certified_by_method_is_cumulative_in_the_order_they_ran(make_table: Table) -> None:
    frame = make_table(n=300)
    for order in (METHODS, METHODS[::-1]):
        metrics = derive_metrics(frame, bound_methods=order)
        by = frame["certified_by"].value_counts()
        running = 0
        for method in order:
            running += int(by[method])
            assert metrics[f"certified/{method}"].value == running / 300
        assert metrics[f"certified/{order[-1]}"] == metrics["certified"]


def test_stages_of_the_cascade_fall_to_robust(make_table: Table) -> None:
    metrics = derive_metrics(make_table(n=300), bound_methods=METHODS)
    stages = [metrics[f"robust/{attack}"].value for attack in ATTACKS]
    assert stages == sorted(stages, reverse=True)
    assert stages[0] == metrics["pgd"].value
    assert stages[-1] == metrics["robust"].value < stages[0]


def test_corruption_is_the_mean_over_all_columns_with_the_interval_of_a_mean(make_table: Table) -> None:
    frame = make_table(n=150)
    columns = [column for column in frame if column.startswith("corruption/")]
    metric = derive_metrics(frame, bound_methods=METHODS)["corruption"]
    assert metric.value == pytest.approx(frame[columns].to_numpy().mean())
    assert (metric.low, metric.high) == pytest.approx(mean_interval(frame[columns].to_numpy()))
    single = derive_metrics(frame, bound_methods=METHODS)["corruption/contrast/2"]
    assert single.value == frame["corruption/contrast/2"].mean()


def test_robust_accuracy_on_corrupted_images_is_of_those_that_were_attacked(make_table: Table) -> None:
    frame = make_table(n=150, attacked=40)
    columns = [column for column in frame if column.startswith("robust_corruption/")]
    chosen = frame[frame[columns[0]].notna()]
    assert len(chosen) == 40
    metrics = derive_metrics(frame, bound_methods=METHODS)
    held = chosen[columns].astype(bool)
    metric = metrics["corruption/robust"]
    assert (metric.value, metric.n) == (pytest.approx(held.to_numpy().mean()), 40)
    assert (metric.low, metric.high) == pytest.approx(mean_interval(held.to_numpy()))
    single = metrics["corruption/robust/contrast/2"]
    assert single.value == held["robust_corruption/contrast/2"].mean()
    assert (single.low, single.high) == wilson(int(held["robust_corruption/contrast/2"].sum()), 40)
    assert single.value <= chosen["corruption/contrast/2"].mean()
    assert not any(name.startswith("corruption/robust") for name in derive_metrics(make_table(), bound_methods=METHODS))


def test_means_over_the_sets_of_papers_need_the_whole_set(make_table: Table) -> None:
    rng = np.random.default_rng(0)
    frame = make_table(n=50).drop(columns=[c for c in make_table() if c.startswith("corruption/")])
    names = (*STANDARD_15, *(name for name in RIFT_18 if name not in STANDARD_15))
    assert len(names) == 19
    conditions = {f"corruption/{name}/{severity}": rng.random(50) < 0.7 for name in names for severity in range(1, 6)}
    whole = frame.assign(**conditions)
    metrics = derive_metrics(whole, bound_methods=METHODS)
    for metric, members in (("standard-15", STANDARD_15), ("rift-18", RIFT_18)):
        columns = [column for column in conditions if column.split("/")[1] in members]
        assert len(columns) == 5 * len(members)
        assert metrics[f"corruption/{metric}"].value == pytest.approx(whole[columns].to_numpy().mean())
    fewer = derive_metrics(whole.drop(columns="corruption/glass_blur/4"), bound_methods=METHODS)
    assert "corruption/standard-15" not in fewer
    assert fewer["corruption/rift-18"] == metrics["corruption/rift-18"], "RiFT leaves glass blur out"


def test_classes_are_shares_of_their_own_examples(make_table: Table) -> None:
    frame = make_table(n=95)
    metrics = derive_metrics(frame, bound_methods=METHODS)
    own = frame[frame["label"] == 7]
    assert metrics["class/7/clean"].n == len(own) == 9
    assert metrics["class/7/clean"].value == own["clean"].mean()
    assert metrics["class/7/robust"].value == own["verdict"].isin(["certified", "undecided"]).mean()


def test_a_model_that_is_always_wrong_has_numbers(make_table: Table) -> None:
    metrics = derive_metrics(make_table(clean=0.0, hold=0.0, proven=0.0))
    assert [metrics[name].value for name in ("clean", "robust", "certified", "undecided")] == [0, 0, 0, 0]


def test_a_certificate_of_a_method_that_did_not_run_is_refused(make_table: Table) -> None:
    with pytest.raises(RecordError, match="certified by crown, which is not among the bound methods"):
        derive_metrics(make_table(), bound_methods=METHODS[:2])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.tuples(*[st.floats(0, 1)] * 3), st.booleans())
def test_certified_robust_pgd_and_clean_are_ordered(
    make_table: Table, seed: int, shares: tuple[float, float, float], reference: bool
) -> None:
    proven, hold, clean = sorted(shares)
    frame = make_table(n=30, seed=seed, clean=clean, hold=hold, proven=proven, reference=reference)
    metrics = derive_metrics(frame, bound_methods=METHODS)
    pgd = metrics.get("pgd", metrics["clean"])
    assert metrics["certified"].value <= metrics["robust"].value <= pgd.value <= metrics["clean"].value
    assert metrics["robust"].value == pytest.approx(metrics["certified"].value + metrics["undecided"].value)
    assert metrics["certified"].low <= metrics["robust"].high


@pytest.mark.parametrize(
    "wrong", [{"value": 1.2}, {"low": float("nan")}, {"low": 0.9}, {"n": 0}, {"value": "0.5"}, {"spread": 1}]
)
def test_a_metric_is_numbers_in_order(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Metric"):
        Metric.model_validate({"value": 0.5, "n": 10, "low": 0.2, "high": 0.8} | wrong)


def test_metrics_that_do_not_follow_from_the_table_are_refused(make_table: Table) -> None:
    frame = make_table()
    honest = derive_metrics(frame, bound_methods=METHODS)
    check_metrics(honest, frame, bound_methods=METHODS, name="The record")
    better = honest | {"robust": honest["clean"]}
    fewer = {name: metric for name, metric in honest.items() if name != "pgd"}
    more = honest | {"autoattack": honest["robust"]}
    for given_metrics, name in ((better, "robust"), (fewer, "pgd"), (more, "autoattack")):
        with pytest.raises(RecordError, match=f"metric '{name}' that does not follow"):
            check_metrics(given_metrics, frame, bound_methods=METHODS, name="The record")
