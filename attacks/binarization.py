"""An active test of an attack (Zimmermann et al. 2022, "Increasing confidence in adversarial robustness evaluations").

Around each example a binary task is made whose answer is known: a linear readout tells one point on the surface of the
ball from many points inside it, so that an adversarial example for the readout exists by construction. An attack that
cannot find one on such a task says nothing by failing on the real one. Drawing points at random must not do as well,
else the task was too easy to tell.

The paper's readout stands on the penultimate features. Here it stands on the logits: whatever a model does between its
features and its logits (a scale, a detector, a detour of the gradient) then lies in the attack's way, as it does in the
protocol; and any submitted program can be tested, not only one whose layers can be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel

_INNER = 200
_INNER_REACH = 0.95
"""How far inner points reach, as a share of the radius (the paper's gap of 0.05)."""
_CANDIDATES = 50
_RANDOM = 40
_CLOSENESS = 0.9
"""Where the threshold lies between the highest inner score (0) and the point on the surface (1)."""
_RIDGE = 1e-3


@dataclass(frozen=True)
class Binarization:
    """What became of each example, booleans (N,).

    Attributes:
        built: whether the readout separates; the others are no task.
        found: whether the attack solved the task.
        random: whether drawing points of the surface at random solved it.
    """

    built: Tensor
    found: Tensor
    random: Tensor


def binarization_test(
    model: nn.Module,
    images: Tensor,
    *,
    threat: ThreatModel,
    keys: Sequence[str],
    seed: int,
    steps: int,
    restarts: int,
    step_size: float,
) -> Binarization:
    """Build one task an example and attack it with projected gradient ascent on the readout's score.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images.
        threat: the ball.
        keys: a content hash an example; every draw is keyed by it.
        seed: of the draws.
        steps: of one run.
        restarts: runs, each from a random start.
        step_size: in pixel units of [0, 1].
    """
    tasks = [
        _task(model, images[i : i + 1], threat, keyed.generator(seed, "binarization", key))
        for i, key in enumerate(keys)
    ]
    weights = torch.stack([task.weight for task in tasks])
    thresholds = torch.stack([task.threshold for task in tasks])
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    unused = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def score(logits: Tensor, labels: Tensor) -> Tensor:
        del labels
        return (logits.double() * weights).sum(dim=1) - thresholds

    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    for restart in range(restarts):
        noise = draw(keys, images.shape[1:], seed, "binarization start", restart).to(images.device)
        points = threat.start(images, noise)
        for _ in range(steps):
            points = ascend(
                model, images, unused, threat=threat, start=points, steps=1, step_size=step_size, loss=score
            )
            with torch.no_grad():
                found |= score(model(points), unused) > 0
            if bool(found.all()):
                break
    return Binarization(
        torch.stack([task.built for task in tasks]), found, torch.stack([task.random for task in tasks])
    )


@dataclass(frozen=True)
class _Task:
    weight: Tensor
    threshold: Tensor
    built: Tensor
    random: Tensor


def _task(model: nn.Module, image: Tensor, threat: ThreatModel, draws: torch.Generator) -> _Task:
    """The readout of one example: linear discriminant analysis of the inner points against the best surface point."""
    inner = torch.cat([image, _points(image, threat, _INNER, draws, surface=False)])
    surface = _points(image, threat, _CANDIDATES + _RANDOM, draws, surface=True)
    with torch.no_grad():
        logits = model(torch.cat([inner, surface])).double()
    inside, candidates, random = logits.split([len(inner), _CANDIDATES, _RANDOM])
    centre = inside.mean(dim=0)
    spread = torch.cov((inside - centre).T)
    ridge = _RIDGE * spread.diagonal().mean().clamp(min=1e-300)
    spread = spread + ridge * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    readouts = torch.linalg.solve(spread, (candidates - centre).T).T  # one a candidate
    highest = (inside @ readouts.T).amax(dim=0)
    own = (candidates * readouts).sum(dim=1)
    # In units of each readout's own deviation over the inner points, so that candidates can be compared.
    deviation = ((readouts @ spread) * readouts).sum(dim=1).clamp(min=1e-300).sqrt()
    gaps = (own - highest) / deviation
    best = int(gaps.argmax())
    threshold = highest[best] + _CLOSENESS * (own[best] - highest[best])
    return _Task(
        readouts[best] / deviation[best],
        threshold / deviation[best],
        (gaps[best] > 0) & torch.isfinite(gaps[best]),
        (random @ readouts[best] > threshold).any(),
    )


def _points(image: Tensor, threat: ThreatModel, count: int, draws: torch.Generator, *, surface: bool) -> Tensor:
    """Random points: corners of the L-inf ball or its inner part, the L2 sphere or the ball inside."""
    shape = (count, *image.shape[1:])
    if threat.norm == "linf":
        noise = torch.rand(shape, generator=draws) * 2 - 1
        noise = noise.sign() if surface else _INNER_REACH * noise
    else:
        noise = torch.randn(shape, generator=draws)
        noise /= torch.linalg.vector_norm(noise.flatten(1), dim=1).view(-1, *[1] * (noise.dim() - 1))
        if not surface:
            radii = torch.rand(count, generator=draws) ** (1 / image.numel())
            noise *= _INNER_REACH * radii.view(-1, *[1] * (noise.dim() - 1))
    around = image.expand(shape)
    return threat.project(around + threat.radius * noise.to(image.device), around)
