"""The coordinates that convex training works in: centred pixels or network features, scaled alike to norm about one.

All coordinates share one scale, so an L2 ball of the inputs is an L2 ball of the features and stays one when they are
projected on principal components: what is exact for the features is exact for the inputs. The map is affine, so a
trained two-layer network absorbs it into its directions and offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureMap(nn.Module):
    """z = B (x - mean) / scale, with the principal directions as the rows of B, or without B.

    Args:
        mean: (d,).
        scale: one positive number for all coordinates.
        basis: (q, d) with orthonormal rows, or None to keep all d coordinates.
    """

    mean: Tensor
    scale: Tensor
    basis: Tensor | None

    def __init__(self, mean: Tensor, scale: float, basis: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("scale", torch.tensor(scale, dtype=mean.dtype))
        self.register_buffer("basis", None if basis is None else basis.detach().clone())

    @property
    def dimension(self) -> int:
        """The number of features q."""
        return len(self.mean if self.basis is None else self.basis)

    def forward(self, x: Tensor) -> Tensor:
        """Features (N, q) of inputs (N, d) or images (N, C, H, W)."""
        centred = x.flatten(1) - self.mean
        return (centred if self.basis is None else centred @ self.basis.T) / self.scale

    def folded(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (m, d) and offsets (m,) on the inputs that act as `directions` (m, q) do on the features."""
        on_inputs = (directions if self.basis is None else directions @ self.basis) / self.scale
        return on_inputs, -on_inputs @ self.mean


def fitted(inputs: Tensor, *, norm: float | None = None, components: int | None = None) -> FeatureMap:
    """The map that centres `inputs` and scales them.

    Args:
        inputs: (N, d) or (N, C, H, W), the training split.
        norm: what the root mean square of the features' norm is to be. None divides by the deviation of the
            coordinates, averaged by itself so that those which never vary do not count: what varies has a deviation of
            about one.
        components: how many principal components to keep; None, or not fewer than d, keeps the coordinates.

    >>> features = fitted(torch.tensor([[0.0, 0.0], [6.0, 8.0]]), norm=1.0)
    >>> features(torch.tensor([[6.0, 8.0]])).norm().item()
    1.0
    """
    flat = inputs.flatten(1).double()
    mean = flat.mean(dim=0)
    centred = flat - mean
    deviations = centred.square().mean(dim=0).sqrt()
    basis = None
    if components is not None and components < flat.shape[1]:
        basis = _signed(torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)[:components])
    if norm is None:
        scale = float(deviations.square().sum() / deviations.sum()) if bool((deviations > 0).any()) else 1.0
    else:
        kept = centred if basis is None else centred @ basis.T
        scale = float(kept.square().sum(dim=1).mean().sqrt()) / norm or 1.0
    return FeatureMap(mean.to(inputs.dtype), scale, None if basis is None else basis.to(inputs.dtype))


def linf_reach(inputs: Tensor) -> float:
    """How far a step of L-inf length one goes along the deviations s of the coordinates: |s|_1 / |s|_2.

    It lies between 1 and sqrt(d), and is sqrt(d) where all coordinates vary alike.

    >>> round(linf_reach(torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])) ** 2, 6)
    2.0
    """
    deviations = inputs.flatten(1).double().std(dim=0, correction=0)
    length = float(torch.linalg.vector_norm(deviations))
    return float(deviations.sum()) / length if length > 0 else 1.0


def typical_norm(inputs: Tensor) -> float:
    """The root mean square distance of inputs (N, ...) from their mean.

    >>> typical_norm(torch.tensor([[0.0, 0.0], [6.0, 8.0]]))
    5.0
    """
    flat = inputs.flatten(1).double()
    return float((flat - flat.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _signed(basis: Tensor) -> Tensor:
    """Each row with its largest entry positive: eigenvectors are known up to their sign."""
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return basis * largest.sign()
