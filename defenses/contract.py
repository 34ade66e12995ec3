"""The classifier contract, checked on a few images before any long work starts.

A classifier takes float32 images (N, C, H, W) in [0, 1] and returns finite logits (N, K). In eval mode it is
deterministic, judges every image by itself, answers the same with and without autograd, and lets gradients through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustboard.errors import ModelError, first_line

# Matrix products of other batch sizes sum in another order: float32 rounding, far below any real dependence.
_BATCH_TOLERANCE = 1e-3


def check_classifier(model: nn.Module, images: Tensor, *, classes: int) -> None:
    """Check `model` on a few real images.

    Args:
        model: the classifier, in eval mode.
        images: (N, C, H, W) float32 in [0, 1], on the model's device; 16 are plenty.
        classes: K.

    Raises:
        ModelError: naming the first rule that the model breaks, and the mend.
    """
    if model.training:
        raise ModelError("The model is in train mode; call model.eval() before it is judged.")
    logits = _forward(model, images)
    _check_logits(logits, len(images), classes)
    if not torch.equal(logits, _forward(model, images)):
        raise ModelError(
            "The model answers the same images differently the second time; randomness at inference is outside the "
            "protocol, so fix its seed or remove it."
        )
    _check_batch_independence(model, images, logits)
    _check_autograd(model, images, logits)


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    try:
        with torch.inference_mode():
            logits = model(images)
    except Exception as error:
        raise ModelError(
            f"The model fails on images of shape {tuple(images.shape[1:])}: {first_line(error)}."
        ) from error
    if not isinstance(logits, Tensor):
        raise ModelError(f"The model must return a tensor of logits (N, K), not {type(logits).__name__}.")
    return logits.clone()


def _check_logits(logits: Tensor, count: int, classes: int) -> None:
    if logits.shape != (count, classes):
        raise ModelError(
            f"The model must return logits of shape (N, {classes}) for this track; for {count} images it returned "
            f"{tuple(logits.shape)}."
        )
    if logits.dtype != torch.float32:
        raise ModelError(f"The model must return float32 logits, not {str(logits.dtype).removeprefix('torch.')}.")
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits).all(dim=1)).sum())
        raise ModelError(f"The model returns NaN or infinite logits for {bad} of {count} clean images.")
    rows_sum_to_one = bool(((logits.sum(dim=1) - 1).abs() < 1e-4).all())
    if rows_sum_to_one and bool((logits >= 0).all()) and bool((logits <= 1 + 1e-6).all()):
        raise ModelError(
            "The model returns probabilities instead of logits, which hides its gradients from every attack; "
            "remove the final softmax."
        )


def _check_batch_independence(model: nn.Module, images: Tensor, logits: Tensor) -> None:
    answers = [_forward(model, image.unsqueeze(0)) for image in images]
    for answer in answers:
        _check_logits(answer, 1, logits.shape[1])
    alone = torch.cat(answers)
    scale = logits.abs().amax().clamp(min=1.0)
    worst = float((alone - logits).abs().amax() / scale)
    if worst > _BATCH_TOLERANCE:
        raise ModelError(
            f"The model answers an image differently alone than in a batch (logits move by {worst:.2g} of their "
            "scale); batch statistics at inference are outside the protocol."
        )


def _check_autograd(model: nn.Module, images: Tensor, logits: Tensor) -> None:
    inputs = images.clone().requires_grad_(True)
    try:
        with torch.enable_grad():
            traced = model(inputs)
            gradient = _input_gradient(traced, inputs)
    except Exception as error:
        raise ModelError(f"The model fails when gradients are recorded: {first_line(error)}.") from error
    scale = logits.abs().amax().clamp(min=1.0)
    if float((traced.detach() - logits).abs().amax() / scale) > _BATCH_TOLERANCE:
        raise ModelError(
            "The model answers differently when gradients are recorded; a forward pass must not look at autograd."
        )
    if gradient is None:
        raise ModelError(
            "No gradient reaches the model's input (something detaches it), so gradient attacks cannot judge it."
        )


def _input_gradient(logits: Tensor, inputs: Tensor) -> Tensor | None:
    # The parameters alone make logits require a gradient, so only asking for the input's tells.
    if not logits.requires_grad:
        return None
    return torch.autograd.grad(logits.sum(), inputs, allow_unused=True)[0]
