"""A session with a model that lives in a process of its own: its code can neither crash the command nor read it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
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


class WorkerProcess:
    """Start a worker, talk to it, and end it with everything it started.

    Args:
        device: a torch device, such as `cpu` or `cuda:0`.
        threads: the threads of one operation.
        load_seconds: how long building a submitted model may take.
        silence_seconds: how long a model may work without finishing one forward pass.

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
    ) -> None:
        self._load_seconds = load_seconds
        self._silence_seconds = silence_seconds
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "robustboard.bench.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                # Idle threads sleep: where they spin for work, a second job on the machine slows both many times over.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        self._socket = ours
        self._channel = Channel(ours)
        reply = self._ask("start", {"device": device, "threads": threads}, {}, _START_SECONDS, NoProgress(), None)
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
        """End the process and everything that it started."""
        self._socket.close()
        # The group outlives its leader, so a model's own children end here too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
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
                match message.get("kind"):
                    case "done":
                        return Reply(
                            dict(message["values"]),
                            answer,
                            float(message["seconds"]),
                            int(message["forwards"]),
                            int(message["backwards"]),
                        )
                    case "error":
                        raise _error(message)
                    case "working":
                        if on_forwards is not None and message["forwards"]:
                            on_forwards(int(message["forwards"]))
                        if message["steps"]:
                            progress.advance(int(message["steps"]))
                    case "begin":
                        progress.begin(str(message["stage"]), int(message["total"]))
                    case "note":
                        progress.note(**{str(k): float(v) for k, v in message["values"].items()})
                    case other:
                        raise WorkerError(f"The model's process sent an unknown message {str(other)[:40]!r}.")
        except (KeyError, TypeError, ValueError) as error:
            raise WorkerError("The model's process sent a message that makes no sense; it is not used.") from error
        except TimeoutError as error:
            raise WorkerError(
                f"The model's process was silent for {patience:.0f} seconds during {operation} and was ended."
            ) from error
        except ChannelClosedError as error:
            raise WorkerError(f"The model's process {self._how_it_ended()} during {operation}.") from error

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode(errors="replace").strip().splitlines()
        return how + (f" (its last words: {lines[-1].strip()[:200]})" if lines else "")


def _error(message: Mapping[str, Any]) -> RobustBoardError:
    """The worker's error as ours; only the known classes exist, and a gate is never the worker's to raise."""
    known = getattr(errors, str(message.get("class")), WorkerError)
    is_ours = isinstance(known, type) and issubclass(known, RobustBoardError) and known is not errors.GateError
    return (known if is_ours else WorkerError)(str(message.get("message"))[:2000])
