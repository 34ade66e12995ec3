"""The Wisconsin breast-cancer table as the convex programs take it, and attacks on networks of its features.

The paper's own preparation is not known. Here each of five folds standardises the columns on its training examples,
projects them on their principal components and divides by sqrt(d), which gives features of norm about one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from robustboard.attacks.pgd import pgd
from robustboard.attacks.quadratic import QuadraticNetwork, margin_forms
from robustboard.attacks.threat import ThreatModel
from robustboard.attacks.trust_region import minimum
from robustboard.bench.datasets import load_dataset
from robustboard.defenses.convex_programs import Floats, Labels

FOLDS = 5


@dataclass(frozen=True)
class Fold:
    """One part of the table to test on, and training examples from the others.

    Attributes:
        train: features (n, d).
        train_labels: (n,), 0 malignant and 1 benign.
        test: features (N, d).
        test_labels: (N,).
    """

    train: Floats
    train_labels: Labels
    test: Floats
    test_labels: Labels


def folds(*, examples: int = 100, components: int = 10, count: int = FOLDS) -> list[Fold]:
    """The first `count` of five folds; every example of the table is a test example of one fold.

    Args:
        examples: how many training examples each fold has.
        components: d.
        count: how many folds.

    >>> [fold.test.shape for fold in folds(count=2)]
    [(114, 10), (114, 10)]
    """
    dataset = load_dataset("breast-cancer")
    train = dataset.train
    assert train is not None
    parts = (train, dataset.test)
    hashes = [key for part in parts for key in part.hashes]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    rows = np.concatenate([part.images.reshape(len(part), -1) for part in parts]).astype(np.float64)[order]
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)[order]
    return [_fold(rows, labels, part, examples, components) for part in range(count)]


def _fold(rows: Floats, labels: Labels, part: int, examples: int, components: int) -> Fold:
    tested = np.arange(len(rows)) % FOLDS == part
    chosen = np.flatnonzero(~tested)[:examples]
    mean, deviation = rows[chosen].mean(axis=0), rows[chosen].std(axis=0).clip(min=1e-9)
    standard = (rows - mean) / deviation
    directions = np.linalg.svd(standard[chosen], full_matrices=False)[2][:components]
    features = standard @ directions.T / math.sqrt(components)
    return Fold(features[chosen], labels[chosen], features[tested], labels[tested])


def margins(network: QuadraticNetwork, x: Floats, labels: Labels, *, radius: float = 0.0) -> Floats:
    """The worst margins (N,) of a binary network over L2 balls, exact by the trust region."""
    network = network.requires_grad_(requires_grad=False)
    forms, inputs = margin_forms(network, torch.tensor([[1, 0], [0, 1]])), torch.from_numpy(x)
    values = forms.values(inputs) + minimum(forms.curvatures.unsqueeze(1), forms.slopes(inputs), radius).value
    return values.gather(0, torch.from_numpy(1 - labels).unsqueeze(0))[0].numpy()


def survives_linf(
    network: QuadraticNetwork,
    x: Floats,
    labels: Labels,
    *,
    eps: float,
    seed: int,
    steps: int = 100,
    restarts: int = 5,
) -> Tensor:
    """Which examples PGD in the L-inf ball of the features leaves correctly classified, booleans (N,).

    The features are mapped to the middle of [0, 1], so that the box of pixels, which they do not have, is never met.
    """
    unit = UnitBox(x, reach=eps)
    images, threat = unit.images(x), unit.threat("linf", eps)
    found = pgd(
        unit.network(network),
        images,
        torch.from_numpy(labels),
        threat=threat,
        keys=[str(place) for place in range(len(x))],
        seed=seed,
        steps=steps,
        restarts=restarts,
        step_size=threat.radius / 10,
        losses=("ce", "margin"),
    )
    with torch.no_grad():
        logits: Tensor = unit.network(network)(found)
    return logits.argmax(dim=1) == torch.from_numpy(labels)


class UnitBox:
    """Features as images (N, 1, 1, d): scaled alike into [0, 1], further than `reach` from its sides."""

    def __init__(self, *features: Floats, reach: float) -> None:
        low, high = min(float(part.min()) for part in features), max(float(part.max()) for part in features)
        self._low, self._span = low - 1.1 * reach, high - low + 2.2 * reach

    def images(self, x: Floats) -> Tensor:
        """Features (N, d) as images."""
        return torch.from_numpy((x - self._low) / self._span).float().reshape(len(x), 1, 1, -1)

    def threat(self, norm: str, radius: float) -> ThreatModel:
        """A ball of the features as one of the images."""
        return ThreatModel.parse(norm, Fraction(radius / self._span).limit_denominator(10**6))

    def network(self, network: QuadraticNetwork) -> nn.Sequential:
        """A network of features as one of images, in eval mode."""
        directions = network.directions.detach()
        a, b, c = network.coefficients.tolist()
        moved = QuadraticNetwork(
            (directions * self._span).float(),
            network.outputs.detach().float(),
            offsets=(network.offsets.detach() + self._low * directions.sum(dim=1)).float(),
            coefficients=(a, b, c),
        )
        return nn.Sequential(nn.Flatten(), moved).eval().requires_grad_(requires_grad=False)


def pooled(parts: Sequence[Floats | Tensor]) -> Tensor:
    """The flags of all folds behind each other."""
    return torch.cat([torch.as_tensor(part) for part in parts])
