"""Module robust criticality: how much adversarial loss a bounded change of one module's weights can add.

Zhu et al. 2023 (arXiv 2308.02533, sec. 3): MRC(i) = max R(theta + delta) - R(theta), the maximum over delta that is
zero outside module i with ||delta|| <= eps ||theta_i|| (Frobenius), R being the adversarial loss. Weights of module i
that stay in that ball, and nothing else changed, add at most MRC(i) to the adversarial loss.

The paper computes a relaxed form: the adversarial examples are made once, against theta, and stay. Its maximum bounds
the loss on those examples and not R, as other examples may be worse for the changed weights. With a `Ball` the
examples follow the weights, which is the definition. Either way gradient ascent finds a lower bound.

The paper's algorithm 1 and the authors' code differ, and both are here. `paper` stops at the first projection and
evaluates once; `code` always makes all passes and takes the worst of them, which is never less. Both project after a
whole pass over the examples (`projection="epoch"`); sec. 3.3 speaks of every step, which is the default here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import content_hash, generator, normal, uniform
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import NoProgress, Progress, Split
from robustboard.defenses.training import device_of, evaluating
from robustboard.defenses.weight_ascent import Ascent, Ball, WeightSearch
from robustboard.errors import DefenseError

__all__ = ["Ascent", "Ball", "Criticality", "adversarial_examples", "candidates", "robust_criticality"]

_BATCH = 1000


@dataclass(frozen=True)
class Criticality:
    """What is known of one module.

    Attributes:
        module: its name in the network.
        value: the MRC found, at least 0.
        accuracy_drop: by how much the share of correct examples falls at the worst weights.
        distance: how far those weights are, over the norm of the module's weights; at most `Ascent.radius`.
        reach: how far the ascent went before its farthest projection, on the same scale.
        epochs: passes made.
    """

    module: str
    value: float
    accuracy_drop: float
    distance: float
    reach: float
    epochs: int


def adversarial_examples(network: nn.Module, split: Split, *, threat: ThreatModel, steps: int, seed: int) -> Split:
    """PGD's last points around every image of a split, on the CPU: what the criticality is measured on.

    Every image is perturbed, also one that is misclassified, from a random start keyed by its pixels; steps have a
    quarter of the radius (the paper's 2/255 of 8/255).

    Args:
        network: in eval mode.
        split: clean images and labels.
        threat: the ball.
        steps: gradient steps an image.
        seed: of the random starts.
    """
    device = device_of(network)
    draw = uniform if threat.norm == "linf" else normal
    found = []
    for first in range(0, len(split), _BATCH):
        part = split.images[first : first + _BATCH]
        keys = [content_hash(image.numpy()) for image in part]
        noise = draw(keys, part.shape[1:], seed, "adversarial examples").to(device)
        images, labels = part.to(device), split.labels[first : first + _BATCH].to(device)
        points = ascend(
            network,
            images,
            labels,
            threat=threat,
            start=threat.start(images, noise),
            steps=steps,
            step_size=threat.radius / 4,
        )
        found.append(points.detach().cpu())
    return Split(torch.cat(found), split.labels)


def candidates(network: nn.Module) -> tuple[str, ...]:
    """The names of the modules whose criticality is defined: every convolution and linear layer, in their order.

    >>> candidates(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    ('1', '3')
    """
    return tuple(
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(module._parameters.get("weight"), nn.Parameter)
    )


def robust_criticality(
    network: nn.Module,
    module: str,
    examples: Split,
    *,
    ascent: Ascent,
    seed: int,
    ball: Ball | None = None,
    progress: Progress | None = None,
) -> Criticality:
    """The criticality of one module; the network is left as it was.

    Args:
        network: images (N, C, H, W) to logits (N, K); it is judged in eval mode, as it will be used.
        module: one of `candidates(network)`.
        examples: adversarial examples and their labels.
        ascent: how to search.
        seed: of the order of the examples.
        ball: lets the examples follow the weights after every pass; without it they stay, the relaxed form.
        progress: told of every pass.

    Raises:
        DefenseError: if the network has no such module, or its loss on the examples is not finite.
    """
    if module not in candidates(network):
        raise DefenseError(f"The network has no convolution or linear layer {module!r} to perturb.")
    weight = network.get_submodule(module).get_parameter("weight")
    with evaluating(network):
        search = WeightSearch(network, weight, examples, ball=ball)
        first_loss, first_accuracy = search.evaluate(search.start)
        if not math.isfinite(first_loss):
            raise DefenseError(f"The network's loss on the adversarial examples is {first_loss}, so nothing can rise.")
        found = Criticality(module, 0.0, 0.0, 0.0, 0.0, 0)
        current, last = search.start, not bool(search.start.any())
        while not last:
            epoch = found.epochs + 1
            order = torch.randperm(len(examples), generator=generator(seed, "criticality", module, epoch))
            current, reach, usable = search.climb(current, order, ascent)
            found = dataclasses.replace(found, reach=max(reach, found.reach), epochs=epoch)
            search.attack(current)
            projected = reach > ascent.radius
            last = not usable or epoch == ascent.epochs or (ascent.variant == "paper" and projected)
            if last or ascent.variant == "code":
                found = _worse(found, search, current, first_loss, first_accuracy)
            (progress or NoProgress()).advance()
    return found


def _worse(
    found: Criticality, search: WeightSearch, weight: Tensor, first_loss: float, first_accuracy: float
) -> Criticality:
    """`found`, with these weights in place of its own if they make the loss larger."""
    loss, accuracy = search.evaluate(weight)
    if not loss - first_loss > found.value:
        return found
    return dataclasses.replace(
        found, value=loss - first_loss, accuracy_drop=first_accuracy - accuracy, distance=search.distance(weight)
    )
