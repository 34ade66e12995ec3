"""A session with a model on a node of a Ray cluster: the messages of a local one, carried by an actor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorDiedError, RayError

from robustboard.bench.channel import Array, decoded, encoded
from robustboard.bench.operations import Reply
from robustboard.bench.ray_host import LOST, Host, packed_checkpoints, parted, write_checkpoints
from robustboard.bench.remote import LAST, SILENCE_SECONDS, START_SECONDS, Message, Worker, Workers
from robustboard.defenses.adapter import Progress
from robustboard.defenses.submission import read_manifest
from robustboard.errors import ClusterError, LostWorkerError, NoRoomError, first_line

# The node ends a silent process itself; so much later nothing came from the node either.
_NODE_SECONDS = 60.0
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class Needs:
    """What one worker takes of its node, and what it is told.

    Attributes:
        device: a torch device.
        threads: cores, and threads of the model's process.
        gpus: GPUs; Ray hands out which, and the model's process sees no other.
        load_seconds: as of `Worker`.
        silence_seconds: as of `Worker`.
        software: what has to be installed there; see `ray_host.software`.
    """

    device: str
    threads: int
    gpus: float
    load_seconds: float
    software: Mapping[str, str]
    silence_seconds: float = SILENCE_SECONDS


class RayWorker(Worker):
    """Start a worker somewhere on the connected cluster, as soon as a node has room.

    Args:
        needs: what it takes.
        workers: where to make it known.
        room_seconds: how long to wait until a node has room.

    Raises:
        NoRoomError: if none has.
        ClusterError: if the node has other software.
    """

    def __init__(self, needs: Needs, *, workers: Workers | None = None, room_seconds: float = START_SECONDS) -> None:
        super().__init__(load_seconds=needs.load_seconds, silence_seconds=needs.silence_seconds)
        self._workers = workers or Workers()
        self._closed = self._busy = False
        # Never restarted by Ray: a new process has to be brought the model first.
        actor = ray.remote(Host).options(
            num_cpus=needs.threads, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0
        )
        self._host = actor.remote()
        self._workers.add(self)
        try:
            _require_same(self._software(room_seconds), needs.software)
            settings = {"device": needs.device, "threads": needs.threads}
            reply = self._ask("start", settings, {}, START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.device = str(reply.values["device"])

    def load(self, manifest: Path) -> Reply:
        """Bring the submission's files to the node, which need not see this machine's, and build the model there."""
        submission = read_manifest(manifest)
        files = {name: np.frombuffer(path.read_bytes(), np.uint8) for name, path in submission.files.items()}
        return self._ask("load", {"manifest": submission.manifest.name}, files, self._load_seconds)

    def train(self, params: Mapping[str, Any], arrays: Mapping[str, Array], progress: Progress) -> Reply:
        """Train over there, in the run directory where the node sees it; else its checkpoints travel."""
        folder = Path(params["checkpoints"]).absolute()
        places = {"checkpoints": str(folder), "run": str(folder.parent)}
        reply = super().train({**params, **places}, {**arrays, **packed_checkpoints(folder)}, progress)
        state, checkpoints = parted(reply.arrays)
        write_checkpoints(folder, checkpoints)
        return replace(reply, arrays=state)

    def messages(
        self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array], patience: float
    ) -> Iterator[Message]:
        """Ask through the actor; see `Worker.messages`."""
        request = encoded({"operation": operation, "params": dict(params), "patience": patience}, arrays)
        self._busy = True
        try:
            answers = self._host.ask.options(num_returns="streaming").remote(request)
            while True:
                ready, _ = ray.wait([answers], timeout=patience + _NODE_SECONDS)
                if not ready:
                    how = f"silent for {patience + _NODE_SECONDS:.0f} seconds during {operation}"
                    raise LostWorkerError(f"A node of the cluster was {how}.", how=how, silent=True)
                header, answer = decoded(ray.get(next(answers)))
                if header.get("kind") == LOST:
                    raise LostWorkerError(str(header["message"]), how=str(header["how"]), silent=bool(header["silent"]))
                self._busy = header.get("kind") not in LAST
                yield header, answer
                if not self._busy:
                    return
        except StopIteration:
            return
        except RayError as error:
            raise _lost(error, operation) from error

    def end(self) -> None:
        """End the actor at once; the model's process ends with it."""
        with contextlib.suppress(Exception):
            ray.kill(self._host)

    def close(self) -> None:
        """End the process and the actor; twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._workers.discard(self)
        if not self._busy:
            with contextlib.suppress(Exception):
                ray.get(self._host.close.remote(), timeout=_CLOSE_SECONDS)
        self.end()

    def _software(self, room_seconds: float) -> Mapping[str, str]:
        try:
            found: Mapping[str, str] = ray.get(self._host.software.remote(), timeout=room_seconds)
        except TimeoutError as error:
            raise NoRoomError(
                f"No node of the cluster had room for another process within {room_seconds:.0f} seconds; give fewer "
                "--jobs, or wait for the others that use it."
            ) from error
        except ActorDiedError as error:
            if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                raise ClusterError(
                    "A node of the cluster cannot import robustboard; install the same version there, in the "
                    "environment that Ray runs in."
                ) from error
            raise _lost(error, "start") from error
        except RayError as error:
            raise _lost(error, "start") from error
        return found


def _require_same(there: Mapping[str, str], here: Mapping[str, str]) -> None:
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if names:
        first = names[0]
        raise ClusterError(
            f"A node of the cluster has {first} {there.get(first, 'not installed')[:20]} where this machine has "
            f"{here.get(first, 'none')[:20]} ({len(names)} difference{'s' if len(names) > 1 else ''}), so verdicts "
            "could differ; install the same there."
        )


def _lost(error: RayError, operation: str) -> LostWorkerError:
    return LostWorkerError(
        f"A worker of the Ray cluster was lost during {operation} ({first_line(error)}).",
        how=f"gone with its Ray actor or node during {operation}",
    )
