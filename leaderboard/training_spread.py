"""How much a defense's numbers move with its training seed: trainings that differ in nothing else, side by side.

This is kept apart from the spread over attack seeds, which is about one trained network, and from a record's interval,
which is about the finite test set: three different uncertainties, never added up.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from robustboard.leaderboard.record import Record, sort_key

METRICS: Final = ("clean", "robust", "certified")

Setting: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class SeedValues:
    """One metric over training seeds.

    Attributes:
        values: by seed, in the order of the seeds.
        sd: the standard deviation of a sample; None for a single seed.
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    min: float
    max: float


@dataclass(frozen=True)
class TrainingSpread:
    """Trainings of one defense on one track that differ in their seed alone.

    Attributes:
        n: how many examples each was judged on.
        seeds: the training seeds, ascending.
        left_out: seeds whose records are not `ok`, so that their numbers mean nothing.
        metrics: by name, those of `METRICS`.
    """

    track_id: str
    track_hash: str
    defense: str
    n: int
    seeds: tuple[int, ...]
    metrics: dict[str, SeedValues]
    left_out: tuple[int, ...] = ()


def training_spreads(records: Iterable[Record]) -> dict[Setting, TrainingSpread]:
    """The spread of every group of records that differ in their training seed alone, one or more seeds each.

    Records without a training seed (submissions) belong to no group, and those that are not `ok` are left out of
    theirs. Where a seed is there more than once, such as before and after a challenge, the lowest robust accuracy
    counts.
    """
    groups: dict[Setting, dict[int, Record]] = {}
    doubtful: dict[Setting, set[int]] = {}
    for record in sorted(records, key=sort_key):
        key = setting_of(record)
        if key is None:
            continue
        seed = record.seeds["training"]
        if record.status != "ok":
            doubtful.setdefault(key, set()).add(seed)
            continue
        by_seed = groups.setdefault(key, {})
        if seed not in by_seed or record.metrics["robust"].value < by_seed[seed].metrics["robust"].value:
            by_seed[seed] = record
    return {key: _spread(groups[key], doubtful.get(key, set())) for key in sorted(groups)}


def setting_of(record: Record) -> Setting | None:
    """What the records of one spread have in common; None for a record without a training seed."""
    if "training" not in record.seeds:
        return None
    settings = (repr(sorted(values.items())) for values in (record.hyper, record.effort))
    return (record.track.id, record.track.hash, record.defense.name, *settings)


def _spread(by_seed: dict[int, Record], doubtful: set[int]) -> TrainingSpread:
    seeds = tuple(sorted(by_seed))
    one = by_seed[seeds[0]]
    return TrainingSpread(
        one.track.id,
        one.track.hash,
        one.defense.name,
        one.n,
        seeds,
        {name: _values([by_seed[seed].metrics[name].value for seed in seeds]) for name in METRICS},
        tuple(sorted(doubtful - by_seed.keys())),
    )


def _values(values: list[float]) -> SeedValues:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return SeedValues(tuple(values), statistics.fmean(values), sd, min(values), max(values))
