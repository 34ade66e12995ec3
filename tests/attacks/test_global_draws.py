"""Torch's global generators under threads: what is seeded in one is not drawn, or seeded, by another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from robustboard.attacks import global_draws


def _draws(seed: int) -> Tensor:
    with global_draws.preserved():
        torch.manual_seed(seed)
        return torch.cat([torch.rand(500) for _ in range(20)])


def test_threads_draw_what_each_would_draw_alone() -> None:
    alone = [_draws(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(_draws, list(range(8)) * 25))
    assert all(torch.equal(found, alone[place % 8]) for place, found in enumerate(together))


def _draw_and_fail() -> None:
    with global_draws.preserved():
        torch.manual_seed(1)
        first = torch.get_rng_state()
        assert len(_draws(2)) == 10_000
        assert torch.equal(torch.get_rng_state(), first)
        raise ValueError("inside")


def test_blocks_can_be_nested_and_the_state_comes_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"):
        _draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)
