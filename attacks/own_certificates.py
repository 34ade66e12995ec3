"""Certificates that the board computes itself, for networks whose margins have exact or near-exact bounds.

`quadratic`: a two-layer network with a quadratic activation (`QuadraticNetwork`). Each margin is a quadratic of the
perturbation. Over an L2 ball its minimum is exact, by the trust region, which is the S-procedure of Kuelbs et al. 2024
(arXiv 2405.14033) in dual form; over an L-inf box it is bounded by Shor's relaxation.

Such a network is recognised by the exact types of its modules, and what is bounded is a formula of its parameters, not
its code. That both agree is checked on every image and on corners of its box. `proofs` says when a bound counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustboard.attacks import box_relaxation, trust_region
from robustboard.attacks.proofs import (
    LARGEST_BATCH,
    TOLERANCE,
    Bounds,
    correctly_classified,
    nothing_known,
    outer_radius,
    seen_margins,
)
from robustboard.attacks.quadratic import MarginForms, QuadraticNetwork, margin_forms
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError, first_line

METHODS = ("quadratic",)

_LEADING = (nn.Flatten, nn.Identity)
_NOTES = {
    "l2": "The quadratic certificate is exact for the L2 ball, which it does not intersect with the pixel box.",
    "linf": "The quadratic certificate bounds the L-inf ball within the pixel box by Shor's relaxation.",
}
# Logits of the formula and of the module differ by float32 rounding; anything else is another function.
_SAME_FUNCTION = 1e-3
_CHUNK_BYTES = 64 << 20


def applicable(model: nn.Module) -> tuple[str, ...]:
    """The methods of this module that know what `model` computes; empty for nearly every network.

    A quadratic network is a `QuadraticNetwork`, or an `nn.Sequential` of any number of `nn.Flatten()` and
    `nn.Identity()` with a `QuadraticNetwork` at its end. Types are compared, not names: no subclass, no hook, no
    attribute beside those of the type, such as a `forward` of the instance.

    >>> network = QuadraticNetwork(torch.ones(2, 4), torch.ones(2, 3))
    >>> applicable(nn.Sequential(nn.Flatten(), network)), applicable(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    (('quadratic',), ())
    """
    return ("quadratic",) if _quadratic_part(model) is not None else ()


def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    method: str,
    classes: int,
    on_examples: Callable[[int], None] | None = None,
) -> Bounds:
    """Bound the margins of each example over its threat model, as `bounds.certify` does.

    Forward hooks of the model itself are let pass here, since its passes may be counted: ask `applicable` first.

    Args:
        model: the classifier, in eval mode; it is not changed.
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        threat: the perturbations to bound. An L2 ball is not intersected with the pixel box, an L-inf ball is.
        method: one of `METHODS`.
        classes: the number of classes K.
        on_examples: called with the number of examples that have just been finished.

    Raises:
        BoundsError: if the method is unknown. Whatever else goes wrong is the `reason` of an answer that knows nothing.

    Example:
        >>> network = QuadraticNetwork(torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]]), coefficients=(-1, 0, 0.5))
        >>> image, label = torch.tensor([[[[0.25]]]]), torch.tensor([0])  # the margin is 1/2 - x^2
        >>> threat = ThreatModel.parse("linf", "1/4")
        >>> bounds = certify(network, image, label, threat=threat, method="quadratic", classes=2)
        >>> bounds.certified.tolist(), round(bounds.margins[0, 1].item(), 3)
        ([True], 0.25)
    """
    if method not in METHODS:
        raise BoundsError(f"The certificate {method!r} is not one of {', '.join(METHODS)}.")
    try:
        return _quadratic(model, images, labels, threat, classes, on_examples or (lambda _: None))
    except BoundsError as error:
        return nothing_known(labels, classes, str(error))
    except Exception as error:  # a weight that is infinite, or memory that is not there: the run goes on without
        return nothing_known(labels, classes, f"{method} bounds of this network failed: {first_line(error)}.")


def _quadratic(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    classes: int,
    tell: Callable[[int], None],
) -> Bounds:
    network = _quadratic_part(model, counted=True)
    if network is None:
        raise BoundsError("The quadratic certificate is for quadratic networks alone, which this is not.")
    if network.outputs.shape[1] != classes:
        raise BoundsError(f"The quadratic network has {network.outputs.shape[1]} classes, not {classes}.")
    device = network.directions.device
    correct = correctly_classified(model, images, labels, device)
    tell(int((~correct).sum()))
    bounds = nothing_known(labels, classes, None, notes=(_NOTES[threat.norm],))
    judge = _Judge(model, device, _exact(network), threat)
    for label in sorted(set(labels[correct].tolist())):
        for rows in torch.split((correct & (labels == label)).nonzero().flatten(), LARGEST_BATCH):
            bounds.enter(rows, *judge.judge(images[rows].cpu(), label))
            tell(len(rows))
    return bounds


@dataclass(frozen=True)
class _Judge:
    """A model as it is used on its device, and its parameters on the CPU in float64, which are what is bounded."""

    model: nn.Module
    device: torch.device
    network: QuadraticNetwork
    threat: ThreatModel

    def judge(self, images: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """The margins (N, K) of examples of one class, and each example's tolerance (N,)."""
        lower, upper = self.threat.outer_box(images)
        seen, tolerance = self._seen([images] if self.threat.norm == "l2" else [images, lower, upper], label)
        margins = torch.full_like(seen, torch.inf)
        rivals = torch.tensor([k for k in range(seen.shape[1]) if k != label])
        hidden, inputs = self.network.directions.shape
        for part in torch.split(rivals, max(1, _CHUNK_BYTES // (8 * inputs * max(hidden, len(images))))):
            forms = margin_forms(self.network, torch.stack([torch.full_like(part, label), part], dim=1))
            found = (
                _over_ball(forms, images, outer_radius(self.threat))
                if self.threat.norm == "l2"
                else _over_box(forms, lower, upper, tolerance)
            )
            margins[:, part] = found.T.nan_to_num(nan=-torch.inf)
        if bool((margins > seen + tolerance[:, None]).any()):
            raise BoundsError("The quadratic bounds contradict the network's own logits, so none of them is used.")
        return margins, tolerance

    def _seen(self, points: list[Tensor], label: int) -> tuple[Tensor, Tensor]:
        """The smallest margins (N, K) at some allowed points, and each example's tolerance (N,)."""
        exact = [self._logits(point) for point in points]
        with torch.no_grad():
            used = [self.model(point.to(self.device)).cpu().double() for point in points]
        for one, other in zip(exact, used, strict=True):
            if not bool(((one - other).abs() <= _SAME_FUNCTION * (1 + one.abs().amax())).all()):
                raise BoundsError("The network computes other logits than its parameters say, so it is not bounded.")
        return seen_margins(exact, used, torch.full((len(points[0]),), label), least=TOLERANCE)

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        a, b, c = self.network.coefficients
        projections = images.flatten(1).double() @ self.network.directions.T + self.network.offsets
        logits: Tensor = (a * projections.square() + b * projections + c) @ self.network.outputs
        return logits


def _over_ball(forms: MarginForms, images: Tensor, radius: float) -> Tensor:
    """The least margins over the L2 ball, (P, N): exact but for rounding, which is downward."""
    found = trust_region.minimum(forms.curvatures[:, None], forms.slopes(images), radius)
    return forms.values(images) + found.bound - _rounding(forms) * forms.size(images.abs(), radius=radius)


def _over_box(forms: MarginForms, lower: Tensor, upper: Tensor, tolerance: Tensor) -> Tensor:
    """Lower bounds on the margins over a box of images, (P, N), tightened as long as they do not exceed `tolerance`."""
    low, high = lower.flatten(1).double(), upper.flatten(1).double()
    centre = (low + high) / 2
    values, rounding = forms.values(centre), _rounding(forms) * forms.size(high)
    relaxed = box_relaxation.minimum(
        forms.curvatures,
        forms.basis @ forms.axes,
        forms.slopes(centre),
        (high - low) / 2,
        enough=tolerance - values + rounding,
    )
    return torch.maximum(values + relaxed.lower, forms.interval(low, high)) - rounding


def _rounding(forms: MarginForms) -> float:
    """A relative allowance for float64's rounding in sums over inputs and neurons and in the decompositions."""
    return 16 * sum(forms.directions.shape) * torch.finfo(torch.float64).eps


def _exact(network: QuadraticNetwork) -> QuadraticNetwork:
    directions, outputs, offsets = (
        part.detach().cpu().double() for part in (network.directions, network.outputs, network.offsets)
    )
    a, b, c = network.coefficients.tolist()
    return QuadraticNetwork(directions, outputs, offsets=offsets, coefficients=(a, b, c)).requires_grad_(
        requires_grad=False
    )


def _quadratic_part(model: nn.Module, *, counted: bool = False) -> QuadraticNetwork | None:
    """The quadratic network that the whole model amounts to, if it is one.

    Args:
        model: any module.
        counted: whether the model may carry forward hooks of its own, such as those of a pass counter.
    """
    parts = list(model) if type(model) is nn.Sequential else [model]
    if not parts or type(parts[-1]) is not QuadraticNetwork or any(type(part) not in _LEADING for part in parts[:-1]):
        return None
    if any((part.start_dim, part.end_dim) != (1, -1) for part in parts[:-1] if isinstance(part, nn.Flatten)):
        return None
    if not all(_untouched(module, counted=counted and module is model) for module in [model, *parts]):
        return None
    network = parts[-1]
    plain = (
        {name: type(value) for name, value in network._parameters.items()}
        == dict.fromkeys(("directions", "offsets", "outputs"), nn.Parameter)
        and {name: type(value) for name, value in network._buffers.items()} == {"coefficients": Tensor}
        and not network._modules
    )
    return network if plain else None


def _untouched(module: nn.Module, *, counted: bool) -> bool:
    """Whether a module has the attributes of its type and no more, and no hooks."""
    blank = QuadraticNetwork(torch.ones(1, 1), torch.ones(1, 1)) if type(module) is QuadraticNetwork else type(module)()
    allowed = {"_forward_hooks"} if counted else set()
    hooks = [name for name in vars(module) if name.endswith(("ward_hooks", "_pre_hooks")) and name not in allowed]
    return vars(module).keys() == vars(blank).keys() and not any(vars(module)[name] for name in hooks)
