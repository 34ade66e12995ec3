"""Seeding torch's global generators for a while, one thread at a time.

Initial weights, dropout and the reference engine's attacks can draw from nothing else. The generators belong to the
whole process: a thread that seeds or draws while another does gives both of them other numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_ONE_THREAD = threading.RLock()


@contextmanager
def one_thread_at_a_time() -> Iterator[None]:
    """What torch keeps for the whole process is this thread's inside the block, which may be nested."""
    with _ONE_THREAD:
        yield


@contextmanager
def preserved(devices: Sequence[torch.device | int] = ()) -> Iterator[None]:
    """Inside the block only this thread draws; afterwards the generators are what they were.

    Args:
        devices: the GPUs whose generators are kept too.

    >>> before = torch.get_rng_state()
    >>> with preserved():
    ...     _ = torch.manual_seed(5)
    >>> torch.equal(before, torch.get_rng_state())
    True
    """
    with one_thread_at_a_time(), torch.random.fork_rng(devices=list(devices)):
        yield
