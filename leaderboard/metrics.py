"""The numbers of a record, each with its interval, computed from the outcome table and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from robustboard.errors import RecordError
from robustboard.leaderboard import outcomes as tables
from robustboard.leaderboard.corruption import RIFT_18, STANDARD_15
from robustboard.leaderboard.statistics import Flags, mean_interval, wilson


class Metric(BaseModel):
    """A share of examples with its 95 % interval.

    Attributes:
        value: the share, in [0, 1].
        n: how many examples it is a share of.
        low: the lower confidence limit.
        high: the upper confidence limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    value: float = Field(ge=0, le=1)
    n: int = Field(ge=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("a metric's value must lie between its low and its high")
        return self


def derive_metrics(outcomes: pd.DataFrame, *, bound_methods: Sequence[str] = ()) -> dict[str, Metric]:
    """All numbers that an outcome table holds.

    `clean`, `robust` (certified, or survived every attack), `certified` and `undecided` are always there; `pgd` and
    `autoattack` only where that attack ran on every correctly classified example; `corruption` where there are
    corruption columns. Finer names follow: `certified/<method>` (by that method or one before it), `robust/<attack>`
    (left after that stage of the cascade), `corruption/standard-15` and `corruption/rift-18` (the means over these
    sets, where a table has them whole), `corruption/robust` and `corruption/robust/<name>/<severity>` (of the examples
    whose corrupted images were attacked: still correct), `corruption/<name>`, `corruption/<name>/<severity>`,
    `class/<k>/clean` and `class/<k>/robust`. Shares carry Wilson intervals, means over corruptions those of
    `mean_interval`.

    Args:
        outcomes: a table that passes `check_outcomes`.
        bound_methods: the bound methods in the order they ran.

    Raises:
        RecordError: if the table is refused, or was certified by a method that is not among `bound_methods`.
    """
    tables.check_outcomes(outcomes)
    clean, certified = outcomes["clean"].to_numpy(bool), outcomes["certified"].to_numpy(bool)
    robust = clean & ~tables.broken(outcomes)
    metrics = {"clean": _share(clean)}
    for attack in ("pgd", tables.REFERENCE):
        ran = outcomes[attack].notna().to_numpy(bool)
        if ran.any() and (ran | ~clean).all():
            metrics[attack] = _share(clean & ~tables.broken(outcomes, [attack]))
    metrics["robust"] = _share(robust)
    metrics["certified"] = _share(certified)
    metrics["undecided"] = _share(robust & ~certified)
    corruptions = tables.corruption_columns(outcomes)
    if corruptions:
        metrics["corruption"] = _mean(outcomes, [column for columns in corruptions.values() for column in columns])
        metrics |= _means_of_sets(outcomes, corruptions) | _robust_corruption(outcomes)
    metrics |= _certified_by(outcomes, bound_methods)
    attacks = (*tables.ATTACKS, tables.REFERENCE, tables.FAST, tables.COMPLETE, tables.CHALLENGE)
    stages = [attack for attack in attacks if attack in outcomes and outcomes[attack].notna().any()]
    for position, attack in enumerate(stages, start=1):
        metrics[f"robust/{attack}"] = _share(clean & ~tables.broken(outcomes, stages[:position]))
    for name, columns in corruptions.items():
        metrics[f"corruption/{name}"] = _mean(outcomes, columns)
        metrics |= {column: _share(outcomes[column].to_numpy(bool)) for column in columns}
    labels = outcomes["label"].to_numpy()
    for label in np.unique(labels):
        metrics[f"class/{label}/clean"] = _share(clean[labels == label])
        metrics[f"class/{label}/robust"] = _share(robust[labels == label])
    return metrics


def check_metrics(
    given: Mapping[str, Metric], outcomes: pd.DataFrame, *, bound_methods: Sequence[str], name: str
) -> None:
    """Refuse metrics that do not follow from their outcome table; `name` is what the errors call the record.

    Raises:
        RecordError: if the table is refused, or a metric is missing, unknown or different.
    """
    try:
        derived = derive_metrics(outcomes, bound_methods=bound_methods)
    except RecordError as error:
        raise RecordError(f"{name} has an outcome table that is refused: {error}") from error
    for metric in sorted(given.keys() | derived.keys()):
        if metric not in given or metric not in derived or not _close(given[metric], derived[metric]):
            raise RecordError(f"{name} gives a metric {metric!r} that does not follow from its outcome table.")


def _close(first: Metric, second: Metric) -> bool:
    """Whether two metrics differ by no more than another library version would explain."""
    pairs = ((first.value, second.value), (first.low, second.low), (first.high, second.high))
    return first.n == second.n and all(math.isclose(one, other, abs_tol=1e-9) for one, other in pairs)


def _share(flags: Flags) -> Metric:
    successes, trials = int(flags.sum()), len(flags)
    low, high = wilson(successes, trials)
    return Metric(value=successes / trials, n=trials, low=low, high=high)


def _mean(outcomes: pd.DataFrame, columns: list[str]) -> Metric:
    flags = outcomes[columns].to_numpy(bool)
    low, high = mean_interval(flags)
    value = float(int(flags.sum()) / flags.size)
    return Metric(value=value, n=len(outcomes), low=min(low, value), high=max(high, value))


def _means_of_sets(outcomes: pd.DataFrame, corruptions: Mapping[str, list[str]]) -> dict[str, Metric]:
    """The unweighted means over the sets that papers report, where each of a set's corruptions has all severities."""
    means = {}
    for name, members in (("standard-15", STANDARD_15), ("rift-18", RIFT_18)):
        if all(len(corruptions.get(member, ())) == 5 for member in members):
            means[f"corruption/{name}"] = _mean(outcomes, [one for member in members for one in corruptions[member]])
    return means


def _robust_corruption(outcomes: pd.DataFrame) -> dict[str, Metric]:
    columns = [column for columns in tables.robust_corruption_columns(outcomes).values() for column in columns]
    if not columns:
        return {}
    attacked = outcomes.loc[outcomes[columns[0]].notna(), columns].astype(bool)
    shares = {
        f"corruption/robust/{column.partition('/')[2]}": _share(attacked[column].to_numpy(bool)) for column in columns
    }
    return {"corruption/robust": _mean(attacked, columns)} | shares


def _certified_by(outcomes: pd.DataFrame, methods: Sequence[str]) -> dict[str, Metric]:
    by = outcomes["certified_by"].astype(object).where(outcomes["certified_by"].notna(), "").to_numpy()
    if unknown := sorted(set(by) - {""} - set(methods)):
        raise RecordError(
            f"The outcome table was certified by {unknown[0]}, which is not among the bound methods that ran "
            f"({', '.join(methods) or 'none'})."
        )
    return {
        f"certified/{method}": _share(np.isin(by, methods[:position]))
        for position, method in enumerate(methods, start=1)
    }
