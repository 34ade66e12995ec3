from __future__ import annotations

import copy
import io
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from robustboard.attacks.counting import PassCounter


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()


@pytest.mark.parametrize("mode", [nullcontext(), torch.no_grad(), torch.inference_mode()])
def test_forwards_count_in_every_mode(model: nn.Module, mode: AbstractContextManager[None]) -> None:
    with mode, PassCounter(model) as counter:
        model(torch.zeros(5, 1, 2, 2))
        model(torch.zeros(2, 1, 2, 2))
    assert (counter.forwards, counter.backwards) == (7, 0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("by_input", [False, True])
def test_backwards_count_whoever_wants_the_gradient(model: nn.Module, frozen: bool, by_input: bool) -> None:
    """Towards the input (attacks), the parameters (training) or both; never where there is no backward pass."""
    model.requires_grad_(not frozen)
    images = torch.zeros(6, 1, 2, 2, requires_grad=by_input)
    with PassCounter(model) as counter:
        total = model(images).sum()
        if total.requires_grad:
            total.backward()
    assert counter.backwards == (6 if by_input or not frozen else 0)


def test_repeated_backward_passes_each_count(model: nn.Module) -> None:
    """One forward pass and a backward pass for each class, as a Jacobian takes."""
    images = torch.rand(3, 1, 2, 2, requires_grad=True)
    with PassCounter(model) as counter:
        logits = model(images)
        for column in range(2):
            torch.autograd.grad(logits[:, column].sum(), images, retain_graph=True)
    assert (counter.forwards, counter.backwards) == (3, 6)


def test_nothing_is_changed(model: nn.Module) -> None:
    images = torch.rand(3, 1, 2, 2, requires_grad=True)
    expected = model(images)
    (slope,) = torch.autograd.grad(expected.sum(), images)
    with PassCounter(model):
        output = model(images)
        (counted,) = torch.autograd.grad(output.sum(), images)
    assert torch.equal(output, expected)
    assert torch.equal(counted, slope)


def test_the_hooks_leave_with_the_context(model: nn.Module) -> None:
    """Afterwards the model counts nothing, and can be saved and copied like any other; an error makes no difference."""
    counter = PassCounter(model)
    with pytest.raises(RuntimeError), counter:
        model(torch.zeros(1, 1, 3, 3))
    model(torch.zeros(4, 1, 2, 2))
    assert counter.forwards == 0
    assert not model._forward_hooks
    torch.save(model, io.BytesIO())


def test_a_copy_counts_for_the_original_counter(model: nn.Module) -> None:
    """A verifier may copy the module that it is given; the copy's passes are part of the cost."""
    with PassCounter(model) as counter:
        copy.deepcopy(model)(torch.zeros(4, 1, 2, 2))
    assert counter.forwards == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:FutureWarning")
def test_traced_passes_are_not_counted(model: nn.Module) -> None:
    """Tracing records a pass instead of making one; the counter must neither count it nor appear in the trace."""
    example = torch.zeros(1, 1, 2, 2)
    with PassCounter(model) as counter:
        traced = torch.jit.trace(model, example, check_trace=False)
    assert counter.forwards == 0
    assert torch.equal(traced(example + 1), model(example + 1))


def test_the_callback_hears_every_pass(model: nn.Module) -> None:
    heard: list[int] = []
    with PassCounter(model, on_forward=heard.append):
        model(torch.zeros(5, 1, 2, 2))
        model(torch.zeros(2, 1, 2, 2))
    assert heard == [5, 2]


def test_counters_nest(model: nn.Module) -> None:
    """A stage inside a run: each counts what happens while it is open."""
    with PassCounter(model) as outer:
        model(torch.zeros(1, 1, 2, 2))
        with PassCounter(model) as inner:
            model(torch.zeros(2, 1, 2, 2))
    assert (outer.forwards, inner.forwards) == (3, 2)
