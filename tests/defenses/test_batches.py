"""Stratified mini-batches hold every class in its proportion."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from robustboard.defenses.adapter import Split
from robustboard.defenses.batches import epoch_batches, spread


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 40), st.integers(0, 3))
def test_stratified_batches_hold_every_class_in_its_proportion(labels: list[int], size: int, epoch: int) -> None:
    truth = torch.tensor(labels)
    split = Split(torch.arange(len(truth)).view(-1, 1, 1, 1).float(), truth)
    batches = list(
        epoch_batches(
            split,
            size=size,
            augment=False,
            epoch=epoch,
            epochs=4,
            seed=0,
            device=torch.device("cpu"),
            stratified=True,
        )
    )
    assert sorted(place for batch in batches for place in batch.images.flatten().tolist()) == list(range(len(truth)))
    for batch in batches:
        assert torch.equal(truth[batch.images.flatten().long()], batch.labels)
        for label in range(4):
            expected = len(batch.labels) * float((truth == label).float().mean())
            assert abs(int((batch.labels == label).sum()) - expected) <= 2


def test_a_rare_class_is_not_left_to_chance() -> None:
    """Ten of a thousand images reach each of ten mini-batches once; a plain order leaves some without any."""
    labels = torch.zeros(1000, dtype=torch.long)
    labels[:10] = 1
    split = Split(torch.zeros(1000, 1, 1, 1), labels)

    def rare(*, stratified: bool) -> list[int]:
        device = torch.device("cpu")
        batches = epoch_batches(
            split, size=100, augment=False, epoch=0, epochs=1, seed=0, device=device, stratified=stratified
        )
        return [int(batch.labels.sum()) for batch in batches]

    assert rare(stratified=True) == [1] * 10
    assert min(rare(stratified=False)) == 0


def test_the_order_within_a_class_is_the_given_one() -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    found = spread(order, labels)
    for label in range(3):
        assert found[labels[found] == label].tolist() == order[labels[order] == label].tolist()
