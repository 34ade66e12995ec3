"""APGD: as strong as its authors' code, cheaper, and the same for every example whoever else is attacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks import autoattack
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.kernels.apgd import _lengths, apgd, apgd_targeted
from robustboard.attacks.kernels.survivors import Survivors
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
ATTACKS = pytest.mark.parametrize("attack", [apgd, apgd_targeted], ids=["untargeted", "targeted"])


def run(attack: Any, net: Any, threat: ThreatModel, *, seed: int = 0, **changes: Any) -> Tensor:
    return attack(net.model, net.images, net.labels, threat=threat, keys=net.keys, seed=seed, **changes)


def reference(net: Any, threat: ThreatModel, stage: str, seed: int = 0) -> Tensor:
    return autoattack.run_stage(
        net.model,
        net.images,
        net.labels,
        threat=threat,
        stage=stage,
        seed=seed,
        batch_size=len(net.labels),
        classes=net.classes,
    ).adversarial


@THREATS
@ATTACKS
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_break_inside_the_ball(toy_of: Any, attack: Any, threat: ThreatModel, classes: int) -> None:
    """DLR is not defined for two classes, its targeted form not below four; the margin takes its place."""
    net = toy_of[classes]
    wide = threat.scaled(4)
    adversarial = run(attack, net, wide, steps=20)
    assert wide.contains(adversarial, net.images).all()
    assert sum(net.still_correct(adversarial)) < 0.5 * len(net.labels)


@THREATS
@pytest.mark.parametrize(("attack", "stage"), [(apgd, "apgd_ce"), (apgd_targeted, "apgd_t")], ids=["ce", "targeted"])
def test_no_more_examples_survive_than_the_authors_code_leaves(
    toy: Any, attack: Any, stage: str, threat: ThreatModel
) -> None:
    """Other draws break other examples at the edge: over three seeds the counts are within one in a hundred."""
    ours = [sum(toy.still_correct(run(attack, toy, threat, seed=seed))) for seed in range(3)]
    theirs = [sum(toy.still_correct(reference(toy, threat, stage, seed))) for seed in range(3)]
    count = len(toy.labels)
    assert 0.1 < theirs[0] / count < 0.9, "the toy must leave something to decide"
    assert sum(ours) <= sum(theirs) + 3 * count / 100


@THREATS
@ATTACKS
def test_verdicts_do_not_move_with_batch_or_order(toy: Any, attack: Any, threat: ThreatModel) -> None:
    part = toy.part(90)
    verdicts = part.still_correct(run(attack, part, threat, steps=15))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    found = torch.empty_like(part.images)
    for rows in order.split(16):
        keys = [part.keys[row] for row in rows.tolist()]
        found[rows] = attack(
            part.model, part.images[rows], part.labels[rows], threat=threat, keys=keys, seed=0, steps=15
        )
    assert part.still_correct(found) == verdicts


@ATTACKS
def test_broken_examples_cost_nothing_any_more(toy: Any, attack: Any) -> None:
    """Where nearly everything breaks, a fraction of the passes is enough."""
    wide = LINF.scaled(4)
    with PassCounter(toy.model) as ours:
        run(attack, toy, wide)
    stage = "apgd_ce" if attack is apgd else "apgd_t"
    with PassCounter(toy.model) as theirs:
        reference(toy, wide, stage)
    assert 10 * ours.forwards < theirs.forwards


def test_classes_out_of_reach_are_not_tried(toy: Any) -> None:
    """A certificate for a class saves its target; for all of them, everything but the clean pass."""
    part = toy.part(40)
    weak = ThreatModel.parse("linf", "1/1000")
    one = torch.zeros(40, 10, dtype=torch.bool)
    one.scatter_(1, part.model(part.images).topk(2, dim=1).indices[:, 1:], value=True)
    with PassCounter(part.model) as counter:
        run(apgd_targeted, part, weak, targets=one, steps=10)
    assert counter.forwards == 40 + 40 * 11
    with PassCounter(part.model) as counter:
        run(apgd_targeted, part, weak, targets=torch.zeros_like(one), steps=10)
    assert counter.forwards == 40


def test_the_schedule_is_the_papers() -> None:
    """Checkpoints after 22, 41, 57, 70, 80, 87, 93 and 99 of a hundred steps."""
    lengths = list(_lengths(100))
    places, place = [], 0
    while place < 100:
        place += lengths[place]
        places.append(place)
    assert places == [22, 41, 57, 70, 80, 87, 93, 99, 105]
    assert [len(list(_lengths(steps))) for steps in (1, 7, 50)] == [1, 7, 50]


@pytest.mark.parametrize("what", ["nan", "training", "no gradient"])
def test_unusable_models_are_refused_with_a_sentence(toy: Any, what: str) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = toy.model(images)
            return logits * float("nan") if what == "nan" else logits.detach() if what == "no gradient" else logits

    model = Broken().train(what == "training")
    sentence = {"nan": "not finite", "training": "training mode", "no gradient": "no gradient"}[what]
    with pytest.raises(ModelError, match=sentence):
        apgd(model, toy.images[:5], toy.labels[:5], threat=LINF, keys=toy.keys[:5], seed=0)


def test_of_two_images_that_break_an_example_the_first_is_kept(toy: Any) -> None:
    part = toy.part(2)
    survivors = Survivors(part.model, part.images, part.labels)
    wrong = torch.nn.functional.one_hot(part.labels.roll(1), 10).float()
    assert part.labels[0] != part.labels[1]
    rows = torch.arange(2)
    assert survivors.note(rows, part.images + 1, wrong).tolist() == [False, False]
    survivors.note(rows, part.images + 2, wrong)
    assert torch.equal(survivors.adversarial, part.images + 1)
    assert survivors.left().tolist() == []
