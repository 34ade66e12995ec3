"""How small the gradients of a softmax are, where floating-point numbers no longer hold them.

A distilled network's top logit leads by thousands, so that its softmax and the derivative of it underflow to zero, in
float64 too. Their logarithms do not: they are computed here from the logits and the logits' derivatives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def log10_softmax_gradients(
    model: nn.Module, images: Tensor, *, temperature: float = 1.0, batch_size: int = 100
) -> Tensor:
    """log10 of the mean over classes j and features p of |dF_j / dx_p|, F = softmax(z / T); float64 (N,).

    With m the top class and L the largest log F_j among the others, every derivative is e^L times something of ordinary
    size: dF_j = F_j sum_k F_k (dz_j - dz_k) / T, and dF_m is minus the sum of the others.

    Args:
        model: in eval mode; float32 images (N, C, H, W) to logits (N, K).
        images: on the model's device.
        temperature: T.
        batch_size: images at a time.
    """
    parts = [_log10_gradients(model, part, temperature) for part in torch.split(images, batch_size)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _log10_gradients(model: nn.Module, images: Tensor, temperature: float) -> Tensor:
    points = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(points) / temperature
        rows = [
            torch.autograd.grad(logits[:, k].sum(), points, retain_graph=True)[0].flatten(1).double()
            for k in range(logits.shape[1])
        ]
    slopes = torch.stack(rows, dim=1)  # (N, K, D)
    scores = functional.log_softmax(logits.detach().double(), dim=1)
    top = scores.argmax(dim=1, keepdim=True)
    others = scores.scatter(1, top, -math.inf)
    largest = others.amax(dim=1, keepdim=True)
    average = (scores.exp().unsqueeze(2) * slopes).sum(dim=1, keepdim=True)
    scaled = (others - largest).exp().unsqueeze(2) * (slopes - average)
    scaled.scatter_(1, top.unsqueeze(2).expand(-1, -1, scaled.shape[2]), -scaled.sum(dim=1, keepdim=True))
    mean = scaled.abs().flatten(1).mean(dim=1)
    return (largest.squeeze(1) / math.log(10) + mean.log10()).cpu()
