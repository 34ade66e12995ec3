"""Tiny problems with an answer that is computed independently: one linear program for every activation pattern."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from robustboard.attacks.complete.network import ReluNetwork
from robustboard.attacks.complete.reduction import Problem, reduce_to_box


@dataclass(frozen=True)
class Tiny:
    """A small dense network with its box, and our reading of it."""

    model: nn.Sequential
    lower: Tensor
    upper: Tensor
    problem: Problem

    def minimum(self, target: int) -> float:
        """The exact least margin of class 0 over `target` on the box, from the weights alone."""
        linear = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        weights = [layer.weight.detach().double().numpy() for layer in linear]
        biases = [layer.bias.detach().double().numpy() for layer in linear]
        box = list(zip(self.lower.tolist(), self.upper.tolist(), strict=True))
        least = np.inf
        for pattern in itertools.product((0.0, 1.0), repeat=sum(len(bias) for bias in biases[:-1])):
            matrix, constant, signs = np.eye(len(self.lower)), np.zeros(len(self.lower)), np.array(pattern)
            rows, limits = [], []
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                matrix, constant = weight @ matrix, weight @ constant + bias
                on, signs = signs[: len(bias)], signs[len(bias) :]
                side = (1 - 2 * on)[:, None]
                rows.append(side * matrix)
                limits.append(-side[:, 0] * constant)
                matrix, constant = on[:, None] * matrix, on * constant
            row = weights[-1][0] - weights[-1][target]
            offset = row @ constant + biases[-1][0] - biases[-1][target]
            found = linprog(row @ matrix, A_ub=np.concatenate(rows), b_ub=np.concatenate(limits), bounds=box)
            if found.status == 0:
                least = min(least, found.fun + offset)
        return least


def make_tiny(seed: int, *, radius: float = 0.4, widths: tuple[int, ...] = (3, 4, 3, 3), iterations: int = 10) -> Tiny:
    """A random network in which class 0 leads somewhat at the centre, on a box around it."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layer = nn.Linear(before, after)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(after, before, generator=generator) / before**0.5)
            layer.bias.copy_(torch.randn(after, generator=generator) / 4)
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval()
    centre = torch.rand(widths[0], generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(centre.float()[None])[0]
        model[-1].bias[0] += logits[1:].max() - logits[0] + float(torch.rand(1, generator=generator))
    lower, upper = (centre - radius).clamp(min=0), (centre + radius).clamp(max=1)
    problem = reduce_to_box(
        ReluNetwork(model, torch.zeros(1, 1, 1, widths[0])),
        lower,
        upper,
        label=0,
        targets=tuple(range(1, widths[-1])),
        classes=widths[-1],
        iterations=iterations,
        memory_bytes=1 << 30,
    )
    return Tiny(model, lower, upper, problem)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Tiny]:
    return make_tiny
