"""Dynamic mixed training: how much the verified loss weighs beside the clean one, epoch by epoch (arXiv 1811.02625).

The paper's own rule was not found. `scheduled_weight` is the rule of the authors' later code (HYDRA, arXiv 2002.10509,
`trainer/mixtrain.py`): the verified loss is added with a weight that grows whatever happens. `feedback_weight` is our
reading of the abstract, where the weight follows what is measured: the losses are averaged, and whichever of accuracy
and verified accuracy suffers gains weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Rule = Literal["schedule", "feedback"]
RULES: tuple[Rule, ...] = ("schedule", "feedback")


@dataclass(frozen=True)
class Measured:
    """What an epoch's network reaches on validation images: two shares."""

    accuracy: float
    verified: float


def scheduled_weight(done: float, *, ramp: float, interval: float, largest: float = 50.0) -> float:
    """The weight that the authors' schedule adds the verified loss with: min(largest, 0.1 * 2.5^steps).

    Args:
        done: the share of the training that lies behind.
        ramp: the share over which the radius grows; until one interval after it the weight is 0.1.
        interval: the share between two increases. The authors have 60 epochs, 10 or 15 of them ramp, and 5 between
            increases.
        largest: where the weight stops; the authors' value is 50.

    >>> [round(scheduled_weight(epoch / 60, ramp=1 / 6, interval=1 / 12), 3) for epoch in (0, 14, 15, 20, 25, 45)]
    [0.1, 0.1, 0.25, 0.625, 1.562, 50.0]
    """
    # The epochs' shares are rounded: an increase that is due must not wait for the next step.
    steps = math.floor(max(done - ramp, 0.0) / interval + 1e-6)
    return min(largest, 0.1 * 2.5 ** min(steps, 100))


def feedback_weight(weight: float, *, now: Measured, best_accuracy: float, verified_before: float) -> float:
    """The verified loss's next share of the whole loss.

    Args:
        weight: its share in the epoch that has ended.
        now: what that epoch reached.
        best_accuracy: the best accuracy of the epochs before.
        verified_before: the verified accuracy of the epoch before.

    Returns:
        A tenth less, but at least 0.1, where accuracy has fallen by more than half a point; otherwise a tenth more, but
        at most 0.9, where verified accuracy has not risen; otherwise the same.

    >>> feedback_weight(0.5, now=Measured(0.9, 0.3), best_accuracy=0.95, verified_before=0.2)
    0.4
    """
    if now.accuracy < best_accuracy - 0.005:
        return round(max(weight - 0.1, 0.1), 6)
    if now.verified <= verified_before:
        return round(min(weight + 0.1, 0.9), 6)
    return weight


class Mixing:
    """Weighs the two losses, and measures and tells after every epoch what the network reaches; a `Controller`.

    Args:
        rule: `"schedule"` or `"feedback"`.
        ramp: the share of the training over which the radius grows; feedback begins after it.
        interval: of the schedule.
        largest: of the schedule.
        epochs: of the training.
        measure: what the network of this moment reaches.
    """

    def __init__(
        self, rule: Rule, *, ramp: float, interval: float, largest: float, epochs: int, measure: Callable[[], Measured]
    ) -> None:
        self._rule, self._ramp, self._interval, self._largest = rule, ramp, interval, largest
        self._epochs, self._measure = epochs, measure
        self._weight, self._best_accuracy, self._verified_before = 0.5, 0.0, 0.0

    def weights(self, done: float) -> tuple[float, float]:
        """The weights of the clean and of the verified loss after the share `done` of the training."""
        if self._rule == "schedule":
            return 1.0, scheduled_weight(done, ramp=self._ramp, interval=self._interval, largest=self._largest)
        return 1.0 - self._weight, self._weight

    def epoch_end(self, epoch: int) -> Mapping[str, float]:
        """Measure, and weigh anew; returns the weight that the epoch ended with, and what was measured."""
        done = epoch / self._epochs
        _, weight = self.weights((epoch - 0.001) / self._epochs)
        now = self._measure()
        # While the radius grows, accuracy falls and verified accuracy rises by the ramp's doing, not the weight's.
        if done > self._ramp:
            self._weight = feedback_weight(
                self._weight, now=now, best_accuracy=self._best_accuracy, verified_before=self._verified_before
            )
            self._best_accuracy = max(self._best_accuracy, now.accuracy)
        self._verified_before = now.verified
        return {"weight": weight, "accuracy": now.accuracy, "verified": now.verified}

    def state(self) -> Mapping[str, Any]:
        """What the next epoch depends on."""
        return {"weight": self._weight, "best_accuracy": self._best_accuracy, "verified_before": self._verified_before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._weight = float(state["weight"])
        self._best_accuracy = float(state["best_accuracy"])
        self._verified_before = float(state["verified_before"])
