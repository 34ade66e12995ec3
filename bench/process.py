"""A session with a model that lives in a process of its own: its code can neither crash the command nor read it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from robustboard.bench.channel import Array, Channel, ChannelClosedError
from robustboard.bench.remote import LAST, LOAD_SECONDS, SILENCE_SECONDS, START_SECONDS, Message, Worker, Workers
from robustboard.errors import LostWorkerError

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


class WorkerProcess(Worker):
    """Start a worker on this machine, talk to it, and end it with everything it started.

    Args:
        device: a torch device, such as `cpu` or `cuda:0`.
        threads: the threads of one operation.
        load_seconds: as of `Worker`.
        silence_seconds: as of `Worker`.
        workers: where to make this worker known.
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
        super().__init__(load_seconds=load_seconds, silence_seconds=silence_seconds)
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
                env=_environment(threads),
            )
        self._socket = ours
        self._channel = Channel(ours)
        self._workers.add(self)
        try:
            reply = self._ask("start", {"device": device, "threads": threads}, {}, START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.device = str(reply.values["device"])

    def messages(
        self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array], patience: float
    ) -> Iterator[Message]:
        """Ask over the socket; see `Worker.messages`."""
        try:
            self._channel.send({"operation": operation, "params": dict(params)}, arrays)
            while True:
                message, answer = self._channel.receive(timeout=patience)
                yield message, answer
                if message.get("kind") in LAST:
                    return
        except TimeoutError as error:
            how = f"silent for {patience:.0f} seconds during {operation}"
            raise LostWorkerError(f"The model's process was {how} and was ended.", how=how, silent=True) from error
        except ChannelClosedError as error:
            how, last_words = self._how_it_ended()
            raise LostWorkerError(
                f"The model's process {how} during {operation}{last_words}.",
                how=f"{how.removeprefix('was ')} during {operation}",
            ) from error

    def end(self) -> None:
        """End the process, and the group of those that it started, at once."""
        # The group outlives its leader, so a model's own children end here too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and everything that it started; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._workers.discard(self)
        self._socket.close()
        self.end()
        self._process.wait()
        self._log.close()

    def _how_it_ended(self) -> tuple[str, str]:
        """What became of the process, and the last line that it wrote, in brackets."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection", ""
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LAST_WORDS))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return how, (f" (its last words: {lines[-1].strip()[:200]})" if lines else "")


def _environment(threads: int) -> dict[str, str]:
    """What the process finds in its environment; what opens a Ray cluster is none of a model's business."""
    # Copied at once: another thread may change the environment meanwhile.
    kept = {name: value for name, value in os.environ.copy().items() if not name.startswith("RAY_")}
    return {**ENVIRONMENT, **kept, "OMP_NUM_THREADS": str(threads)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
