"""The classifier contract, checked where an attack meets a model.

An attack that trusts a broken model reports robustness that is not there: NaN logits never change their arg-max, and a
model in training mode answers differently each time. So attacks refuse such models with a sentence.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from robustboard.errors import ModelError

NO_GRADIENT = "The model gives no gradient with respect to its input, so no gradient attack can judge it."


def require_eval(model: nn.Module) -> None:
    """Refuse a model in training mode.

    Raises:
        ModelError: if `model.training` is set.
    """
    if model.training:
        raise ModelError("The model is in training mode; call model.eval() before it is attacked.")


def require_shape(logits: Tensor, examples: int, classes: int | None = None) -> None:
    """Refuse logits that are not of shape (examples, K) with K of at least two, or exactly `classes`.

    Raises:
        ModelError: naming the shape that was seen.
    """
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != examples or shape[1] < 2 or classes not in (None, shape[1]):
        wanted = "K of at least 2" if classes is None else f"K = {classes}"
        raise ModelError(f"The model must return logits of shape ({examples}, K) with {wanted}, not {shape}.")


def require_logits(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits that are not finite numbers of shape (N, K), or that lack one of the labels' classes.

    Raises:
        ModelError: naming what was seen.
    """
    require_shape(logits, len(labels))
    if int(labels.max()) >= logits.shape[1]:
        raise ModelError(f"The model returns {logits.shape[1]} classes, but label {int(labels.max())} occurs.")
    require_finite(logits, "logits")


def require_finite(values: Tensor, what: str) -> None:
    """Refuse values, one row an example, that are NaN or infinite.

    Raises:
        ModelError: with the number of examples concerned, and what was seen.

    >>> import torch
    >>> require_finite(torch.tensor([[0.0, float("nan")]]), "logits")
    Traceback (most recent call last):
    robustboard.errors.ModelError: The model's logits are not finite numbers (nan seen, for 1 of 1 examples).
    """
    # A sum is finite only if all of it is, and takes a tenth of the time.
    if math.isfinite(float(values.detach().sum())):
        return
    finite = values.isfinite()
    if not bool(finite.all()):
        seen = float(values[~finite][0])
        bad = int((~finite.flatten(1).all(dim=1)).sum())
        raise ModelError(
            f"The model's {what} are not finite numbers ({seen} seen, for {bad} of {len(values)} examples)."
        )
