"""Several sessions with one and the same model, as one session that carries out as many operations at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

from robustboard.bench.asking import interrupts_end
from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.bench.session import LEARNT, Session
from robustboard.errors import NoRoomError

_NOBODY = "All workers of the cluster are lost, and there is no room for others; the same command goes on from here."


class Pool:
    """A session with the model of several sessions; whoever is idle takes the next operation.

    A member that has lost its worker for good leaves the pool, and the others do its work.

    Args:
        members: with the same model in each. They belong to the caller, `close` ends them all the same.

    Attributes:
        jobs: how many there are.
    """

    def __init__(self, members: Sequence[Session]) -> None:
        self.jobs = len(members)
        self._members = tuple(members)
        self._lock = threading.Lock()
        self._serving = len(members)
        # None is for those who wait in vain.
        self._idle: Queue[Session | None] = Queue()
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
        """Ask one that is idle, or wait for one; from several threads at a time.

        Raises:
            NoRoomError: if the last of them has lost its worker for good.
        """
        if operation in LEARNT:
            return self._everybody(lambda member: member.call(operation, params, arrays, on_forwards=on_forwards))
        while True:
            member = self._idle.get()
            if member is None:
                self._idle.put(None)
                raise NoRoomError(_NOBODY)
            try:
                reply = member.call(operation, params, arrays, on_forwards=on_forwards)
            except NoRoomError:
                self._leave(member)
                continue
            except BaseException:
                self._idle.put(member)
                raise
            self._idle.put(member)
            return reply

    def _everybody(self, ask: Callable[[Session], Reply]) -> Reply:
        """What every member has to learn; it is asked while nothing else is."""

        def attempt(member: Session) -> Reply | None:
            try:
                reply = ask(member)
            except NoRoomError:
                self._leave(member)
                return None
            self._idle.put(member)
            return reply

        members = [member for member in [self._idle.get() for _ in range(self._serving)] if member is not None]
        with ThreadPoolExecutor(max(1, len(members))) as threads, interrupts_end(self):
            replies = [reply for reply in threads.map(attempt, members) if reply is not None]
        if not replies:
            raise NoRoomError(_NOBODY)
        return replies[0]

    def _leave(self, member: Session) -> None:
        """Go on without a member; without the last, whoever waits waits in vain."""
        member.close()
        with self._lock:
            self._serving -= 1
            if not self._serving:
                self._idle.put(None)

    def close(self) -> None:
        """End all of them; twice is harmless."""
        for member in self._members:
            member.close()
