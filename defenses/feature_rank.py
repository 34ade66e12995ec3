"""How flat a network's last features lie, and what that costs a classifier trained by cross-entropy.

Nar et al. 2019 (arXiv 1901.08360), theorem 1: if the features of both classes lie in an affine subspace, at the same
offsets Delta_k along the directions orthogonal to it, then gradient descent on the cross-entropy ends with a margin
of at most 1 / sqrt(1 / gamma^2 + B^2 sum_k Delta_k^2), where gamma is the largest margin there is and B the offset of
the classifier that it finds. Trained features lie only nearly so: the subspace is taken to be that of the leading
principal components.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustboard.defenses.training import device_of, evaluating
from robustboard.errors import DefenseError


@dataclass(frozen=True)
class FeatureRank:
    """How many dimensions a set of features really uses.

    Attributes:
        dimensions: the length d of a feature vector.
        k_95: the least number of principal components that hold 95 % of the variance.
        k_99: that number for 99 %.
        stable_rank: ||F||_F^2 / ||F||_2^2 of the centred features F, between 1 and d; 0 if they do not vary.
        offset: sum_k Delta_k^2, the squared length of the mean feature outside the first k_99 components.
    """

    dimensions: int
    k_95: int
    k_99: int
    stable_rank: float
    offset: float


def feature_rank(features: Tensor) -> FeatureRank:
    """The principal components of features (N, d), measured in double precision.

    Raises:
        DefenseError: if there are no features, or some are not finite.

    >>> plane = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])
    >>> feature_rank(plane)
    FeatureRank(dimensions=3, k_95=2, k_99=2, stable_rank=2.0, offset=25.0)
    """
    mean, variances, directions = _principal(features)
    total = float(variances.sum())
    if total == 0:
        return FeatureRank(len(mean), 0, 0, 0.0, float(mean @ mean))
    held = variances.cumsum(dim=0) / total
    # The last sum may miss 1 by rounding, which no share below 1 notices.
    k_95, k_99 = (int((held < share).sum()) + 1 for share in (0.95, 0.99))
    outside = mean - directions[:k_99].T @ (directions[:k_99] @ mean)
    return FeatureRank(len(mean), k_95, k_99, total / float(variances[0]), float(outside @ outside))


def idle_share(weight: Tensor, features: Tensor) -> float:
    """The share of a classifier's squared weight (d,) that lies outside the first k_99 components of features (N, d).

    It tells no two of them apart, and widens the norm that the margin is divided by: in theorem 1 it is
    B^2 sum_k Delta_k^2 / ||w||^2.

    Raises:
        DefenseError: as `feature_rank`.

    >>> plane = torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])
    >>> round(idle_share(torch.tensor([2.0, 0.0, 1.0]), plane), 6)
    0.2
    """
    _, _, directions = _principal(features)
    inside = directions[: feature_rank(features).k_99] @ weight.detach().double().cpu()
    return 1 - float(inside.square().sum() / weight.detach().double().square().sum())


def _principal(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean (d,), and the variances (r,), falling, along principal directions (r, d)."""
    if not features.numel() or not bool(torch.isfinite(features).all()):
        raise DefenseError("The rank of features can be measured only where there are some, all of them finite.")
    points = features.detach().double().cpu()
    mean = points.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(points - mean, full_matrices=False)
    return mean, lengths.square() / len(points), directions


def penultimate_features(model: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """What the network's last linear layer is given for images (N, C, H, W): features (N, d), on the CPU.

    Raises:
        DefenseError: if the network has no linear layer, or its last one is not where the logits come from.
    """
    found: list[Tensor] = []
    layer, device = last_layer(model), device_of(model)
    handle = layer.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().flatten(1).cpu()))
    try:
        with evaluating(model), torch.no_grad():
            for start in range(0, len(images), batch_size):
                model(images[start : start + batch_size].to(device))
    finally:
        handle.remove()
    return torch.cat(found) if found else torch.empty(0, layer.in_features)


def last_layer(model: nn.Module) -> nn.Linear:
    """The network's last linear layer, the one that makes the logits.

    Raises:
        DefenseError: if it has none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise DefenseError("This network has no linear layer, so it has no penultimate features.")
    return layers[-1]


def cross_entropy_margin_bound(gamma: float, bias: float, offset: float) -> float:
    """Theorem 1's upper bound on the margin that gradient descent on the cross-entropy finds.

    Args:
        gamma: the largest margin of any separating hyperplane.
        bias: B, the offset of the classifier found, scaled so that its smallest output y (w^T x + B) is 1.
        offset: sum_k Delta_k^2.

    >>> round(cross_entropy_margin_bound(0.5, bias=0.5, offset=16.0), 6)
    0.353553
    """
    return 1 / math.sqrt(1 / gamma**2 + bias**2 * offset)
