"""What a bound proves about examples, and above which margin a floating-point bound counts as a proof.

A certificate here is numerical: it comes from floating-point arithmetic that rounds to nearest. What stands between it
and float error is

- the threat model, rounded outward, and so is its image under a leading normalisation;
- float64, in which all bounds are computed. Their own error is then some 1e-12 of the logits (float32 shows 1e-5);
- a tolerance that the smallest margin must exceed. It covers what float64 cannot: the classifier as it is used runs in
  float32, and near a margin of zero its answer is decided by rounding. It is `TOLERANCE` times the largest logit (at
  least 1), a hundred times the usual error of a float32 forward pass, and never less than ten times the error seen
  between float32 and float64 on the example itself and on two corners of its box.

A model whose code insists on float32 is bounded in float32, and then `TOLERANCE_FLOAT32` applies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from robustboard.attacks.threat import ThreatModel

TOLERANCE = 1e-4
TOLERANCE_FLOAT32 = 1e-2
LARGEST_BATCH = 128


@dataclass(frozen=True)
class Bounds:
    """What is proved about N examples.

    Attributes:
        margins: float32 (N, K), rounded down: a lower bound on z_y - z_j over the threat model, +inf at j = y, and -inf
            where nothing is known (also for every class of an example that is misclassified as it stands).
        certified: bool (N,): classified correctly, and every margin exceeds the example's tolerance.
        excluded: bool (N, K): the classes other than y whose margin does; no attack can reach them.
        tolerance: the least tolerance, relative to max(1, largest logit); see the module's text.
        reason: one sentence that says why nothing is known, or None.
        notes: sentences that say what the bounds leave out, such as the pixel box of an L2 ball.
        wrong: whether a bound was contradicted by the network's own logits, which makes all of that method worthless.
    """

    margins: Tensor
    certified: Tensor
    excluded: Tensor
    tolerance: float
    reason: str | None
    notes: tuple[str, ...] = ()
    wrong: bool = False

    def enter(self, rows: Tensor, margins: Tensor, tolerance: Tensor) -> None:
        """Enter what was found of some examples.

        Args:
            rows: which, int64 (R,).
            margins: (R, K) in the type they were computed in, +inf at the label.
            tolerance: (R,), each example's.
        """
        proved = margins > tolerance[:, None]
        self.margins[rows] = rounded_down(margins).to(self.margins.device)
        self.excluded[rows] = (proved & margins.isfinite()).to(self.margins.device)
        self.certified[rows] = proved.all(dim=1).to(self.margins.device)


def nothing_known(
    labels: Tensor, classes: int, reason: str | None, *, tolerance: float = TOLERANCE, notes: tuple[str, ...] = ()
) -> Bounds:
    """The answer before any example is bounded, or instead of one."""
    margins = torch.full((len(labels), classes), -torch.inf, device=labels.device)
    margins = margins.scatter(1, labels[:, None], torch.inf)
    certified = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    excluded = torch.zeros_like(margins, dtype=torch.bool)
    return Bounds(margins, certified, excluded, tolerance, reason, notes)


def correctly_classified(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """Which examples the classifier itself, as it is used on `device`, classifies correctly; bool (N,)."""
    with torch.no_grad():
        parts = [model(part.to(device)) for part in torch.split(images, LARGEST_BATCH)]
    logits = torch.cat(parts).to(labels.device)
    return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)


def seen_margins(
    exact: Sequence[Tensor], used: Sequence[Tensor], labels: Tensor, *, least: float
) -> tuple[Tensor, Tensor]:
    """The smallest margins (N, K) at some allowed points, and each example's tolerance (N,).

    Args:
        exact: for each point, the logits (N, K) of the function that is bounded.
        used: the logits of the classifier as it is used.
        labels: int64 (N,).
        least: the tolerance relative to the largest logit.
    """
    margins = torch.stack([logits.gather(1, labels[:, None]) - logits for logits in exact]).amin(dim=0)
    largest = torch.stack([logits.abs().amax(dim=1).clamp(min=1.0) for logits in exact]).amax(dim=0)
    error = torch.stack([(one - other).abs().amax(dim=1) for one, other in zip(exact, used, strict=True)]).amax(dim=0)
    return margins.scatter(1, labels[:, None], torch.inf), torch.maximum(least * largest, 10 * error)


def rounded_down(margins: Tensor) -> Tensor:
    """The nearest float32 that is not larger."""
    nearest = margins.float()
    return torch.where(nearest > margins, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest)


def outer_radius(threat: ThreatModel) -> float:
    """The least float64 that is not smaller than eps."""
    above = float(threat.eps)
    return above if Fraction(above) >= threat.eps else math.nextafter(above, math.inf)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(word in str(error) for word in ("out of memory", "can't allocate", "not enough memory"))
