from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robustboard.attacks.losses import LOSSES, applicable_losses, cross_entropy, dlr, margin_loss

LOGITS = hnp.arrays("float32", (4, 5), elements=st.floats(-50, 50, width=32)).map(torch.from_numpy)
LABELS = st.lists(st.integers(0, 4), min_size=4, max_size=4).map(torch.tensor)


@settings(deadline=None)
@given(logits=LOGITS, labels=LABELS)
def test_margin_is_positive_exactly_where_another_class_is_ahead(logits: torch.Tensor, labels: torch.Tensor) -> None:
    for row, label, margin in zip(logits.tolist(), labels.tolist(), margin_loss(logits, labels).tolist(), strict=True):
        others = max(value for i, value in enumerate(row) if i != label)
        assert (margin > 0) == (others > row[label])


@settings(deadline=None)
@given(logits=LOGITS, labels=LABELS)
def test_all_losses_agree_on_the_direction(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Raising the true logit never raises a loss: all of them point away from the label."""
    raised = logits.scatter_add(1, labels.unsqueeze(1), torch.full((4, 1), 0.5))
    for name, loss in LOSSES.items():
        assert bool((loss(raised, labels) <= loss(logits, labels) + 1e-4).all()), name


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_are_per_example(name: str) -> None:
    """Shape (N,), and a row's loss does not depend on the other rows."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    together = LOSSES[name](logits, labels)
    alone = torch.cat([LOSSES[name](logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
    assert together.shape == (6,)
    assert torch.allclose(together, alone)


def test_dlr_is_the_published_formula() -> None:
    """-(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), equation 6 of Croce & Hein 2020, by hand."""
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [1.0, 4.0, 2.0, 0.0]])
    labels = torch.tensor([0, 2])
    assert dlr(logits, labels).tolist() == pytest.approx([-(5 - 3) / (5 - 1), -(2 - 4) / (4 - 1)])


def test_dlr_is_blind_to_shift_and_scale_where_cross_entropy_saturates() -> None:
    """The reason the loss exists: a network with logits in the hundreds has no cross-entropy gradient left."""
    logits = torch.tensor([[300.0, 100.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0])
    (saturated,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
    (alive,) = torch.autograd.grad(dlr(logits, labels).sum(), logits)
    assert float(saturated.abs().max()) == 0.0
    assert float(alive.abs().max()) > 0.0
    assert dlr(logits / 100 + 7, labels).item() == pytest.approx(dlr(logits, labels).item(), rel=1e-4)


def test_ties_and_equal_logits_stay_finite() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([0, 2])
    for loss in LOSSES.values():
        values = loss(logits, labels)
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert bool(values.isfinite().all())
        assert bool(gradient.isfinite().all())
    assert margin_loss(logits, labels).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("classes", "names"), [(2, ("ce", "margin")), (3, ("ce", "margin", "dlr")), (10, ("ce", "margin", "dlr"))]
)
def test_two_classes_have_no_third_logit(classes: int, names: tuple[str, ...]) -> None:
    assert applicable_losses(classes) == names
    labels = torch.tensor([0])
    for name in names:
        assert math.isfinite(LOSSES[name](torch.randn(1, classes), labels).item())


def test_the_table_of_losses_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        LOSSES["mine"] = dlr  # type: ignore[index]
