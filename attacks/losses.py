"""What an attack maximises: per-example losses of logits (N, K) and labels (N,), higher is more adversarial.

Cross-entropy saturates in float32 once the logits are large (its gradient becomes exactly zero), which looks like
robustness and is none; the margin and the difference of logits ratio (DLR) do not. DLR is from Croce & Hein 2020,
arXiv 2003.01690, sec. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, shape (N,)."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y, shape (N,): positive where the example is misclassified.

    >>> import torch
    >>> margin_loss(torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]), torch.tensor([0, 0]))
    tensor([ 2., -3.])
    """
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -math.inf)
    return others.amax(dim=1) - logits.gather(1, own).squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin over z_(1) - z_(3), the gap of the largest and third largest logit, shape (N,).

    It does not change when the logits are shifted or scaled. It needs three classes.

    >>> import torch
    >>> logits, labels = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0])
    >>> dlr(logits, labels), dlr(10 * logits, labels)
    (tensor([1.]), tensor([1.]))
    """
    top = logits.topk(3, dim=1).values
    return margin_loss(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES: Mapping[str, Loss] = MappingProxyType({"ce": cross_entropy, "margin": margin_loss, "dlr": dlr})


def applicable_losses(classes: int) -> tuple[str, ...]:
    """The names in `LOSSES` that are defined for so many classes.

    >>> applicable_losses(2)
    ('ce', 'margin')
    """
    return tuple(name for name in LOSSES if name != "dlr" or classes >= 3)
