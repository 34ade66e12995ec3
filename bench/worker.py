"""The process that runs a model's code: it loads or trains one classifier, then answers operations until told to end.

Started by `WorkerProcess` as `python -m robustboard.bench.worker FD`. Its standard output goes to its log: a model that
prints cannot spoil the command's own output.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.channel import Array, Channel, ChannelClosedError
from robustboard.bench.operations import Operations, Reply
from robustboard.defenses import registry, submission
from robustboard.defenses.adapter import Split, TrainingData
from robustboard.defenses.checkpoints import CheckpointStore
from robustboard.errors import DefenseError, ModelError, RobustBoardError, WorkerError, first_line

_SIGN_OF_LIFE_SECONDS = 0.2


class _Teller:
    """Sends progress to the command, at most a few messages a second."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._forwards = 0
        self._steps = 0
        self._last = 0.0

    def forwards(self, count: int) -> None:
        """Tell of example-forwards."""
        self._forwards += count
        self._flush_if_due()

    def begin(self, stage: str, total: int) -> None:
        """A training starts a bar."""
        self.flush()
        self._channel.send({"kind": "begin", "stage": stage, "total": total})

    def advance(self, steps: int = 1) -> None:
        """A training moves its bar."""
        self._steps += steps
        self._flush_if_due()

    def note(self, **values: float) -> None:
        """A training tells its numbers."""
        self._channel.send({"kind": "note", "values": {name: float(value) for name, value in values.items()}})

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._last > _SIGN_OF_LIFE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if self._forwards or self._steps:
            self._channel.send({"kind": "working", "forwards": self._forwards, "steps": self._steps})
        self._forwards = self._steps = 0
        self._last = time.monotonic()


def _load(params: Mapping[str, Any]) -> nn.Module:
    return submission.load_model(submission.read_manifest(Path(params["manifest"])))


def _train(params: Mapping[str, Any], arrays: Mapping[str, Array], teller: _Teller, device: torch.device) -> nn.Module:
    def split(name: str) -> Split:
        return Split(
            torch.from_numpy(np.array(arrays[f"{name}_images"])), torch.from_numpy(np.array(arrays[f"{name}_labels"]))
        )

    data = TrainingData(params["data"], split("train"), split("validation"), params["classes"])
    folder = Path(params["checkpoints"]) if params["checkpoints"] else None
    return registry.create(params["defense"], params["overrides"]).fit(
        data,
        ThreatModel.parse(params["norm"], params["eps"]),
        seed=params["seed"],
        device=device,
        progress=teller,
        checkpoints=CheckpointStore(folder),
    )


class _Worker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._teller = _Teller(channel)
        self._device = torch.device("cpu")
        self._operations: Operations | None = None
        self._model: nn.Module | None = None

    def _adopt(self, model: nn.Module) -> Reply:
        model = self._model = model.to(self._device).eval()
        self._operations = Operations(model, self._device, self._teller.forwards)
        return Reply({"parameters": sum(p.numel() for p in model.parameters())}, {})

    def _restore(self, arrays: Mapping[str, Array]) -> Reply:
        """Other weights, strictly by name, for the model that was trained."""
        if self._model is None:
            raise WorkerError("No model is loaded yet.")
        state = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        try:
            self._model.load_state_dict(state)
        except RuntimeError as error:
            raise ModelError(f"The weights do not fit the network: {first_line(error)}.") from error
        return self._adopt(self._model)

    def _state(self, model: nn.Module) -> dict[str, Array]:
        return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}

    def answer(self, operation: str, params: Mapping[str, Any], arrays: Mapping[str, Array]) -> Reply:
        """Carry out one request."""
        if operation == "start":
            torch.set_num_threads(params["threads"])
            self._device = _usable_device(params["device"])
            return Reply({"device": _device_name(self._device)}, {})
        if operation == "load":
            return self._adopt(_load(params))
        if operation == "train":
            began = time.perf_counter()
            model = _train(params, arrays, self._teller, self._device)
            return Reply(self._adopt(model).values, self._state(model), seconds=time.perf_counter() - began)
        if operation == "restore":
            return self._restore(arrays)
        if self._operations is None:
            raise WorkerError("No model is loaded yet.")
        return self._operations.run(operation, params, arrays)

    def serve(self) -> None:
        """Answer requests until the command closes its end."""
        while True:
            request, arrays = self._channel.receive()
            operation = request["operation"]
            try:
                reply = self.answer(operation, request["params"], arrays)
            except ChannelClosedError:
                raise
            except Exception as error:
                known = isinstance(error, RobustBoardError)
                text = str(error) if known else f"The model's process failed during {operation}: {first_line(error)}."
                name = type(error).__name__ if known else WorkerError.__name__
                self._channel.send({"kind": "error", "class": name, "message": text})
                continue
            self._teller.flush()
            self._channel.send(
                {
                    "kind": "done",
                    "values": reply.values,
                    "seconds": reply.seconds,
                    "forwards": reply.forwards,
                    "backwards": reply.backwards,
                },
                reply.arrays,
            )


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        raise DefenseError(f"The device {name!r} cannot be used here ({first_line(error)}); try cpu.") from error
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _end_with(sock: socket.socket) -> None:
    """End this process, and all that it started, once the command's end of the socket is gone."""
    poller = select.poll()
    poller.register(sock, 0)
    poller.poll()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve the socket whose file descriptor is the only argument."""
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        threading.Thread(target=_end_with, args=[sock], daemon=True).start()
        try:
            _Worker(Channel(sock)).serve()
        except ChannelClosedError:
            return


if __name__ == "__main__":
    main()
