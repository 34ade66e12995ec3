"""Several processes with one and the same model, as one session that carries out as many operations at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from queue import Queue
from typing import Any

from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.bench.process import WorkerProcess

# What changes how a process answers later has to reach all of them.
_FOR_ALL = ("check",)


class Pool:
    """A session with the model of several workers; whoever is idle takes the next operation.

    Args:
        workers: with the same model in each. They belong to the caller, `close` ends them all the same.

    Attributes:
        jobs: how many there are.
    """

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self.jobs = len(workers)
        self._workers = tuple(workers)
        self._idle: Queue[WorkerProcess] = Queue()
        for worker in workers:
            self._idle.put(worker)

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Run one operation in an idle worker, or wait for one; from several threads at a time."""
        if operation in _FOR_ALL:
            replies = [worker.call(operation, params, arrays, on_forwards=on_forwards) for worker in self._workers]
            return replies[0]
        worker = self._idle.get()
        try:
            return worker.call(operation, params, arrays, on_forwards=on_forwards)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all workers; twice is harmless."""
        for worker in self._workers:
            worker.close()


@contextmanager
def started(count: int, make: Callable[[], WorkerProcess]) -> Iterator[list[WorkerProcess]]:
    """So many workers, all of which end with the context."""
    with ExitStack() as stack:
        yield [stack.enter_context(make()) for _ in range(count)]
