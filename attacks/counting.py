"""The cost of an attack in passes: how many examples went forward and backward through a model.

Time depends on the machine and its weather; passes do not, so they are what a record states.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

_COUNTING: WeakSet[Callable[..., None]] = WeakSet()


def only_counts(hook: object) -> bool:
    """Whether a forward hook is a `PassCounter`'s, which changes nothing.

    >>> only_counts(print)
    False
    """
    return any(hook is known for known in _COUNTING)


class PassCounter:
    """Counts the examples that pass through a module while the context is open.

    Forward passes count in every gradient mode. A backward pass counts when a gradient reaches the module's output,
    whether it goes on to the parameters, to the input or to both. Outputs and gradients are not changed. Passes seen by
    a tracer are not real ones and do not count.

    Args:
        model: any module whose output is one tensor, a row an example.
        on_forward: called after every forward pass with its number of examples, as a sign of life.

    Attributes:
        forwards: examples passed forward so far.
        backwards: examples passed backward so far.

    >>> layer = nn.Linear(2, 3)
    >>> with PassCounter(layer) as counter:
    ...     _ = layer(torch.zeros(5, 2))
    ...     layer(torch.zeros(4, 2)).sum().backward()
    >>> counter.forwards, counter.backwards
    (9, 4)
    """

    def __init__(self, model: nn.Module, *, on_forward: Callable[[int], None] | None = None) -> None:
        self.forwards = 0
        self.backwards = 0
        self._model = model
        self._on_forward = on_forward
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> PassCounter:
        # Closures, not bound methods: a deep copy of the model would copy a bound method's counter with it, and the
        # reference engine flags a model during whose forward pass a function named "backward" or "grad" is called.
        def count_output(model: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            del model, inputs
            if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                return
            examples = len(output)
            self.forwards += examples
            if output.requires_grad:
                output.register_hook(count_gradient)  # type: ignore[no-untyped-call]
            if self._on_forward is not None:
                self._on_forward(examples)

        def count_gradient(gradient: Tensor) -> None:
            self.backwards += len(gradient)

        _COUNTING.add(count_output)
        self._handle = self._model.register_forward_hook(count_output)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
