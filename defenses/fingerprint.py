"""One hash over settings and tensors, by which a kept state is known to be of the very same computation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def fingerprint(words: object, tensors: Iterable[Tensor]) -> str:
    """The sha256 of `repr(words)` and of every tensor's type, shape and content, in order.

    >>> import torch
    >>> zeros = torch.zeros(2)
    >>> fingerprint(("a", 1), [zeros]) == fingerprint(("a", 1), [zeros.clone()]) != fingerprint(("a", 2), [zeros])
    True
    """
    digest = hashlib.sha256(repr(words).encode())
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
