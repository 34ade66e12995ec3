"""Random draws keyed by what they belong to, so that no batch, order, worker or resume can change them.

An example is known by the sha256 of its pixels. A draw is known by (seed, purpose, ..., example): those words are
hashed into the seed of a generator of its own, always on the CPU, so that every device sees the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def content_hash(image: npt.NDArray[np.generic]) -> str:
    """The sha256 of one image's pixels, (C, H, W), uint8 or float32 little-endian, as 64 hexadecimal digits."""
    if image.dtype != np.uint8:
        image = image.astype("<f4", copy=False)
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def derive_seed(*words: str | int) -> int:
    """A 63-bit seed from any words; equal words give equal seeds on every machine.

    >>> derive_seed(0, "pgd", 3) == derive_seed(0, "pgd", 3) != derive_seed(0, "pgd", 4)
    True
    """
    text = "\x1f".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(*words: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*words)`."""
    return torch.Generator().manual_seed(derive_seed(*words))


def uniform(keys: Sequence[str], shape: Sequence[int], *words: str | int) -> Tensor:
    """Draws from U(-1, 1), shape (len(keys), *shape): row i depends on `keys[i]` and `words` alone."""
    draws = torch.empty(len(keys), *shape)
    for row, key in zip(draws, keys, strict=True):
        row.uniform_(-1.0, 1.0, generator=generator(*words, key))
    return draws


def normal(keys: Sequence[str], shape: Sequence[int], *words: str | int) -> Tensor:
    """Standard normal draws, shape (len(keys), *shape): row i depends on `keys[i]` and `words` alone."""
    draws = torch.empty(len(keys), *shape)
    for row, key in zip(draws, keys, strict=True):
        row.normal_(generator=generator(*words, key))
    return draws
