"""Where a training keeps its last state, so that a killed one continues instead of starting again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from robustboard.files import replace_file


class CheckpointStore:
    """A folder of named states; without a folder nothing is kept.

    A state is what `torch.save` takes and `torch.load(weights_only=True)` gives back: tensors, numbers, text, and lists
    and dictionaries of them. A write is atomic: the file is either the old state or the new one.

    Args:
        folder: created with the first state; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep `state` under `name` (a file name without an ending).

        Raises:
            OutputError: if the folder cannot be written.
        """
        if self._folder is None:
            return
        replace_file(self._folder / f"{name}.pt", lambda file: torch.save(dict(state), file))

    def load(self, name: str) -> dict[str, Any] | None:
        """The last state kept under `name`, tensors on the CPU; None if there is none, or it is damaged."""
        if self._folder is None:
            return None
        path = self._folder / f"{name}.pt"
        if not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # damage surfaces as any of a dozen kinds of error; all mean that there is no usable state
            return None
        return state if isinstance(state, dict) else None
