"""Calls to a store that may be away for a while: which failures heal by themselves, and how long to wait for that.

What heals is that nobody answers, or that the answer is "not now" (5xx, 408, 429). What the store refuses, such as
wrong credentials or a parameter that it does not know, it will refuse again, so that is raised at once.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from robustboard.errors import TrackingError

SECONDS = "ROBUSTBOARD_MLFLOW_SECONDS"
"""The environment variable that says how long a store may be away before what it is owed is left for later."""

_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0

_NOBODY_ANSWERS = {
    "requests.ConnectionError",
    "requests.Timeout",
    "requests.RetryError",
    "requests.ChunkedEncodingError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "sqlalchemy.OperationalError",
    "builtins.ConnectionError",
    "builtins.TimeoutError",
}
# MLflow's names of 503, 504 and 429.
_NOT_NOW = {"TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}
_NOT_NOW_STATUS = {408, 429, 500, 502, 503, 504}
# INTERNAL_ERROR is what MLflow calls all that it has no name for, a broken connection included.
_UNNAMED = "INTERNAL_ERROR"
# Databases say in one breath that they are away and that they do not know who asks.
_REFUSED = re.compile(
    r"authentication failed|no pg_hba\.conf entry|no password supplied|access denied|permission denied|"
    r'(role|database) "[^"]*" does not exist|unknown database|certificate',
    re.IGNORECASE,
)

# Two runs that end together both look for the track's data set, and both make it; the second finds it next time.
_RACED = re.compile(
    r'UNIQUE constraint failed: datasets\.|unique constraint "dataset_pk"|Duplicate entry .* for key .*dataset'
)


def is_away(error: BaseException) -> bool:
    """Whether the same call may succeed later without anything being corrected.

    Examples:
        >>> is_away(ConnectionRefusedError()), is_away(PermissionError())
        (True, False)
    """
    chain = list(_causes(error))
    if any(_RACED.search(str(one)) for one in chain):
        return True
    return not any(_refuses(one) for one in chain) and any(_may_heal(one) for one in chain)


class Patient:
    """A client each of whose calls is repeated, with growing pauses, while the store is away.

    A call whose answer was lost is made twice, so only what may be done twice is to be asked for through this.

    Args:
        client: whose methods are called.
        seconds: how long the store may be away at a time.
        sleep: waits.
        clock: tells seconds.

    Attributes:
        once: the client itself, for a call that is not worth waiting for.
    """

    def __init__(
        self,
        client: Any,
        seconds: float,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.once = client
        self._seconds, self._sleep, self._clock = seconds, sleep, clock

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(self.once, name))

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begun, pause = self._clock(), _FIRST_PAUSE
        while True:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not is_away(error) or self._clock() + pause > begun + self._seconds:
                    raise
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def patience() -> float:
    """How many seconds a store may be away at a time: a minute, or what the environment says.

    Raises:
        TrackingError: if the environment says no number.
    """
    given = os.environ.get(SECONDS, "").strip()
    try:
        seconds = float(given or _SECONDS)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise TrackingError(f"{SECONDS} takes a number of seconds from 0, such as 60, not {given!r}.")
    return seconds


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _refuses(error: BaseException) -> bool:
    code, status = getattr(error, "error_code", None), _status(error)
    return (
        (isinstance(code, str) and code not in {*_NOT_NOW, _UNNAMED})
        or (status is not None and status not in _NOT_NOW_STATUS)
        # A local database that is busy is free again soon; one that is full or damaged stays so.
        or (isinstance(error, sqlite3.Error) and "locked" not in str(error))
        or _REFUSED.search(str(error)) is not None
    )


def _may_heal(error: BaseException) -> bool:
    # By name, as none of these libraries needs to be there.
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return (
        bool(kinds & _NOBODY_ANSWERS)
        or getattr(error, "error_code", None) in _NOT_NOW
        or _status(error) in _NOT_NOW_STATUS
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer that was no success."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
