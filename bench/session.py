"""A session with one model: the object that the evaluation talks to, wherever the model lives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import torch
from torch import nn

from robustboard.bench.channel import Array
from robustboard.bench.operations import Operations, Reply

LEARNT: Final = ("check",)
"""What changes how a process answers later, so that every process has to be asked, each time."""


class Session(Protocol):
    """A model that answers operations; see `Operations` for their names.

    Attributes:
        jobs: how many operations it carries out at a time, each called from a thread of its own.
    """

    jobs: int

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Run one operation.

        Args:
            operation: its name.
            params: plain values.
            arrays: images (N, C, H, W), labels (N,) and the like.
            on_forwards: called with example-forwards as they happen, for a progress bar.
        """

    def close(self) -> None:
        """Let the model go; twice is harmless."""


class LocalSession:
    """A session with a module of this process, judged on a copy in eval mode so that the caller's stays as it is."""

    jobs = 1

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._forwards: Callable[[int], None] | None = None
        self._operations = Operations(copy.deepcopy(model).eval().to(device), device, self._tell)

    def _tell(self, forwards: int) -> None:
        if self._forwards is not None:
            self._forwards(forwards)

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Run one operation here and now."""
        self._forwards = on_forwards
        return self._operations.run(operation, params, arrays)

    def close(self) -> None:
        """Nothing to let go."""
