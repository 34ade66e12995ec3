"""A model in another process, spoken to by messages: what one on this machine and one on a cluster have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, Self

from robustboard import errors
from robustboard.bench.channel import Array
from robustboard.bench.operations import Reply
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import RobustBoardError, WorkerError

LOAD_SECONDS: Final = 60.0
SILENCE_SECONDS: Final = 600.0

START_SECONDS: Final = 300.0
"""Importing torch takes seconds on a cold disk; this is not the model's time."""

LAST: Final = ("done", "error")
"""The kinds of the message that ends an operation."""

Message = tuple[Mapping[str, Any], dict[str, Array]]


class _Ends(Protocol):
    def end(self) -> None:
        """End at once; called from any thread, and harmless when it has ended."""


class Workers:
    """Workers, or groups of them, so that one failure or an interrupt can end them all at once.

    Attributes:
        ended: whether they have been ended on purpose.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[_Ends] = set()
        self.ended = False

    def add(self, member: _Ends) -> None:
        """Know of a worker; it ends right away if the others have been ended."""
        with self._lock:
            self._live.add(member)
            if self.ended:
                member.end()

    def discard(self, member: _Ends) -> None:
        """Forget a worker that is being closed."""
        with self._lock:
            self._live.discard(member)

    def end(self) -> None:
        """End all workers, those that are still to come included; their jobs fail with a `WorkerError`."""
        with self._lock:
            self.ended = True
            for member in self._live:
                member.end()


class Worker(ABC):
    """A session with a model in another process; how messages get there and back is for those below to say.

    Args:
        load_seconds: how long building a submitted model may take.
        silence_seconds: how long a model may work without finishing one forward pass.

    Attributes:
        jobs: one.
        device: the name of what it runs on.

    Raises:
        WorkerError: from any method, when the process talks nonsense.
        LostWorkerError: from any method, when the process dies or hangs.
    """

    device: str

    def __init__(self, *, load_seconds: float, silence_seconds: float) -> None:
        self.jobs = 1
        self._load_seconds = load_seconds
        self._silence_seconds = silence_seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def load(self, manifest: Path) -> Reply:
        """Build the submitted model and read its weights; the reply has the number of parameters."""
        return self._ask("load", {"manifest": str(manifest)}, {}, self._load_seconds)

    def train(self, params: Mapping[str, Any], arrays: Mapping[str, Array], progress: Progress) -> Reply:
        """Train a built-in defense; the reply has the number of parameters, and the state as arrays."""
        return self._ask("train", params, arrays, self._silence_seconds, progress)

    def restore(self, state: Mapping[str, Array]) -> Reply:
        """Give the trained model other weights, strictly by name."""
        return self._ask("restore", {}, state, self._silence_seconds)

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Run one operation over there; see `Session.call`."""
        patience = self._load_seconds if operation == "check" else self._silence_seconds
        return self._ask(operation, params, arrays, patience, on_forwards=on_forwards)

    @abstractmethod
    def messages(
        self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array], patience: float
    ) -> Iterator[Message]:
        """Ask for an operation, and give each message that comes of it up to the last.

        Args:
            operation: its name.
            params: plain values.
            arrays: as of `Session.call`.
            patience: seconds of silence that are too long.
        """

    @abstractmethod
    def end(self) -> None:
        """End the process and everything that it started at once, from any thread."""

    @abstractmethod
    def close(self) -> None:
        """End the process and let go of all that it took; twice is harmless."""

    def _ask(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        patience: float,
        progress: Progress | None = None,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        for message, answer in self.messages(operation, params, arrays, patience):
            reply, told = _understood(message, answer)
            if reply is not None:
                return reply
            told(progress or NoProgress(), on_forwards)
        raise WorkerError(f"The model's process gave no answer to {operation}.")


# What is wrong with a model, its files, its training or its settings is found out over there, and nothing else is: a
# model's own code could raise whatever it likes.
_FOUND_THERE = (
    errors.BoundsError,
    errors.DataError,
    errors.DefenseError,
    errors.ModelError,
    errors.OutputError,
    errors.SubmissionError,
    errors.TrackError,
    errors.WorkerError,
)

_Told = Callable[[Progress, Callable[[int], None] | None], None]


def _understood(message: Mapping[str, Any], answer: dict[str, Array]) -> tuple[Reply | None, _Told]:
    """What a message means: the reply that ends the operation, or something to tell the progress bar.

    Raises:
        RobustBoardError: the worker's own error.
        WorkerError: if the message makes no sense.
    """
    try:
        match message["kind"]:
            case "done":
                costs = float(message["seconds"]), int(message["forwards"]), int(message["backwards"])
                return Reply(dict(message["values"]), answer, *costs), _tell_nothing
            case "error":
                error = _error(str(message["class"]), str(message["message"]))
            case "working":
                return None, _tell_work(int(message["forwards"]), int(message["steps"]))
            case "begin":
                return None, _tell_begin(str(message["stage"]), int(message["total"]))
            case "note":
                return None, _tell_note({str(name): float(value) for name, value in message["values"].items()})
            case other:
                error = WorkerError(f"The model's process sent an unknown message {str(other)[:40]!r}.")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as damage:
        raise WorkerError("The model's process sent a message that makes no sense; it is not used.") from damage
    raise error


def _tell_nothing(progress: Progress, on_forwards: Callable[[int], None] | None) -> None:
    del progress, on_forwards


def _tell_work(forwards: int, steps: int) -> _Told:
    def tell(progress: Progress, on_forwards: Callable[[int], None] | None) -> None:
        if on_forwards is not None and forwards:
            on_forwards(forwards)
        if steps:
            progress.advance(steps)

    return tell


def _tell_begin(stage: str, total: int) -> _Told:
    return lambda progress, _: progress.begin(stage, total)


def _tell_note(values: Mapping[str, float]) -> _Told:
    return lambda progress, _: progress.note(**values)


def _error(name: str, text: str) -> RobustBoardError:
    """The worker's error as ours."""
    kind: type[RobustBoardError] = next((known for known in _FOUND_THERE if known.__name__ == name), WorkerError)
    return kind(" ".join(text[:2000].split()))
