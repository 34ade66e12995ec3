"""Timing a training by the progress that it tells of, and ending one that has been watched for long enough."""

from __future__ import annotations

import time


class EnoughError(Exception):
    """Ends a training that has been watched for long enough."""


class Laps:
    """A `Progress` that times the stages of a training.

    Args:
        limit: after so many seconds of a stage the training is ended, by an error that its progress raises.
    """

    def __init__(self, limit: float | None = None) -> None:
        self._limit = limit
        self._began = time.perf_counter()
        self._laps: list[tuple[str, float]] = []
        self._total = self._done = 0
        # The first step pays for what is set up once.
        self._first: float | None = None
        self._last = 0.0

    def begin(self, stage: str, total: int) -> None:
        """A stage begins."""
        self._laps.append((stage, time.perf_counter()))
        self._total, self._done, self._first = total, 0, None

    def advance(self, steps: int = 1) -> None:
        """Some steps are done.

        Raises:
            EnoughError: when the limit is reached.
        """
        now = self._last = time.perf_counter()
        if self._first is None:
            self._first = now
            return
        self._done += steps
        if self._limit is not None and now - self._laps[-1][1] > self._limit:
            raise EnoughError

    def note(self, **values: float) -> None:
        """Nothing of interest."""

    def by_stage(self, seconds: float) -> dict[str, float]:
        """Seconds by stage of a training that took so long in all; what came before the first stage is called ""."""
        ends = [begin for _, begin in self._laps[1:]] + [self._began + seconds]
        if not self._laps:
            return {"": 0.0, "training": seconds}
        found = {"": self._laps[0][1] - self._began}
        for (stage, begin), end in zip(self._laps, ends, strict=True):
            found[stage] = found.get(stage, 0.0) + end - begin
        return found

    def extrapolated(self) -> float:
        """Seconds that the watched stage takes to its end, by the pace of its steps after the first."""
        if self._first is None:
            return 0.0
        if not self._done:
            return self._first - self._began
        return self._first - self._began + self._total * (self._last - self._first) / self._done
