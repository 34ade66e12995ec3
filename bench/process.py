"""A session with a model that lives in a process of its own: its code can neither crash the command nor read it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self

from robustboard import errors
from robustboard.bench.channel import Array, Channel, ChannelClosedError
from robustboard.bench.operations import Reply
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import RobustBoardError, WorkerError

LOAD_SECONDS = 60.0
SILENCE_SECONDS = 600.0

# Importing torch takes seconds on a cold disk; this is not the model's time.
_START_SECONDS = 300.0

_LAST_WORDS = 4000

ENVIRONMENT = {
    # Idle threads sleep: where they spin for work, a second job on the machine slows both many times over.
    "OMP_WAIT_POLICY": "PASSIVE",
    # What is freed stays with the process. Otherwise the GNU allocator hands the activations of every pass back to the
    # system and is given pages of zeros for the next: up to half of the time of an attack on a small network.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
}
"""What a worker's process is given, where the user has set nothing else."""


class Workers:
    """The workers of several jobs in threads, so that one failure or an interrupt can end them all at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[int] = set()
        self._ended = False

    def add(self, group: int) -> None:
        """Know of a worker's process group; it ends right away if the others have been ended."""
        with self._lock:
            self._live.add(group)
            if self._ended:
                _kill(group)

    def discard(self, group: int) -> None:
        """Forget a worker that is being closed."""
        with self._lock:
            self._live.discard(group)

    def end(self) -> None:
        """End all workers, those that are still to come included; their jobs fail with a `WorkerError`."""
        with self._lock:
            self._ended = True
            for group in self._live:
                _kill(group)


class WorkerProcess:
    """Start a worker, talk to it, and end it with everything it started.

    Args:
        device: a torch device, such as `cpu` or `cuda:0`.
        threads: the threads of one operation.
        load_seconds: how long building a submitted model may take.
        silence_seconds: how long a model may work without finishing one forward pass.
        workers: where to make this worker known.

    Attributes:
        jobs: one.
        lost: whether the process died or fell silent.

    Raises:
        WorkerError: from any method, when the process dies, hangs or talks nonsense.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        threads: int = 1,
        load_seconds: float = LOAD_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        workers: Workers | None = None,
    ) -> None:
        self.jobs = 1
        self.lost = False
        self._load_seconds = load_seconds
        self._silence_seconds = silence_seconds
        self._workers = workers or Workers()
        self._closed = False
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file of the current folder must not replace a module that the worker imports.
                [sys.executable, "-P", "-m", "robustboard.bench.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                start_new_session=True,
                env={**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self._socket = ours
        self._channel = Channel(ours)
        self._workers.add(self._process.pid)
        try:
            reply = self._ask("start", {"device": device, "threads": threads}, {}, _START_SECONDS, NoProgress(), None)
        except BaseException:
            self.close()
            raise
        self.device = str(reply.values["device"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def load(self, manifest: Path) -> Reply:
        """Build the submitted model and read its weights; the reply has the number of parameters."""
        return self._ask("load", {"manifest": str(manifest)}, {}, self._load_seconds, NoProgress(), None)

    def train(self, params: Mapping[str, Any], arrays: Mapping[str, Array], progress: Progress) -> Reply:
        """Train a built-in defense; the reply has the number of parameters, and the state as arrays."""
        return self._ask("train", params, arrays, self._silence_seconds, progress, None)

    def restore(self, state: Mapping[str, Array]) -> Reply:
        """Give the trained model other weights, strictly by name."""
        return self._ask("restore", {}, state, self._silence_seconds, NoProgress(), None)

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
        return self._ask(operation, params, arrays, patience, NoProgress(), on_forwards)

    def close(self) -> None:
        """End the process and everything that it started; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._workers.discard(self._process.pid)
        self._socket.close()
        # The group outlives its leader, so a model's own children end here too.
        _kill(self._process.pid)
        self._process.wait()
        self._log.close()

    def _ask(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        patience: float,
        progress: Progress,
        on_forwards: Callable[[int], None] | None,
    ) -> Reply:
        try:
            self._channel.send({"operation": operation, "params": dict(params)}, arrays)
            while True:
                message, answer = self._channel.receive(timeout=patience)
                reply, told = _understood(message, answer)
                if reply is not None:
                    return reply
                told(progress, on_forwards)
        except TimeoutError as error:
            self.lost = True
            raise WorkerError(
                f"The model's process was silent for {patience:.0f} seconds during {operation} and was ended."
            ) from error
        except ChannelClosedError as error:
            self.lost = True
            raise WorkerError(f"The model's process {self._how_it_ended()} during {operation}.") from error

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LAST_WORDS))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return how + (f" (its last words: {lines[-1].strip()[:200]})" if lines else "")


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
    """The worker's error as ours; only the known classes exist, and a gate is never the worker's to raise."""
    known = getattr(errors, name, WorkerError)
    is_ours = isinstance(known, type) and issubclass(known, RobustBoardError) and known is not errors.GateError
    sentence = " ".join(text[:2000].split())
    return (known if is_ours else WorkerError)(sentence)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
