"""A trained network as a fixed map to features, without its last two linear layers.

Kuelbs et al. 2024 (arXiv 2405.14033) retrain "the final two fully connected layers" of a residual network on what the
layers before them compute. Those stay as they are: no weight moves, and batch statistics do not either.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from robustboard.defenses.adapter import Split, TrainingData
from robustboard.errors import DefenseError


def trunk_of(network: nn.Module) -> nn.Sequential:
    """A frozen copy of what a network computes before its last two linear layers, in eval mode.

    A residual network that ends in a single linear layer `fc` loses that one.

    Args:
        network: an `nn.Sequential` with the linear layers to replace among its own layers.

    Raises:
        DefenseError: if there are no such layers.

    >>> layers = nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)
    >>> len(trunk_of(nn.Sequential(*layers)))
    3
    """
    layers = list(copy.deepcopy(network)) if isinstance(network, nn.Sequential) else []
    linear = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    last = layers[-1] if layers else None
    if len(linear) >= 2:
        layers = layers[: linear[-2]]
    elif last is not None and isinstance(getattr(last, "fc", None), nn.Linear):
        last.fc = nn.Identity()
    else:
        raise DefenseError(
            "The base network does not end in two linear layers that could be replaced; choose another architecture, "
            "such as cnn-small or resnet18."
        )
    return nn.Sequential(*layers).eval().requires_grad_(requires_grad=False)


def features_of(trunk: nn.Module, data: TrainingData, *, device: torch.device) -> TrainingData:
    """The training and validation splits with the trunk's features (N, q) in the images' place."""
    trunk.to(device)
    splits = [Split(_passed(trunk, split.images, device), split.labels) for split in (data.train, data.validation)]
    return TrainingData(data.name, splits[0], splits[1], data.classes)


@torch.no_grad()
def _passed(trunk: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    parts = [trunk(part.to(device)).flatten(1).cpu() for part in torch.split(images, 500)]
    return torch.cat(parts) if len(images) else images.flatten(1)
