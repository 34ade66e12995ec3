"""The size of a batch follows the activations of a network, and any module can be asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustboard.attacks.kernels.batches import examples_at_a_time


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024 * width, 10)).eval()


def test_wider_networks_get_fewer_examples_within_limits() -> None:
    sizes = [examples_at_a_time(network(width), torch.zeros(1, 3, 32, 32)) for width in (1, 4, 16, 64)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > sizes[2] >= sizes[3] == 16


def test_no_hook_stays() -> None:
    model = network(2)
    examples_at_a_time(model, torch.zeros(1, 3, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_parts_are_borne() -> None:
    model = nn.Sequential(torch.jit.script(network(2))).eval()
    assert 16 <= examples_at_a_time(model, torch.zeros(1, 3, 32, 32)) <= 1024
