from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from robustboard.attacks import keyed

Draw = Callable[..., Tensor]
DRAWS = pytest.mark.parametrize("draw", [keyed.uniform, keyed.normal])


@DRAWS
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 8, 8), (1, 5, 7)])
def test_a_row_depends_on_its_key_alone(draw: Draw, shape: tuple[int, ...]) -> None:
    """Order, batch and neighbours must not move a draw, or verdicts would move with them."""
    keys = ["a", "b", "c", "d"]
    together = draw(keys, shape, 0, "pgd", "ce", 1)
    alone = torch.cat([draw([key], shape, 0, "pgd", "ce", 1) for key in reversed(keys)]).flip(0)
    assert torch.equal(together, alone)


@DRAWS
def test_every_word_counts(draw: Draw) -> None:
    """Another seed, loss, restart or key gives another draw."""
    words = [(0, "pgd", "ce", 0), (1, "pgd", "ce", 0), (0, "pgd", "dlr", 0), (0, "pgd", "ce", 1)]
    drawn = [draw(["a"], (1, 4, 4), *word) for word in words] + [draw(["b"], (1, 4, 4), *words[0])]
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == 5


@DRAWS
def test_no_examples_give_no_draws(draw: Draw) -> None:
    assert draw([], (1, 4, 4), 0).shape == (0, 1, 4, 4)


@DRAWS
def test_draws_leave_the_global_generator_alone(draw: Draw) -> None:
    before = torch.random.get_rng_state()
    draw(["a", "b"], (3, 8, 8), 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_distributions_are_what_they_say() -> None:
    keys = [str(i) for i in range(50)]
    uniform, normal = keyed.uniform(keys, (1, 20, 20), 7), keyed.normal(keys, (1, 20, 20), 7)
    assert float(uniform.min()) >= -1
    assert float(uniform.max()) <= 1
    assert float(uniform.mean()) == pytest.approx(0, abs=0.02)
    assert float(uniform.var()) == pytest.approx(1 / 3, abs=0.02)
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.var()) == pytest.approx(1, abs=0.03)


def test_content_hash_is_the_sha256_of_the_pixels() -> None:
    """Track files name images by this hash, so anyone must be able to compute it."""
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    assert keyed.content_hash(pixels) == hashlib.sha256(bytes(range(12))).hexdigest()
    floats = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 2, 2)
    assert keyed.content_hash(floats) == hashlib.sha256(floats.astype("<f4").tobytes()).hexdigest()
    # The same image in another memory layout, or another byte order, is the same image.
    assert keyed.content_hash(np.asfortranarray(pixels)) == keyed.content_hash(pixels)
    assert keyed.content_hash(floats.astype(">f4")) == keyed.content_hash(floats)


def test_seeds_are_the_same_on_every_machine() -> None:
    """A constant from the definition, sha256 of the joined words: stored results rest on it."""
    digest = hashlib.sha256(b"0\x1fpgd\x1fce").digest()
    assert keyed.derive_seed(0, "pgd", "ce") == int.from_bytes(digest[:8], "little") // 2
