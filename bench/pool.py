"""Several sessions with one and the same model, as one that carries out as many operations at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import Queue
from typing import Any

from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.bench.session import LEARNT, Session


class Pool:
    """A session with the model of several sessions; whoever is idle takes the next operation.

    Args:
        members: with the same model in each. They belong to the caller, `close` ends them all the same.

    Attributes:
        jobs: how many there are.
    """

    def __init__(self, members: Sequence[Session]) -> None:
        self.jobs = len(members)
        self._members = tuple(members)
        self._idle: Queue[Session] = Queue()
        for member in members:
            self._idle.put(member)

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Ask one that is idle, or wait for one; from several threads at a time."""
        if operation in LEARNT:
            replies = [member.call(operation, params, arrays, on_forwards=on_forwards) for member in self._members]
            return replies[0]
        member = self._idle.get()
        try:
            return member.call(operation, params, arrays, on_forwards=on_forwards)
        finally:
            self._idle.put(member)

    def close(self) -> None:
        """End all of them; twice is harmless."""
        for member in self._members:
            member.close()
