"""What lives on a node of a Ray cluster: it starts the model's process there, and passes its messages on.

The model's code runs in a process of its own here too, so that it can neither crash Ray's worker nor speak in its name.
Nothing of this module imports Ray.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from robustboard.bench.channel import Array, decoded, encoded
from robustboard.bench.environment import installed, source_sha256
from robustboard.bench.process import WorkerProcess
from robustboard.errors import LostWorkerError, RobustBoardError, SubmissionError
from robustboard.files import replace_file

LOST = "lost"
"""The kind of the message that says that the model's process is gone."""

# No tensor of a state is named so.
_CHECKPOINT = "checkpoint: "


def software() -> dict[str, str]:
    """Everything installed here that an answer can depend on, by name, with its version."""
    return {**installed(), "the source of robustboard": source_sha256()}


def packed_checkpoints(folder: Path) -> dict[str, Array]:
    """The files of a training's checkpoints as arrays, to travel beside others."""
    return {_CHECKPOINT + path.name: np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.glob("*.pt"))}


def parted(arrays: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays without the checkpoints that travel among them, and those."""
    checkpoints = {name: array for name, array in arrays.items() if name.startswith(_CHECKPOINT)}
    return {name: array for name, array in arrays.items() if name not in checkpoints}, checkpoints


def write_checkpoints(folder: Path, checkpoints: Mapping[str, Array]) -> None:
    """Unpack what `packed_checkpoints` made."""
    for name, content in checkpoints.items():
        path = folder / Path(name.removeprefix(_CHECKPOINT)).name
        replace_file(path, partial(_write, content.astype(np.uint8, copy=False).tobytes()))


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


class Host:
    """The actor of one worker."""

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None
        # Ray's own folder of this run on this node: where this process is killed, it goes with that.
        self._folder = tempfile.TemporaryDirectory(prefix="robustboard-", dir=Path.cwd())

    def software(self) -> dict[str, str]:
        """See `software`; an answer also says that the node has room."""
        return software()

    def ask(self, message: bytes) -> Iterator[bytes]:
        """Carry out one request, as `Worker.messages` does; every message is passed on as it comes."""
        header, arrays = decoded(message)
        try:
            yield from self._answers(header["operation"], header["params"], arrays, header["patience"])
        except LostWorkerError as error:
            yield encoded({"kind": LOST, "message": str(error), "how": error.how, "silent": error.silent}, {})
        except RobustBoardError as error:
            yield encoded({"kind": "error", "class": type(error).__name__, "message": str(error)}, {})

    def close(self) -> None:
        """End the model's process, and take away what was brought for it."""
        if self._process is not None:
            self._process.close()
        self._folder.cleanup()

    def _answers(
        self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array], patience: float
    ) -> Iterator[bytes]:
        if operation == "start":
            self._process = WorkerProcess(device=params["device"], threads=params["threads"])
            costs = {"seconds": 0.0, "forwards": 0, "backwards": 0}
            yield encoded({"kind": "done", "values": {"device": self._process.device}, **costs}, {})
            return
        if self._process is None:
            raise LostWorkerError("The model's process was not started.")
        if operation == "load":
            params, arrays = {"manifest": str(self._written(params["manifest"], arrays))}, {}
        away = None
        if operation == "train":
            arrays, checkpoints = parted(arrays)
            if not Path(params["run"]).is_dir():
                away = Path(self._folder.name) / "checkpoints"
                write_checkpoints(away, checkpoints)
                params = {**params, "checkpoints": str(away)}
        for header, answer in self._process.messages(operation, params, arrays, patience):
            comes_back = packed_checkpoints(away) if away is not None and header.get("kind") == "done" else {}
            yield encoded(header, {**answer, **comes_back})

    def _written(self, manifest: str, files: Mapping[str, Array]) -> Path:
        """Write a submission's files into a folder of this node; returns the path of its manifest."""
        folder = Path(self._folder.name).resolve() / "submission"
        for name, content in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder):
                raise SubmissionError(f"{name[:80]!r} leads out of the submission's folder; keep every file inside it.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.astype(np.uint8, copy=False).tobytes())
        return folder / manifest
