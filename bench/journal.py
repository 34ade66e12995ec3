"""The journal of a run: every answer of the model's process, kept on the disk before anything rests on it.

An evaluation is a function of the answers that it gets, so a run that was killed at any moment continues by asking the
same questions again: what was answered before is read from the journal, and the first question that is not in it goes
to the model. The outcome table is then the one of a run that was never killed, and so are the costs in its record.

The file holds a head, which names what the answers belong to, and segments, each with its length and its sha256. A
segment is flushed to the disk before its answer is used. What a kill or a power cut leaves of the last one fails its
checksum and is dropped. A journal that belongs to another model, other software or another device is begun anew.

The second pass over the stored adversarial images, which ends every run, asks the model itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from robustboard.bench.channel import Array, decoded, encoded
from robustboard.bench.operations import Reply
from robustboard.bench.session import LEARNT, Session
from robustboard.errors import OutputError, WorkerError
from robustboard.files import remove_leftovers

FILE = "journal.bin"
LOCK = ".lock"

# The files that a run makes or replaces as a whole.
_WRITTEN = (
    "model.safetensors",
    "adversarial.npz",
    "seed-breaks.npz",
    "checkpoints/*.pt",
    "surrogates/*/*.pt",
    "record.owed.json",
    "challenged-*.owed.json",
)

_HEAD = struct.Struct("<4s32s")
_MAGIC = b"RBj1"
_SEGMENT = struct.Struct("<Q32s")
_LARGEST = 16 << 30
_REMARK = hashlib.sha256(b"a remark").digest()


class Journal:
    """Answers by question, on the disk; each is given back once.

    Args:
        path: the file, which is made where there is none.
        identity: what the answers depend on beside the questions; a file of another identity is begun anew.

    Raises:
        OutputError: if the file cannot be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._kept: dict[bytes, deque[tuple[int, int]]] = defaultdict(deque)
        # Without an answer there is nothing to go on from.
        self._answers = 0
        self._head = _HEAD.pack(_MAGIC, hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._refused(error) from error
        try:
            self._end = self._scan()
            os.ftruncate(self._file, self._end)
            if not self._end:
                self._append(self._head)
        except OSError as error:
            os.close(self._file)
            raise self._refused(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        # A thread that comes late must not write to whatever file is given this number next.
        with self._lock:
            if not self._answers:
                self.remove()
            os.close(self._file)
            self._file = -1

    def __len__(self) -> int:
        """How many answers are kept that nobody has asked for yet."""
        return sum(len(places) for places in self._kept.values())

    def recall(self, question: bytes) -> Reply | None:
        """The earliest answer to a question, by its digest, that was not given back yet."""
        with self._lock:
            places = self._kept.get(question)
            if not places:
                return None
            offset, length = places.popleft()
            header, arrays = decoded(self._read(length, offset))
        return Reply(
            header["values"], arrays, float(header["seconds"]), int(header["forwards"]), int(header["backwards"])
        )

    def keep(self, question: bytes, reply: Reply) -> None:
        """Write an answer, and wait until it is on the disk.

        Raises:
            OutputError: if it does not get there; what was written before stays.
        """
        header = {
            "question": question.hex(),
            "values": reply.values,
            "seconds": reply.seconds,
            "forwards": reply.forwards,
            "backwards": reply.backwards,
        }
        payload = encoded(header, reply.arrays)
        try:
            decoded(payload)
        except WorkerError:
            return  # too large to be read again; it is asked for again instead
        segment = _SEGMENT.pack(len(payload), hashlib.sha256(payload).digest()) + payload
        with self._lock:
            try:
                self._append(segment)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise self._refused(error) from error
            self._answers += question != _REMARK

    def remark(self, text: str) -> None:
        """Write what is to be known of the run beside its answers.

        Raises:
            OutputError: as for `keep`.
        """
        self.keep(_REMARK, Reply({"text": text}, {}))

    def remarks(self) -> list[str]:
        """The remarks of earlier runs, in order; each is given once."""
        found = []
        while (one := self.recall(_REMARK)) is not None:
            found.append(str(one.values["text"]))
        return found

    def remove(self) -> None:
        """Take the file away, when the run's record is written."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _append(self, content: bytes) -> None:
        written = 0
        while written < len(content):
            written += os.pwrite(self._file, memoryview(content)[written:], self._end + written)
        os.fsync(self._file)
        self._end += written

    def _scan(self) -> int:
        """Find the segments that are whole; returns where the last of them ends, 0 if the head is another."""
        size = os.fstat(self._file).st_size
        if os.pread(self._file, _HEAD.size, 0) != self._head:
            return 0
        end = _HEAD.size
        while True:
            prefix = os.pread(self._file, _SEGMENT.size, end)
            if len(prefix) < _SEGMENT.size:
                return end
            length, checksum = _SEGMENT.unpack(prefix)
            first = end + _SEGMENT.size
            if length > min(_LARGEST, size - first):
                return end
            payload = self._read(length, first)
            if hashlib.sha256(payload).digest() != checksum:
                return end
            try:
                question = bytes.fromhex(decoded(payload)[0]["question"])
            except (WorkerError, KeyError, ValueError, TypeError):
                return end
            self._kept[question].append((first, length))
            self._answers += question != _REMARK
            end = first + length

    def _read(self, length: int, offset: int) -> bytes:
        # The system hands out no more than two gigabytes at a time.
        parts, done = [], 0
        while done < length and (part := os.pread(self._file, length - done, offset + done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"The journal {self._path} cannot be written: {error.strerror or error}. What it holds is kept; the same "
            "command goes on from there."
        )


class Journaled:
    """A session whose answers are kept, and are not asked for again where they are known.

    Args:
        inner: who answers.
        journal: keeps.

    Attributes:
        jobs: as the inner session's.
    """

    def __init__(self, inner: Session, journal: Journal) -> None:
        self.jobs = inner.jobs
        self._inner, self._journal = inner, journal

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Recall the answer, or ask for it and keep it."""
        if operation in LEARNT:
            return self._inner.call(operation, params, arrays, on_forwards=on_forwards)
        question = hashlib.sha256(encoded({"operation": operation, "params": dict(params)}, arrays)).digest()
        known = self._journal.recall(question)
        if known is not None:
            if on_forwards is not None:
                on_forwards(known.forwards)
            return known
        reply = self._inner.call(operation, params, arrays, on_forwards=on_forwards)
        self._journal.keep(question, reply)
        return reply

    def close(self) -> None:
        """End the inner session."""
        self._inner.close()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run directory for this process alone; the lock goes with the process, however it ends.

    Half-written files of a process that was killed here are removed. A folder that is made for this and still empty at
    the end goes too.

    Raises:
        OutputError: if another process holds it, or it cannot be made.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]
    handle = _locked(folder)
    try:
        for pattern in _WRITTEN:
            remove_leftovers(folder, pattern)
        yield
    finally:
        # First the file, then the lock: whoever opened the file in between sees that it is no longer there.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


def _locked(folder: Path) -> int:
    """The file descriptor of the folder's lock."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"The run directory {folder} cannot be written: {error.strerror or error}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
            os.close(handle)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise OutputError(
                    f"Another process is at work in {folder}; wait for it, or choose another --run-dir."
                ) from error
            raise OutputError(f"The run directory {folder} cannot be locked: {error.strerror or error}.") from error
