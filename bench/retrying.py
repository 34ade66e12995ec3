"""A session that outlives its worker: one that is lost is replaced, and what it was asked is asked again.

An answer is a function of the question, so who gives it is all the same. What a live model says, an error included, is
never asked twice.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from robustboard.bench.channel import Array
from robustboard.bench.journal import Journal
from robustboard.bench.operations import Reply
from robustboard.bench.remote import Worker, Workers
from robustboard.bench.session import LEARNT
from robustboard.errors import LostWorkerError

RETRIES: Final = 2
"""How often the same thing is asked again. A model that ends its process every time is to be told so, and soon."""

SILENT_RETRIES: Final = 1
"""The same where the process fell silent, since noticing that takes minutes."""

LOST: Final = "A process of the model was lost"
"""How the note of `Losses` begins."""

# A record's note names so many ways in which processes were lost.
_MOST_WAYS = 5

T = TypeVar("T")


class Losses:
    """The workers that a run lost, for its record; those of earlier, killed runs of the same command included."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ways: list[str] = []
        self._journal: Journal | None = None

    def add(self, error: LostWorkerError) -> None:
        """Know of one more."""
        with self._lock:
            self._ways.append(error.how)
            if self._journal is not None:
                self._journal.remark(error.how)

    def kept_in(self, journal: Journal) -> None:
        """Take over what the journal knows of, and from now on keep there what comes."""
        with self._lock:
            earlier = journal.remarks()
            for way in self._ways:
                journal.remark(way)
            self._ways = [*earlier, *self._ways]
            self._journal = journal

    def notes(self) -> tuple[str, ...]:
        """A sentence for the record, if any was lost."""
        with self._lock:
            counts = Counter(self._ways)
        if not counts:
            return ()
        ways = [f"{count} x {way}" if len(counts) > 1 else way for way, count in counts.most_common(_MOST_WAYS)]
        times = f"{counts.total()} time{'s' if counts.total() > 1 else ''}"
        return (
            f"{LOST} {times} ({'; '.join(ways)}{'; ...' if len(counts) > _MOST_WAYS else ''}) "
            "and its work was asked again of a new one; no verdict depends on it.",
        )


class Retrying:
    """A session with a worker that is replaced where it is lost; called from one thread at a time, but for `close`.

    Args:
        start: starts a worker without a model, known to a group.
        workers: where to make all of them known. When that ends them, none is replaced.
        losses: told of each that is lost.

    Attributes:
        jobs: one.
        fill: brings the model into a worker that replaces another; None while there is no model yet.
    """

    def __init__(self, start: Callable[[Workers], Worker], workers: Workers, losses: Losses) -> None:
        self.jobs = 1
        self.fill: Callable[[Worker], object] | None = None
        self._start, self._outer, self._losses = start, workers, losses
        self._closed = False
        self._group = Workers()
        self._outer.add(self._group)
        self._worker: Worker | None = None
        self._learnt: Callable[[Worker], object] | None = None

    def do(self, work: Callable[[Worker], T]) -> T:
        """Do something with the worker, and from its beginning with a new one where it is lost.

        Raises:
            LostWorkerError: if that happens too often.
        """
        lost: list[LostWorkerError] = []
        while True:
            try:
                return work(self._ready())
            except LostWorkerError as error:
                self._drop()
                if self._closed or self._group.ended:
                    raise
                self._losses.add(error)
                lost.append(error)
                if len(lost) > RETRIES or sum(one.silent for one in lost) > SILENT_RETRIES:
                    raise _given_up(lost) from error

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Run one operation; see `Session.call`."""
        told = _Told(on_forwards)

        def ask(worker: Worker) -> Reply:
            told.again()
            return worker.call(operation, params, arrays, on_forwards=told)

        reply = self.do(ask)
        if operation in LEARNT:
            self._learnt = ask
        return reply

    def close(self) -> None:
        """End the worker, and any that is about to replace it; twice is harmless."""
        self._closed = True
        self._drop()
        self._group.end()
        self._outer.discard(self._group)

    def _ready(self) -> Worker:
        """The worker, or a new one that knows what the last one knew."""
        if self._worker is None:
            worker = self._start(self._group)
            try:
                for lesson in (self.fill, self._learnt):
                    if lesson is not None:
                        lesson(worker)
            except BaseException:
                # One that knows only a part must not be asked anything.
                worker.close()
                raise
            self._worker = worker
        return self._worker

    def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class _Told:
    """Passes on the forwards that are told, but not a second time those of what is asked again."""

    def __init__(self, on_forwards: Callable[[int], None] | None) -> None:
        self._on_forwards = on_forwards
        self._passed_on = self._now = 0

    def again(self) -> None:
        """The same operation begins anew."""
        self._now = 0

    def __call__(self, forwards: int) -> None:
        self._now += forwards
        if self._now > self._passed_on:
            more, self._passed_on = self._now - self._passed_on, self._now
            if self._on_forwards is not None:
                self._on_forwards(more)


def _given_up(lost: list[LostWorkerError]) -> LostWorkerError:
    last = lost[-1]
    return LostWorkerError(
        f"{str(last).removesuffix('.')}, {len(lost)} times in a row.", how=last.how, silent=last.silent
    )
