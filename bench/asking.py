"""Several questions to a session, as many at a time as it has jobs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.bench.session import Session
from robustboard.defenses.adapter import Progress
from robustboard.errors import ModelError

T = TypeVar("T")

# Questions for each job: enough that an answer that is late does not leave the others idle.
_AHEAD = 4


@dataclass(frozen=True)
class Request:
    """One operation.

    Attributes:
        operation: its name.
        params: plain values.
        arrays: images (N, C, H, W), labels (N,) and the like.
        on_forwards: called with example-forwards as they happen, from whichever thread waits for the answer.
    """

    operation: str
    params: Mapping[str, Any]
    arrays: Mapping[str, Array]
    on_forwards: Callable[[int], None] | None = None


class OneAtATime:
    """Progress that several threads may tell of."""

    def __init__(self, inner: Progress) -> None:
        self._inner, self._lock = inner, threading.Lock()

    def begin(self, stage: str, total: int) -> None:
        """Begin a bar."""
        with self._lock:
            self._inner.begin(stage, total)

    def advance(self, steps: int = 1) -> None:
        """Move it."""
        with self._lock:
            self._inner.advance(steps)

    def note(self, **values: float) -> None:
        """Tell numbers."""
        with self._lock:
            self._inner.note(**values)


class Budget:
    """Moves a bar by one example's budget: as its work is told, and at its end by what was not needed."""

    def __init__(self, nodes: int, progress: Progress) -> None:
        self._left, self._progress = nodes, progress

    def advance(self, steps: int) -> None:
        """Tell of some work."""
        told = min(steps, self._left)
        self._left -= told
        self._progress.advance(told)

    def finish(self) -> None:
        """The example is done."""
        self.advance(self._left)


def asked(session: Session, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
    """The questions with their answers, in the order of the questions.

    No more questions are taken than keep the session's jobs at work. Who stops early leaves the rest unasked. After an
    error, what is at work is waited for; after an interrupt, the session ends.
    """
    return _each(session, requests, lambda request: (request, _ask(session, request)))


def attempted(session: Session, requests: Iterable[Request]) -> Iterator[Reply | ModelError]:
    """As `asked`, but what the model does not bear is given in place of an answer, and the rest is asked as well."""

    def attempt(request: Request) -> Reply | ModelError:
        try:
            return _ask(session, request)
        except ModelError as error:
            return error

    return _each(session, requests, attempt)


def _ask(session: Session, request: Request) -> Reply:
    return session.call(request.operation, request.params, request.arrays, on_forwards=request.on_forwards)


def _each(session: Session, requests: Iterable[Request], ask: Callable[[Request], T]) -> Iterator[T]:
    if session.jobs == 1:
        yield from map(ask, requests)
        return
    waiting = iter(requests)
    asking: deque[Future[T]] = deque()
    with ThreadPoolExecutor(session.jobs) as threads, interrupts_end(session):
        try:
            asking.extend(threads.submit(ask, request) for request in islice(waiting, _AHEAD * session.jobs))
            while asking:
                yield asking.popleft().result()
                asking.extend(threads.submit(ask, request) for request in islice(waiting, 1))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


class _Closable(Protocol):
    def close(self) -> None:
        """End what is at work."""


@contextmanager
def interrupts_end(session: _Closable) -> Iterator[None]:
    """Whoever interrupts what is done within does not wait for what is at work: the session ends."""
    try:
        yield
    except (Exception, GeneratorExit):
        raise
    except BaseException:
        session.close()
        raise
