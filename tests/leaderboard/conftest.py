"""Synthetic outcome tables and records that obey every law of the schema, for the tests of this room."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustboard.leaderboard.outcomes import ATTACKS, REFERENCE, verdicts
from robustboard.leaderboard.record import Audit, Record, attach, derive_metrics, make_record

METHODS = ("ibp", "crown-ibp", "crown")
CORRUPTIONS = ("gaussian_noise", "contrast")


def table(
    *,
    n: int = 60,
    seed: int = 0,
    clean: float = 0.9,
    hold: float = 0.7,
    proven: float = 0.4,
    reference: bool = False,
    attacked: int = 0,
) -> pd.DataFrame:
    """An outcome table with about these shares of clean, robust and certified examples.

    `attacked` is of how many examples corrupted images were attacked, at severity 2.
    """
    rng = np.random.default_rng(seed)
    # One difficulty an example, the same for all seeds: defenses agree on what is hard, as they do in life.
    difficulty = np.random.default_rng(99).random(n) * 0.6 + rng.random(n) * 0.4
    correct, holds, certified = (difficulty < np.quantile(difficulty, share) for share in (clean, hold, proven))
    holds, certified = holds & correct, certified & holds & correct
    frame = pd.DataFrame(
        {
            "example": pd.Series([hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)], dtype="string"),
            "index": np.arange(n, dtype=np.int64),
            "label": np.arange(n, dtype=np.int64) % 10,
            "clean": correct,
        }
    )
    breaker = np.where(correct & ~holds, rng.choice(3, size=n, p=[0.8, 0.15, 0.05]), -1)
    open_now = correct.copy()
    for position, attack in enumerate(ATTACKS):
        ran = open_now if attack == "pgd" else open_now & ~certified
        column = pd.array([True] * n, dtype="boolean")
        column[breaker == position] = False
        column[~ran] = pd.NA
        frame[attack] = column
        open_now = open_now & (breaker != position)
    survived = pd.array(holds, dtype="boolean")
    survived[~correct if reference else np.ones(n, dtype=bool)] = pd.NA
    frame[REFERENCE] = survived
    names = np.array([*ATTACKS[:3], None], dtype=object)
    frame["broken_by"] = pd.Series(names[breaker], dtype="string")
    frame["certified"] = certified
    by = np.where(certified, rng.choice(np.array(METHODS, dtype=object), size=n), None)
    frame["certified_by"] = pd.Series(by, dtype="string")
    frame["margin_lower"] = np.where(certified, 0.01 + rng.random(n), np.nan)
    frame["verdict"] = verdicts(frame)
    for name in CORRUPTIONS:
        for severity in (1, 2, 3):
            frame[f"corruption/{name}/{severity}"] = correct & (rng.random(n) > 0.12 * severity)
    chosen = np.random.default_rng(98).permutation(n) < attacked
    for name in CORRUPTIONS if attacked else ():
        held = frame[f"corruption/{name}/2"] & (rng.random(n) > 0.4)
        frame[f"robust_corruption/{name}/2"] = held.astype("boolean").where(chosen)
    return frame


def content(outcomes: pd.DataFrame, *, name: str = "pgd-at", **changes: Any) -> dict[str, Any]:
    """The values of a record of `outcomes`; `changes` replaces top-level ones, `defense` is merged."""
    defense = {
        "name": name,
        "title": "Adversarial training with PGD",
        "paper": "https://arxiv.org/abs/1706.06083",
        "authors": ["Aleksander Madry", "Aleksandar Makelov"],
        "year": 2018,
        "kind": "empirical",
        "architecture": "CNN-A",
        "summary": "Minimises the loss on the worst perturbation that projected gradient descent finds.",
    } | changes.pop("defense", {})
    return {
        "track": {
            "id": "digits-linf@1",
            "hash": "3f" * 32,
            "content": {
                "id": "digits-linf@1",
                "title": "Digits, L-inf 1/10",
                "dataset": "digits",
                "threat": {"norm": "linf", "eps": "1/10"},
                "n": len(outcomes),
            },
        },
        "defense": defense,
        "checkpoint_sha256": hashlib.sha256(name.encode()).hexdigest(),
        "parameters": 166406,
        "hyper": {"epochs": 30, "step": "1/40"},
        "seeds": {"training": 0, "attack": 0},
        "environment": {
            "python": "3.11.9",
            "torch": "2.14.1",
            "packages": {"pyautoattack": "0.2.0", "auto_LiRPA": "0.3"},
            "device": "cpu",
            "threads": 2,
            "platform": "Linux x86_64",
            "commit": "0123456789abcdef",
            "dirty": False,
        },
        "cost": {
            "train": {"seconds": 31.25, "forwards": 1000000, "backwards": 900000},
            "pgd": {"seconds": 2.5, "forwards": 120000, "backwards": 120000},
        },
        "bound_methods": METHODS,
        "metrics": derive_metrics(outcomes, bound_methods=METHODS),
        "audit": Audit.tally(broken_bounded=12, certified_attacked=18),
        "notes": ["The certificates are numerical."],
        "diagnostics": {"autoattack": ["no warning"]},
    } | changes


@pytest.fixture(scope="session")
def make_table() -> Callable[..., pd.DataFrame]:
    """See `table`."""
    return table


@pytest.fixture
def make_content() -> Callable[..., dict[str, Any]]:
    """See `content`."""
    return content


@pytest.fixture
def scored() -> Callable[..., Record]:
    """A record with its table attached: `shares` go to the table, everything else to the record."""

    def build(name: str = "pgd-at", shares: dict[str, Any] | None = None, **changes: Any) -> Record:
        outcomes = table(**(shares or {}))
        return attach(make_record(content(outcomes, name=name, **changes)), outcomes)

    return build


@pytest.fixture
def small_board(scored: Callable[..., Record]) -> list[Record]:
    """Four ranked defenses and a suspicious one on one track."""
    rows = [
        ("pgd-at", "Adversarial training with PGD", "empirical", 2018, 0.97, 0.86, 0.35),
        ("trades", "TRADES: trading off accuracy for robustness", "empirical", 2019, 0.95, 0.85, 0.46),
        ("crown-ibp", "CROWN-IBP", "certified", 2020, 0.92, 0.80, 0.74),
        ("standard", "Standard training", "undefended", 1998, 0.985, 0.22, 0.0),
    ]
    records = [
        scored(
            name,
            {"n": 360, "seed": 7 + place, "clean": clean, "hold": hold, "proven": proven},
            defense={"title": title, "kind": kind, "year": year},
        )
        for place, (name, title, kind, year, clean, hold, proven) in enumerate(rows)
    ]
    masked = scored(
        "distillation",
        {"n": 360, "seed": 20, "clean": 0.96, "hold": 0.9, "proven": 0.0},
        defense={"title": "Defensive distillation", "kind": "empirical", "year": 2016},
        status="suspicious",
        reasons=["Half of the input gradients are exactly zero, so gradient attacks are blind here."],
    )
    return [*records, masked]
