"""What a model's answers come to: costs, proofs, and what complete verification says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robustboard.bench.operations import Reply
from robustboard.bench.verdicts import Flags

Floats = npt.NDArray[np.float32]


@dataclass
class StageCost:
    """What one stage cost: seconds of the model's process, and examples passed forward and backward, where counted."""

    seconds: float = 0.0
    forwards: int | None = 0
    backwards: int | None = 0

    def add(self, reply: Reply) -> None:
        """Add what one operation cost."""
        self.seconds += reply.seconds
        self.forwards = (self.forwards or 0) + reply.forwards
        self.backwards = (self.backwards or 0) + reply.backwards


@dataclass(frozen=True)
class CompleteAnswer:
    """What complete verification says of some rows.

    Attributes:
        found: perturbed images (N, C, H, W); the clean image where there is no counter-example.
        methods: for each row the method that proved it, or None.
        margins: lower bounds (N, K).
    """

    found: Floats
    methods: list[str | None]
    margins: Floats


@dataclass(frozen=True)
class Proofs:
    """What a bound method says of some rows.

    Attributes:
        certified: (N,), which of them it proves.
        margins: lower bounds (N, K) on their margins.
        excluded: (N, K), the classes that it proves out of reach.
        wrong: whether the network's own logits contradict one of the method's bounds.
    """

    certified: Flags
    margins: Floats
    excluded: Flags
    wrong: bool = False

    def void(self) -> Proofs:
        """The same, with nothing proven."""
        margins = np.where(np.isposinf(self.margins), self.margins, -np.inf).astype(np.float32)
        return Proofs(np.zeros_like(self.certified), margins, np.zeros_like(self.excluded), self.wrong)
