"""Verified bounds: which examples provably keep their class over the whole threat model.

The bounds are auto_LiRPA's; `proofs` says when a floating-point bound counts as a proof, and `own_certificates` holds
the exact bounds of networks that have them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustboard.attacks.bound_memory import Need, estimate
from robustboard.attacks.bounded_network import METHODS, Ball, BoundedNetwork, Slope
from robustboard.attacks.bounded_view import shared_view
from robustboard.attacks.proofs import (
    LARGEST_BATCH,
    TOLERANCE,
    TOLERANCE_FLOAT32,
    Bounds,
    correctly_classified,
    nothing_known,
    out_of_memory,
    outer_radius,
    seen_margins,
)
from robustboard.attacks.quadratic import QuadraticNetwork
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError, first_line

__all__ = ["METHODS", "TOLERANCE", "TOLERANCE_FLOAT32", "BoundedNetwork", "Bounds", "Slope", "certify"]

# Measured: on a CPU larger chunks are slower once their coefficients outgrow the caches, since a neuron that is
# unstable for any example of a chunk is bounded for all of them.
_CPU_CHUNK_BYTES = {"ibp": 64 << 20, "crown-ibp": 64 << 20, "crown": 64 << 20, "alpha-crown": 256 << 20}


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
    views: Views | None = None,
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
        views: what earlier calls for the same model left to be used again; None reads the network anew.

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
        network, exact = (views or Views(model)).of(images[:1], classes)
        judge = _Judge(model, network, exact, threat=threat, method=method, iterations=iterations)
        need = judge.need.of(method)
        if need > memory_bytes:
            raise BoundsError(
                f"{method} bounds of one example need about {_size(need)}, more than the {_size(memory_bytes)} allowed."
            )
        correct = correctly_classified(model, images, labels, judge.network.device)
        tell(int((~correct).sum()))
        chunk = judge.chunk(memory_bytes)
        return judge.judge(images, labels, correct, chunk, tell)
    except _WrongBoundsError as error:
        return replace(nothing_known(labels, classes, str(error)), wrong=True)
    except BoundsError as error:
        return nothing_known(labels, classes, str(error))
    except Exception as error:  # third-party code on third-party models: the run goes on without these bounds
        return nothing_known(labels, classes, _why(model, method, error))


class Views:
    """auto_LiRPA's view of a model, read once for all methods: that takes as long as bounds of several examples.

    Args:
        model: in eval mode; its weights must stay what they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[tuple[int, torch.Size], tuple[BoundedNetwork, nn.Module]] = {}

    def of(self, image: Tensor, classes: int) -> tuple[BoundedNetwork, nn.Module]:
        """The network to bound and a copy to evaluate, in float64 if the model's code allows it.

        Args:
            image: (1, C, H, W).
            classes: K.

        Raises:
            BoundsError: if auto_LiRPA cannot bound the model.
        """
        key = classes, image.shape
        if key not in self._known:
            self._known[key] = _in_widest_type(self._model, image, classes)
        return self._known[key]


class _WrongBoundsError(BoundsError):
    """A bound above a margin that the network has inside the ball."""


class _Judge:
    """One network, one threat model and one method."""

    def __init__(
        self,
        model: nn.Module,
        network: BoundedNetwork,
        exact: nn.Module,
        *,
        threat: ThreatModel,
        method: str,
        iterations: int,
    ) -> None:
        self.model, self.network, self.exact = model, network, exact
        self.threat, self.method, self.iterations = threat, method, iterations
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
        return max(1, min(LARGEST_BATCH, allowed // self.need.of(self.method)))

    def judge(self, images: Tensor, labels: Tensor, correct: Tensor, chunk: int, tell: Callable[[int], None]) -> Bounds:
        """Bound all examples that are `correct`, at most `chunk` at a time."""
        bounds = nothing_known(labels, self.network.classes, None, tolerance=self.tolerance, notes=self.notes)
        waiting = correct.nonzero().flatten()
        while len(waiting):
            now = waiting[:chunk]
            try:
                margins, tolerance = self._judge_chunk(images[now], labels[now])
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if len(now) == 1:
                    raise BoundsError(f"{self.method} bounds of one example do not fit in memory here.") from error
                chunk = max(1, len(now) // 2)
                continue
            bounds.enter(now, margins, tolerance)
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
            raise _WrongBoundsError(
                f"The {self.method} bounds contradict the network's own logits, so none of them is used; "
                "auto_LiRPA bounds one of its operators wrongly."
            )
        return margins, tolerance

    def _seen(self, points: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            exact = [self.exact(point.to(self.network.dtype)) for point in points]
            used = [self.model(point) for point in points]
        return seen_margins(exact, used, labels, least=self.tolerance)

    def _margins(self, images: Tensor, labels: Tensor, lower: Tensor, upper: Tensor, method: str) -> Tensor:
        ball = Ball(images, outer_radius(self.threat)) if self.threat.norm == "l2" and method != "ibp" else None
        with torch.no_grad():
            margins = self.network.margins(
                labels, lower=lower, upper=upper, method=method, ball=ball, iterations=self.iterations
            )
        return self.network.scatter(margins.nan_to_num(nan=-torch.inf), labels)


def _in_widest_type(model: nn.Module, image: Tensor, classes: int) -> tuple[BoundedNetwork, nn.Module]:
    device = next((parameter.device for parameter in model.parameters()), image.device)
    try:
        wide = copy.deepcopy(shared_view(model)).double().requires_grad_(requires_grad=False)
        return BoundedNetwork(wide, image.to(device, torch.float64), classes=classes), wide
    except Exception:  # the second try says what is wrong with the network, if it is not the type
        narrow = copy.deepcopy(shared_view(model)).requires_grad_(requires_grad=False)
        return BoundedNetwork(narrow, image.to(device), classes=classes), narrow


def _why(model: nn.Module, method: str, error: Exception) -> str:
    if method in ("crown", "alpha-crown") and any(isinstance(module, QuadraticNetwork) for module in model.modules()):
        return "auto_LiRPA's CROWN and alpha-CROWN do not bound a quadratic activation."
    return f"{method} bounds of this network failed: {first_line(error)}."


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
