"""The classifier contract, checked on a few images before any long work starts.

A classifier takes float32 images (N, C, H, W) in [0, 1] and returns finite logits (N, K). In eval mode it is
deterministic, judges every image by itself, answers the same with and without autograd, and lets gradients through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from robustboard.errors import ModelError, first_line

# Matrix products of other batch sizes sum in another order: float32 rounding, far below any real dependence.
CHANGE_TOLERANCE = 1e-3

_REPEATS = 3

Gradient = Literal["present", "missing", "not finite"]
GRADIENTS: Final[tuple[str, ...]] = get_args(Gradient)


@dataclass(frozen=True)
class Behaviour:
    """How a classifier behaves where the contract could be broken and still be answered.

    Changes are the largest move of a logit as a share of the largest logit (at least one).

    Attributes:
        repeat_change: between calls with the same images.
        batch_change: between an image alone and in a batch.
        autograd_change: between recording gradients and not.
        gradient: whether a gradient reaches the input, `present`, `missing`, or `not finite` on some image.
    """

    repeat_change: float
    batch_change: float
    autograd_change: float
    gradient: Gradient


def examine_classifier(model: nn.Module, images: Tensor, *, classes: int) -> Behaviour:
    """Measure `model` on a few real images, and refuse only what no verdict can be formed of.

    Args:
        model: the classifier, in eval mode.
        images: (N, C, H, W) float32 in [0, 1], on the model's device; 16 are plenty.
        classes: K.

    Raises:
        ModelError: if it is in train mode, fails, alters its input, or its answers are not float32 logits (N, K) that
            are finite numbers.
    """
    if model.training:
        raise ModelError("The model is in train mode; call model.eval() before it is judged.")
    logits = _forward(model, images)
    _check_logits(logits, len(images), classes)
    scale = logits.abs().amax().clamp(min=1.0)
    repeats = [_forward(model, images) for _ in range(_REPEATS)]
    for answer in repeats:
        _check_logits(answer, len(images), classes)
    traced, gradient = _traced(model, images, classes)
    return Behaviour(
        max(logit_change(answer, logits, scale) for answer in repeats),
        logit_change(_alone(model, images, classes), logits, scale),
        logit_change(traced, logits, scale),
        gradient,
    )


def check_classifier(model: nn.Module, images: Tensor, *, classes: int) -> None:
    """Check `model` on a few real images.

    Args:
        model: the classifier, in eval mode.
        images: (N, C, H, W) float32 in [0, 1], on the model's device; 16 are plenty.
        classes: K.

    Raises:
        ModelError: naming the first rule that the model breaks, and the mend.
    """
    found = examine_classifier(model, images, classes=classes)
    if found.repeat_change > 0:
        raise ModelError(
            "The model answers the same images differently the second time; randomness at inference is outside the "
            "protocol, so fix its seed or remove it."
        )
    if found.batch_change > CHANGE_TOLERANCE:
        raise ModelError(
            f"The model answers an image differently alone than in a batch (logits move by {found.batch_change:.2g} of "
            "their scale); batch statistics at inference are outside the protocol."
        )
    if found.autograd_change > CHANGE_TOLERANCE:
        raise ModelError(
            "The model answers differently when gradients are recorded; a forward pass must not look at autograd."
        )
    if found.gradient == "missing":
        raise ModelError(
            "No gradient reaches the model's input (something detaches it), so gradient attacks cannot judge it."
        )


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    shown = images.clone()
    try:
        with torch.inference_mode():
            logits = model(shown)
    except Exception as error:
        raise ModelError(
            f"The model fails on images of shape {tuple(images.shape[1:])}: {first_line(error)}."
        ) from error
    _require_unaltered(shown, images)
    if not isinstance(logits, Tensor):
        raise ModelError(f"The model must return a tensor of logits (N, K), not {type(logits).__name__}.")
    return logits.clone()


def _require_unaltered(shown: Tensor, images: Tensor) -> None:
    if not torch.equal(shown, images):
        raise ModelError("The model alters the images that it is given, in place; it must work on a copy of them.")


def require_form(logits: Tensor, count: int, classes: int) -> None:
    """Refuse logits that are not float32 (count, classes).

    Raises:
        ModelError: naming what was seen.
    """
    if logits.shape != (count, classes):
        raise ModelError(
            f"The model must return logits of shape (N, {classes}) for this track; for {count} images it returned "
            f"{tuple(logits.shape)}."
        )
    if logits.dtype != torch.float32:
        raise ModelError(f"The model must return float32 logits, not {str(logits.dtype).removeprefix('torch.')}.")


def _check_logits(logits: Tensor, count: int, classes: int) -> None:
    require_form(logits, count, classes)
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits).all(dim=1)).sum())
        raise ModelError(f"The model returns NaN or infinite logits for {bad} of {count} clean images.")
    rows_sum_to_one = bool(((logits.sum(dim=1) - 1).abs() < 1e-4).all())
    if rows_sum_to_one and bool((logits >= 0).all()) and bool((logits <= 1 + 1e-6).all()):
        raise ModelError(
            "The model returns probabilities instead of logits, which hides its gradients from every attack; "
            "remove the final softmax."
        )


def logit_change(answer: Tensor, logits: Tensor, scale: Tensor) -> float:
    """The largest move of a logit as a share of `scale`; the largest float32 where the move is no finite number.

    >>> logit_change(torch.tensor([[1.0, torch.nan]]), torch.zeros(1, 2), torch.tensor(1.0)) > 1e38
    True
    """
    change = (answer - logits).abs().amax() / scale
    return float(change.nan_to_num(nan=torch.finfo(torch.float32).max))


def _alone(model: nn.Module, images: Tensor, classes: int) -> Tensor:
    """The logits of images that are shown one at a time."""
    answers = [_forward(model, image.unsqueeze(0)) for image in images]
    for answer in answers:
        _check_logits(answer, 1, classes)
    return torch.cat(answers)


def _traced(model: nn.Module, images: Tensor, classes: int) -> tuple[Tensor, Gradient]:
    """The logits while gradients are recorded, and what comes of the gradient."""
    inputs = images.clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            logits = model(inputs)
            require_form(logits, len(images), classes)
            gradient = _input_gradient(logits, inputs)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"The model fails when gradients are recorded: {first_line(error)}.") from error
    _require_unaltered(inputs.detach(), images)
    if gradient is None:
        return logits.detach(), "missing"
    return logits.detach(), "present" if bool(torch.isfinite(gradient).all()) else "not finite"


def _input_gradient(logits: Tensor, inputs: Tensor) -> Tensor | None:
    # The parameters alone make logits require a gradient, so only asking for the input's tells.
    if not logits.requires_grad:
        return None
    return torch.autograd.grad(logits.sum(), inputs, allow_unused=True)[0]
