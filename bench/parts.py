"""How the rows of a stage are cut into parts, each a question of its own; no verdict depends on it."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from robustboard.bench.verdicts import Rows

LEAST_ATTACKED: Final = 8
"""With fewer examples to attack a job had better stay idle."""

LEAST_BOUNDED: Final = 2
"""A bound of one example takes as long as an attack on many."""

# Each job has so many parts of a stage, so that one that is slow does not hold up the others. Parts of fewer examples
# than the second number are slower for each.
_SHARES, _ENOUGH = 2, 64


def parts(rows: Rows, *, most: int, jobs: int, least: int = LEAST_ATTACKED) -> list[Rows]:
    """Equal parts of at most `most` rows, and as many as keep every job at work.

    >>> [len(part) for part in parts(np.arange(500), most=200, jobs=1)]
    [167, 167, 166]
    >>> [len(part) for part in parts(np.arange(500), most=200, jobs=2)]
    [125, 125, 125, 125]
    >>> [len(part) for part in parts(np.arange(20), most=200, jobs=8)]
    [7, 7, 6]
    >>> [len(part) for part in parts(np.arange(3), most=1, jobs=2)]
    [1, 1, 1]
    """
    count = math.ceil(len(rows) / most)
    if jobs > 1:
        wanted = _SHARES * jobs if len(rows) >= _SHARES * jobs * _ENOUGH else jobs
        count = max(count, min(wanted, math.ceil(len(rows) / least)))
        count = math.ceil(count / jobs) * jobs if count > jobs else count
    return np.array_split(rows, min(count, len(rows))) if count else []
