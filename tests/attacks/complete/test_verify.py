"""Settling examples: every verdict holds, "unknown" is never "unsafe", and nothing depends on the company."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from robustboard.attacks.complete import verify
from robustboard.attacks.complete.verify import settle
from robustboard.attacks.keyed import content_hash
from robustboard.attacks.pgd import ascend, pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError

LINF = ThreatModel.parse("linf", "1/10")


def answers(found):
    return list(zip(found.methods, found.broken.tolist(), found.nodes, found.bounds.margins.tolist(), strict=True))


@pytest.fixture(scope="module")
def robust_toy(toy):
    """The toy network after a little adversarial training: some examples are robust, some not, many take a search."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = copy.deepcopy(toy.model)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(40):
            attacked = ascend(
                model,
                toy.images,
                toy.labels,
                threat=ThreatModel.parse("linf", "1/20"),
                start=toy.images,
                steps=3,
                step_size=0.03,
                loss="ce",
            )
            optimizer.zero_grad()
            functional.cross_entropy(model(attacked), toy.labels).backward()
            optimizer.step()
    return replace(toy, model=model.eval())


@pytest.fixture(scope="module")
def settled(robust_toy):
    part = robust_toy.part(24)
    return part, settle(part.model, part.images, part.labels, threat=LINF, classes=10, nodes=20_000)


def test_every_digit_is_settled(settled):
    part, found = settled
    proved = torch.tensor([method is not None for method in found.methods])
    assert (proved ^ found.broken).all()
    assert 4 <= int(proved.sum()) <= len(part.labels) - 4
    assert found.notes == []
    assert torch.equal(proved, found.bounds.certified)


def test_counter_examples_hold(settled):
    part, found = settled
    assert LINF.contains(found.adversarial, part.images).all()
    assert part.still_correct(found.adversarial) == (~found.broken).tolist()
    assert torch.equal(found.adversarial[~found.broken], part.images[~found.broken])


def test_certified_margins_are_below_all_that_an_attack_finds(settled):
    part, found = settled
    attacked = pgd(
        part.model, part.images, part.labels, threat=LINF, keys=part.keys, seed=0, steps=20, restarts=2, step_size=0.02
    )
    with torch.no_grad():
        logits = part.model(attacked)
    margins = logits.gather(1, part.labels[:, None]) - logits
    proved = found.bounds.certified
    assert (found.bounds.margins[proved] > 0).all()
    others = margins[proved].scatter(1, part.labels[proved][:, None], torch.inf)
    assert (found.bounds.margins[proved].amin(dim=1) <= others.amin(dim=1) + 1e-5).all()


def test_an_answer_does_not_depend_on_the_company(settled):
    part, found = settled
    some = [17, 3, 8]
    again = settle(part.model, part.images[some], part.labels[some], threat=LINF, classes=10, nodes=20_000)
    assert answers(again) == [answers(found)[row] for row in some]
    assert torch.equal(again.adversarial, found.adversarial[some])


def test_a_larger_ball_is_never_safer(robust_toy):
    part = robust_toy.part(12)
    proved = [
        settle(
            part.model, part.images, part.labels, threat=ThreatModel.parse("linf", eps), classes=10, nodes=20_000
        ).bounds.certified
        for eps in ("1/50", "1/20", "1/10")
    ]
    for smaller, larger in itertools.pairwise(proved):
        assert not (larger & ~smaller).any()


def test_both_methods_agree(settled, monkeypatch):
    """With almost no branching before it, the mixed-integer program decides, and it decides the same."""
    part, found = settled
    open_ = [row for row, nodes in enumerate(found.nodes) if 9 < nodes < 100][:4]
    assert len(open_) >= 2, "some examples must need a search"
    monkeypatch.setattr(verify, "_program_cost", lambda neurons, pixels: 9)
    again = settle(part.model, part.images[open_], part.labels[open_], threat=LINF, classes=10, nodes=20_000)
    assert "complete-mip" in again.methods
    assert again.bounds.certified.tolist() == [bool(found.bounds.certified[row]) for row in open_]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_no_attack_breaks_what_is_proved(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        ).eval()
        images = torch.rand(4, 1, 4, 4)
    labels = model(images).argmax(dim=1)
    threat = ThreatModel.parse("linf", "3/20")
    found = settle(model, images, labels, threat=threat, classes=3, nodes=2000)
    keys = [content_hash(image.numpy()) for image in images]
    attacked = pgd(model, images, labels, threat=threat, keys=keys, seed=0, steps=20, restarts=2, step_size=0.03)
    broken = model(attacked).argmax(dim=1) != labels
    assert not (found.bounds.certified & broken).any()
    assert not (found.bounds.certified & found.broken).any()


def test_a_budget_leaves_examples_open_and_says_so(settled):
    part, found = settled
    hard = max(range(len(found.nodes)), key=lambda row: found.nodes[row])
    budget = 11
    assert found.nodes[hard] > budget, "some example must need more than the small budget"
    again = settle(
        part.model, part.images[hard : hard + 1], part.labels[hard : hard + 1], threat=LINF, classes=10, nodes=budget
    )
    assert again.nodes[0] <= budget
    assert again.methods == [None]
    assert not again.broken.any()
    assert again.notes == ["Complete verification left examples open because their nodes were used up."]


def test_misclassified_examples_are_not_asked_about(toy):
    part = toy.part(3)
    found = settle(part.model, part.images, (part.labels + 1) % 10, threat=LINF, classes=10, nodes=100)
    assert found.nodes == [0, 0, 0]
    assert found.methods == [None, None, None]
    assert not found.broken.any()


def _unknown(found):
    return found.methods == [None, None] and not found.broken.any() and not found.bounds.certified.any()


def test_what_cannot_be_verified_is_unknown(toy):
    part = toy.part(2)
    unsupported = nn.Sequential(part.model, nn.Softmax(dim=1)).eval()
    found = settle(unsupported, part.images, part.labels, threat=LINF, classes=10, nodes=100)
    assert _unknown(found)
    assert "Softmax" in found.bounds.reason

    l2 = ThreatModel.parse("l2", "1/2")
    found = settle(part.model, part.images, part.labels, threat=l2, classes=10, nodes=100)
    assert _unknown(found)
    assert "L-inf" in found.bounds.reason


def test_memory_that_is_not_there_is_a_note(toy, monkeypatch):
    part = toy.part(2)
    found = settle(part.model, part.images, part.labels, threat=LINF, classes=10, nodes=100, memory_bytes=10_000)
    assert _unknown(found)
    assert "unstable neurons needs over" in found.notes[0]

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(verify, "reduce_to_box", exhausted)
    found = settle(part.model, part.images, part.labels, threat=LINF, classes=10, nodes=100)
    assert _unknown(found)
    assert found.notes == ["Complete verification of an example failed: its matrices do not fit in memory here."]


class TracedOtherwise(nn.Module):
    """A tracer sees another function than inference computes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return logits if isinstance(x, torch.Tensor) else logits * 2


def test_a_reading_that_is_another_function_is_refused(toy):
    part = toy.part(2)
    found = settle(TracedOtherwise(part.model).eval(), part.images, part.labels, threat=LINF, classes=10, nodes=100)
    assert _unknown(found)
    assert "another function" in found.notes[0]


class Bump(nn.Module):
    """A tracer does not see a dip of the margin that the image and the corners of its ball do not see either."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 2)
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.bias.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, x):
        x = x.flatten(1)
        seen = self.out(x)
        if isinstance(x, torch.fx.Proxy):
            return seen
        dip = (x > 0.52) & (x < 0.58)
        return seen - dip * torch.tensor([2.0, 0.0], dtype=seen.dtype)


def test_another_function_inside_the_box_is_refused():
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    found = settle(Bump().eval(), image, label, threat=LINF, classes=2, nodes=100)
    assert found.methods == [None]
    assert "another function" in found.notes[0]


def test_points_of_the_search_are_compared_too(toy, monkeypatch):
    part = toy.part(6)
    ask = {"threat": LINF, "classes": 10, "nodes": 100}
    assert settle(part.model, part.images, part.labels, **ask).broken.any()
    logits = verify.ReluNetwork.logits
    # Right at the random points, 67 with the image and two corners, and wrong at the search's few.
    monkeypatch.setattr(
        verify.ReluNetwork, "logits", lambda self, x: logits(self, x) + (1.0 if 1 < len(x) < 67 else 0.0)
    )
    found = settle(part.model, part.images, part.labels, **ask)
    assert not found.broken.any()
    assert "another function" in found.notes[0]


@pytest.mark.parametrize("scale", [1.0, 1e9, 1e10, 1e16, 1e20, 1e-8, 1e-9, 1e-10, 1e-14])
def test_the_scale_of_a_neuron_proves_nothing(scale):
    """A margin with a dip to -0.01 at 0.55, from neurons whose inputs are of any size."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[1].weight.fill_(scale)
        model[1].bias.copy_(-scale * torch.tensor([0.53, 0.55, 0.57]))
        model[3].weight.copy_(torch.tensor([[-1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]) / scale)
        model[3].bias.copy_(torch.tensor([0.01, 0.0]))
    image = torch.full((1, 1, 1, 1), 0.5)
    assert int(model(torch.full((1, 1, 1, 1), 0.55)).argmax()) == 1
    found = settle(model, image, torch.tensor([0]), threat=LINF, classes=2, nodes=2000)
    assert found.methods == [None]
    assert found.broken.all()


def test_bounds_that_contradict_the_logits_are_not_used(toy, monkeypatch):
    part = toy.part(2)
    search = verify.branch_and_bound

    def wrong(*args, **kwargs):
        found = search(*args, **kwargs)
        found.margins += 100.0
        return found

    monkeypatch.setattr(verify, "branch_and_bound", wrong)
    threat = ThreatModel.parse("linf", "1/1000")
    found = settle(part.model, part.images, part.labels, threat=threat, classes=10, nodes=100)
    assert _unknown(found)
    assert "contradicts" in found.notes[0]


def test_a_model_in_training_mode_is_refused(toy):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    with pytest.raises(ModelError, match="training mode"):
        settle(model, toy.images[:1], toy.labels[:1], threat=LINF, classes=10, nodes=1)


def test_progress_counts_nodes(toy):
    part = toy.part(6)
    told = []
    found = settle(part.model, part.images, part.labels, threat=LINF, classes=10, nodes=200, on_nodes=told.append)
    assert sum(told) == sum(found.nodes)
