"""Mini-batches in an order, and with augmentations and draws, that follow from (seed, epoch) alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import Norm
from robustboard.defenses.adapter import Split


@dataclass(frozen=True)
class Batch:
    """One mini-batch on the training's device.

    Attributes:
        images: (N, C, H, W), augmented where the recipe says so.
        labels: (N,).
        done: the share of the whole training that lies behind, in [0, 1).
        draws: a CPU generator for whatever the method draws.
    """

    images: Tensor
    labels: Tensor
    done: float
    draws: torch.Generator

    def noise(self, norm: Norm) -> Tensor:
        """Noise of the images' shape, as `ThreatModel.start` wants it: uniform on [-1, 1], or normal for L2."""
        shape = self.images.shape
        if norm == "linf":
            return (torch.rand(shape, generator=self.draws) * 2 - 1).to(self.images.device)
        return torch.randn(shape, generator=self.draws).to(self.images.device)


def epoch_batches(
    split: Split,
    *,
    size: int,
    augment: bool,
    epoch: int,
    epochs: int,
    seed: int,
    device: torch.device,
    stratified: bool = False,
) -> Iterator[Batch]:
    """One pass over a split in random order.

    Args:
        split: what to pass over.
        size: images in a mini-batch, at most; the sizes are equal up to one, as batch statistics need.
        augment: whether images are `augmented`.
        epoch: which pass this is, from 0.
        epochs: how many there are.
        seed: of the order, the augmentations and the batches' draws.
        device: where the batches go.
        stratified: every mini-batch holds the classes in the proportions of the split, but for an image or two.
    """
    draws = generator(seed, "mini-batches", epoch)
    order = torch.randperm(len(split), generator=draws)
    if stratified:
        order = spread(order, split.labels)
    parts = order.tensor_split(math.ceil(len(split) / size))
    for step, chosen in enumerate(parts):
        images = split.images[chosen]
        if augment:
            images = augmented(images, draws)
        done = (epoch + step / len(parts)) / epochs
        yield Batch(images.to(device), split.labels[chosen].to(device), done, draws)


def spread(order: Tensor, labels: Tensor) -> Tensor:
    """The order (N,) with every class spread evenly over it; within a class the order stays.

    >>> spread(torch.arange(6), torch.tensor([0, 0, 0, 0, 1, 1]))
    tensor([0, 4, 1, 2, 5, 3])
    """
    place = torch.empty(len(order), dtype=torch.float64)
    for label in torch.bincount(labels).nonzero().flatten():
        mine = labels[order] == label
        count = int(mine.sum())
        place[mine] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return order[place.argsort(stable=True)]


def augmented(images: Tensor, draws: torch.Generator) -> Tensor:
    """Random crops of images padded by an eighth of their side (reflected), half of them mirrored; (N, C, H, W)."""
    count, _, height, width = images.shape
    above, left = height // 8, width // 8
    rows = torch.randint(2 * above + 1, (count, 1), generator=draws) + torch.arange(height)
    columns = torch.randint(2 * left + 1, (count, 1), generator=draws) + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=draws) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (left, left, above, above), mode="reflect")
    which = torch.arange(count).view(-1, 1, 1)
    # Indices on both sides of a slice put the sliced axis, the channels, last.
    return padded[which, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()
