"""Verified bounds: which examples provably keep their class over the whole threat model.

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

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from robustboard.attacks.bound_memory import Need, estimate
from robustboard.attacks.bounded_network import METHODS, Ball, BoundedNetwork, Slope
from robustboard.attacks.bounded_view import shared_view
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError, first_line

__all__ = ["METHODS", "TOLERANCE", "TOLERANCE_FLOAT32", "BoundedNetwork", "Bounds", "Slope", "certify"]

TOLERANCE = 1e-4
TOLERANCE_FLOAT32 = 1e-2
# Measured: on a CPU larger chunks are slower once their coefficients outgrow the caches, since a neuron that is
# unstable for any example of a chunk is bounded for all of them.
_CPU_CHUNK_BYTES = {"ibp": 64 << 20, "crown-ibp": 64 << 20, "crown": 64 << 20, "alpha-crown": 256 << 20}
_LARGEST_CHUNK = 128


@dataclass(frozen=True)
class Bounds:
    """What is proved about N examples.

    Attributes:
        margins: float32 (N, K), rounded down: a lower bound on z_y - z_j over the threat model, +inf at j = y, and -inf
            where nothing is known (also for every class of an example that is misclassified as it stands).
        certified: bool (N,): classified correctly, and every margin exceeds the example's tolerance.
        tolerance: the least tolerance, relative to max(1, largest logit); see the module's text.
        reason: one sentence that says why nothing is known, or None.
        notes: sentences that say what the bounds leave out, such as the pixel box of an L2 ball.
    """

    margins: Tensor
    certified: Tensor
    tolerance: float
    reason: str | None
    notes: tuple[str, ...] = ()


def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    method: str,
    classes: int,
    iterations: int = 20,
    memory_bytes: int = 2 << 30,
    on_examples: Callable[[int], None] | None = None,
) -> Bounds:
    """Bound the margins of each example over its threat model, in chunks that fit in memory.

    A verdict does not depend on the chunks. Examples that are misclassified as they stand are not bounded, and
    alpha-CROWN starts from CROWN and optimises only what CROWN leaves open.

    Args:
        model: the classifier, in eval mode; it is not changed.
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        threat: the perturbations to bound. For L2, IBP bounds the box around the ball.
        method: one of `METHODS`.
        classes: the number of classes K.
        iterations: alpha-CROWN's work budget, in optimisation steps.
        memory_bytes: what one chunk may take, by `bound_memory.estimate`.
        on_examples: called with the number of examples that have just been finished.

    Raises:
        BoundsError: if the method is unknown. Whatever else goes wrong is the `reason` of an answer that knows nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from robustboard.attacks.threat import ThreatModel
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), model[1].bias.data.zero_()
        >>> images, labels = torch.tensor([0.5, 0.25]).view(2, 1, 1, 1), torch.tensor([0, 0])
        >>> bounds = certify(
        ...     model, images, labels, threat=ThreatModel.parse("linf", "3/10"), method="crown", classes=2
        ... )
        >>> bounds.certified.tolist(), round(bounds.margins[0, 1].item(), 4)
        ([True, False], 0.4)
    """
    if method not in METHODS:
        raise BoundsError(f"The bound method {method!r} is not one of {', '.join(METHODS)}.")
    tell = on_examples or (lambda _: None)
    try:
        judge = _Judge(model, images, threat=threat, method=method, classes=classes, iterations=iterations)
        need = judge.need.of(method)
        if need > memory_bytes:
            raise BoundsError(
                f"{method} bounds of one example need about {_size(need)}, more than the {_size(memory_bytes)} allowed."
            )
        correct = judge.correct(images, labels)
        tell(int((~correct).sum()))
        chunk = judge.chunk(memory_bytes)
        return judge.judge(images, labels, correct, chunk, tell)
    except BoundsError as error:
        return _nothing_known(labels, classes, str(error))
    except Exception as error:  # third-party code on third-party models: the run goes on without these bounds
        return _nothing_known(labels, classes, f"{method} bounds of this network failed: {first_line(error)}.")


class _Judge:
    """One network, one threat model and one method."""

    def __init__(
        self, model: nn.Module, images: Tensor, *, threat: ThreatModel, method: str, classes: int, iterations: int
    ) -> None:
        self.model, self.threat, self.method, self.iterations = model, threat, method, iterations
        self.network, self.exact = _in_widest_type(model, images[:1], classes)
        self.tolerance = TOLERANCE if self.network.dtype == torch.float64 else TOLERANCE_FLOAT32
        self.need: Need = estimate(self.network)
        self.notes: tuple[str, ...] = ()
        if threat.norm == "l2":
            self.notes = (
                ("IBP bounds the box around the L2 ball.",)
                if method == "ibp"
                else ("The L2 ball and the pixel box are bounded one by one, not their intersection.",)
            )

    def chunk(self, memory_bytes: int) -> int:
        """How many examples are bounded at a time."""
        on_cpu = self.network.device.type == "cpu"
        allowed = min(memory_bytes, _CPU_CHUNK_BYTES[self.method]) if on_cpu else memory_bytes
        return max(1, min(_LARGEST_CHUNK, allowed // self.need.of(self.method)))

    def correct(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which examples the classifier itself, as it is used, classifies correctly; bool (N,)."""
        with torch.no_grad():
            parts = [self.model(part.to(self.network.device)) for part in torch.split(images, _LARGEST_CHUNK)]
        logits = torch.cat(parts).to(labels.device)
        return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)

    def judge(self, images: Tensor, labels: Tensor, correct: Tensor, chunk: int, tell: Callable[[int], None]) -> Bounds:
        """Bound all examples that are `correct`, at most `chunk` at a time."""
        bounds = _nothing_known(labels, self.network.classes, None, tolerance=self.tolerance, notes=self.notes)
        waiting = correct.nonzero().flatten()
        while len(waiting):
            now = waiting[:chunk]
            try:
                margins, certified = self._judge_chunk(images[now], labels[now])
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(now) == 1:
                    raise BoundsError(f"{self.method} bounds of one example do not fit in memory here.") from error
                chunk = max(1, len(now) // 2)
                continue
            bounds.margins[now] = margins.to(labels.device)
            bounds.certified[now] = certified.to(labels.device)
            waiting = waiting[len(now) :]
            tell(len(now))
        return bounds

    def _judge_chunk(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = images.to(self.network.device), labels.to(self.network.device)
        lower, upper = self.threat.outer_box(images)
        points = [images] if self.threat.norm == "l2" else [images, lower, upper]
        seen, tolerance = self._seen(points, labels)
        margins = self._margins(images, labels, lower, upper, "crown" if self.method == "alpha-crown" else self.method)
        if self.method == "alpha-crown":
            rest = (margins.amin(dim=1) <= tolerance).nonzero().flatten()
            if len(rest):
                tighter = self._margins(images[rest], labels[rest], lower[rest], upper[rest], self.method)
                margins[rest] = torch.maximum(margins[rest], tighter)
        if bool((margins > seen + tolerance[:, None]).any()):
            raise BoundsError(
                f"The {self.method} bounds contradict the network's own logits, so none of them is used; "
                "auto_LiRPA bounds one of its operators wrongly."
            )
        return _rounded_down(margins), margins.amin(dim=1) > tolerance

    def _seen(self, points: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest margins (N, K) at some allowed points, and each example's tolerance (N,)."""
        margins, scale, error = [], [], []
        with torch.no_grad():
            for point in points:
                exact, used = self.exact(point.to(self.network.dtype)), self.model(point)
                margins.append(exact.gather(1, labels[:, None]) - exact)
                scale.append(exact.abs().amax(dim=1).clamp(min=1.0))
                error.append((exact - used).abs().amax(dim=1))
        largest = torch.stack(scale).amax(dim=0)
        tolerance = torch.maximum(self.tolerance * largest, 10 * torch.stack(error).amax(dim=0))
        return torch.stack(margins).amin(dim=0).scatter(1, labels[:, None], torch.inf), tolerance

    def _margins(self, images: Tensor, labels: Tensor, lower: Tensor, upper: Tensor, method: str) -> Tensor:
        eps = self.threat.eps
        ball = None
        if self.threat.norm == "l2" and method != "ibp":
            above = float(eps)
            ball = Ball(images, above if Fraction(above) >= eps else math.nextafter(above, math.inf))
        with torch.no_grad():
            margins = self.network.margins(
                labels, lower=lower, upper=upper, method=method, ball=ball, iterations=self.iterations
            )
        return self.network.scatter(margins.nan_to_num(nan=-torch.inf), labels)


def _in_widest_type(model: nn.Module, image: Tensor, classes: int) -> tuple[BoundedNetwork, nn.Module]:
    """The network to bound and a copy to evaluate, in float64 if the model's code allows it."""
    device = next((parameter.device for parameter in model.parameters()), image.device)
    try:
        wide = copy.deepcopy(shared_view(model)).double().requires_grad_(requires_grad=False)
        return BoundedNetwork(wide, image.to(device, torch.float64), classes=classes), wide
    except Exception:  # the second try says what is wrong with the network, if it is not the type
        narrow = copy.deepcopy(shared_view(model)).requires_grad_(requires_grad=False)
        return BoundedNetwork(narrow, image.to(device), classes=classes), narrow


def _nothing_known(
    labels: Tensor, classes: int, reason: str | None, *, tolerance: float = TOLERANCE, notes: tuple[str, ...] = ()
) -> Bounds:
    margins = torch.full((len(labels), classes), -torch.inf, device=labels.device)
    margins = margins.scatter(1, labels[:, None], torch.inf)
    certified = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    return Bounds(margins, certified, tolerance, reason, notes)


def _rounded_down(margins: Tensor) -> Tensor:
    nearest = margins.float()
    return torch.where(nearest > margins, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest)


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(word in str(error) for word in ("out of memory", "can't allocate", "not enough memory"))


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
