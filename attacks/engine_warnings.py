"""The reference engine's warnings as data: which of its checks spoke, in which stage, and how often.

The engine (Croce & Hein 2020, `flags_doc.md` of its repository) only writes sentences to a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Check = Literal["randomised", "probabilities", "dynamic", "zero gradients", "square", "few classes", "other"]

_SIGNS: tuple[tuple[str, Check], ...] = (
    ("randomized defense", "randomised"),
    ("probability distribution", "probabilities"),
    ("dynamic defense", "dynamic"),
    ("zero gradient", "zero gradients"),
    ("square attack has decreased", "square"),
    ("classes it is not possible", "few classes"),
    ("target classes", "few classes"),
)


@dataclass(frozen=True)
class EngineWarning:
    """One warning.

    Attributes:
        stage: the attack in which it came, or `checks` for those made before any.
        check: what was looked for.
        message: the engine's own words.
        times: how often it came.
    """

    stage: str
    check: Check
    message: str
    times: int


def read_warnings(stage: str, sentences: Iterable[str]) -> list[EngineWarning]:
    """The warnings that a stage's sentences stand for; see `autoattack.StageResult.warnings`.

    >>> read_warnings("square", ["There are 3 points with zero gradient! (Said 4 times, here the first.)"])
    [EngineWarning(stage='square', check='zero gradients', message='There are 3 points with zero gradient!', times=4)]
    """
    found = []
    for sentence in sentences:
        said = re.fullmatch(r"(.*?)(?: \(Said (\d{1,9}) times, here the first\.\))?", sentence, flags=re.DOTALL)
        message, times = (said[1], int(said[2] or 1)) if said else (sentence, 1)
        check: Check = next((kind for sign, kind in _SIGNS if sign in message.lower()), "other")
        found.append(EngineWarning(stage, check, message, times))
    return found


def merged(warnings: Iterable[EngineWarning]) -> list[EngineWarning]:
    """One warning for each stage and check, with the first message and all its times."""
    kept: dict[tuple[str, str], EngineWarning] = {}
    for warning in warnings:
        key = warning.stage, warning.check
        before = kept.get(key)
        kept[key] = (
            warning
            if before is None
            else EngineWarning(warning.stage, warning.check, before.message, before.times + warning.times)
        )
    return list(kept.values())
