"""The fast attack: nearly as strong as the four attacks of the standard cascade, for a fraction of their passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.kernels import ensembles
from robustboard.attacks.kernels.fast import FORWARDS, _Nearest, fast
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


class Scaled(nn.Module):
    """A network with its logits times a number."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images) * self.factor
        return logits


def run(net: Any, threat: ThreatModel, *, seed: int = 0, model: nn.Module | None = None) -> Tensor:
    return fast(model or net.model, net.images, net.labels, threat=threat, keys=net.keys, seed=seed)


def left_by_the_standard_attacks(net: Any, threat: ThreatModel) -> list[bool]:
    """Whether each example survives every stage of the cascade."""
    held = torch.ones(len(net.labels), dtype=torch.bool)
    for stage in ensembles.STAGES["standard"]:
        rows = held.nonzero().flatten()
        found = net.images.clone()
        found[rows] = ensembles.run(
            stage,
            net.model,
            net.images[rows],
            net.labels[rows],
            threat=threat,
            keys=[net.keys[row] for row in rows.tolist()],
            seed=0,
        )
        held &= torch.tensor(net.still_correct(found))
    return held.tolist()


@THREATS
def test_it_leaves_hardly_more_than_the_standard_attacks_at_a_tenth_of_their_passes(
    toy: Any, threat: ThreatModel
) -> None:
    part = toy.part(60)
    with PassCounter(part.model) as theirs:
        standard_left = left_by_the_standard_attacks(part, threat)
    with PassCounter(part.model) as ours:
        left = part.still_correct(run(part, threat))
    assert 0.1 < sum(standard_left) / 60 < 0.9, "the toy must leave something to decide"
    assert sum(left) <= sum(standard_left) + 1
    assert 10 * ours.forwards < theirs.forwards
    assert ours.backwards < ours.forwards


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_break_inside_the_ball(toy_of: Any, threat: ThreatModel, classes: int) -> None:
    net = toy_of[classes]
    wide = threat.scaled(4)
    adversarial = run(net, wide)
    assert wide.contains(adversarial, net.images).all()
    assert sum(net.still_correct(adversarial)) < 0.5 * len(net.labels)


@THREATS
def test_what_is_not_broken_is_the_clean_image(toy: Any, threat: ThreatModel) -> None:
    part = toy.part(60)
    adversarial = run(part, threat)
    changed = (adversarial != part.images).flatten(1).any(dim=1)
    assert changed.any()
    assert (~changed).tolist() == part.still_correct(adversarial)


@THREATS
def test_verdicts_do_not_move_with_batch_or_order(toy: Any, threat: ThreatModel) -> None:
    """What an example learns comes from its own runs, and so does the rule that abandons it."""
    part = toy.part(90)
    verdicts = part.still_correct(run(part, threat))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    found = torch.empty_like(part.images)
    for rows in order.split(16):
        keys = [part.keys[row] for row in rows.tolist()]
        found[rows] = fast(part.model, part.images[rows], part.labels[rows], threat=threat, keys=keys, seed=0)
    assert part.still_correct(found) == verdicts


def test_large_logits_hide_nothing(toy: Any) -> None:
    """Probabilities of exactly 0 and 1 have no gradient; the scale of the logits does not reach the loss."""
    part = toy.part(90)
    plain = part.still_correct(run(part, LINF))
    assert part.still_correct(run(part, LINF, model=Scaled(part.model, 1024.0).eval())) == plain


def test_who_stays_far_is_abandoned_and_nobody_costs_more_than_is_said(toy: Any) -> None:
    part = toy.part(40)
    with PassCounter(part.model) as counter:
        run(part, ThreatModel.parse("linf", "1/1000"))
    assert counter.forwards == 40 * (1 + 2 * 3 * 21), "the two first rounds, and no later one"
    one = toy.part(1)
    for eps in ("1/20", "1/15", "1/12", "1/10"):
        with PassCounter(one.model) as counter:
            run(one, ThreatModel.parse("linf", eps))
        assert counter.forwards <= FORWARDS


def test_every_pass_teaches_which_class_is_nearest_and_where(toy: Any) -> None:
    part = toy.part(2)
    survivors = _Nearest(part.model, part.images, torch.tensor([0, 1]))
    survivors.broken[:] = False
    survivors.gaps[:] = survivors.margins[:] = -9.0
    rows = torch.tensor([1])
    logits = torch.zeros(1, 10)
    logits[0, 1], logits[0, 7], logits[0, 4] = 5.0, 3.0, 2.0
    survivors.note(rows, part.images[1:] * 0.5, logits)
    logits[0, 7], logits[0, 4] = 1.0, 4.5
    survivors.note(rows, part.images[1:] * 0.25, logits)
    logits[0, 4] = 0.0
    survivors.note(rows, part.images[1:] * 0.125, logits)
    assert survivors.margins.tolist() == [-9.0, -0.5]
    assert torch.equal(survivors.nearest[1], part.images[1] * 0.25)
    goals = [goal.tolist() for _, _, goal in survivors.round(2, torch.tensor([False, True]))]
    assert goals == [[[1, 4, 1]], [[1, 7, 1]]]


@pytest.mark.parametrize("what", ["nan", "training", "no gradient"])
def test_unusable_models_are_refused_with_a_sentence(toy: Any, what: str) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = toy.model(images)
            return logits * float("nan") if what == "nan" else logits.detach() if what == "no gradient" else logits

    model = Broken().train(what == "training")
    sentence = {"nan": "not finite", "training": "training mode", "no gradient": "no gradient"}[what]
    with pytest.raises(ModelError, match=sentence):
        fast(model, toy.images[:5], toy.labels[:5], threat=LINF, keys=toy.keys[:5], seed=0)


def test_nobody_to_attack_is_no_work(toy: Any) -> None:
    assert run(toy.part(0), LINF).shape == toy.images[:0].shape
