from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.kernels import fab
from robustboard.attacks.kernels.fab import fab_targeted
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def attack(net: Any, threat: ThreatModel, **changes: Any) -> Tensor:
    return fab_targeted(net.model, net.images, net.labels, threat=threat, **changes)


def theirs(net: Any, threat: ThreatModel) -> tuple[Tensor, PassCounter]:
    """The stage `fab-t` of AutoAttack's standard version, and what it cost."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    engine = FABAttack_PT(
        net.model, norm=norm, eps=threat.radius, n_target_classes=min(9, net.classes - 1), targeted=True
    )
    with torch.random.fork_rng(), PassCounter(net.model) as counter:
        adversarial = engine.perturb(net.images, net.labels)
    net.model.zero_grad(set_to_none=True)
    return adversarial, counter


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_it_breaks_what_the_reference_breaks(toy: Any, toy_of: Any, threat: ThreatModel, classes: int) -> None:
    """Example by example and with no allowance: neither attack draws, and rounding has moved no verdict here.

    It is also held to no more than a few further breaks, those of the points that it projects onto the ball.
    """
    net = toy.part(150) if classes == 10 else toy_of[classes].part(60)
    adversarial, expected = attack(net, threat), theirs(net, threat)[0]
    assert threat.contains(adversarial, net.images).all()
    ours, reference = net.still_correct(adversarial), net.still_correct(expected)
    assert all(before or not after for before, after in zip(reference, ours, strict=True))
    assert sum(reference) - 0.02 * len(ours) <= sum(ours) < len(ours)


@THREATS
def test_it_takes_fewer_passes_than_the_reference(toy: Any, threat: ThreatModel) -> None:
    """The more it breaks the more it saves, since what is broken leaves at once."""
    net = toy.part(30)
    for ball, share in ((threat, 0.9), (threat.scaled(2), 0.25)):
        reference = theirs(net, ball)[1]
        with PassCounter(net.model) as counter:
            attack(net, ball)
        assert counter.forwards < share * reference.forwards
        assert counter.backwards < share * reference.backwards


@THREATS
def test_carrying_a_pass_on_changes_no_verdict(toy: Any, threat: ThreatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    for share in (-1.0, 1.0):
        monkeypatch.setattr(fab, "_MOST_STEPPED_BACK", share)
        verdicts.append(toy.still_correct(attack(toy, threat, most=2)))
    assert verdicts[0] == verdicts[1]
    assert 0.1 < sum(verdicts[0]) / len(verdicts[0]) < 0.9, "the toy must leave something to decide"


@THREATS
def test_verdicts_do_not_move_with_batch_or_order(toy: Any, threat: ThreatModel) -> None:
    """Whatever the split and order of the examples, each one's verdict is the same."""
    verdicts = toy.still_correct(attack(toy, threat, most=2))
    order = torch.randperm(len(toy.labels), generator=torch.Generator().manual_seed(5))
    found = torch.empty_like(toy.images)
    for part in order.split(67):
        found[part] = fab_targeted(toy.model, toy.images[part], toy.labels[part], threat=threat, most=2)
    assert toy.still_correct(found) == verdicts


@THREATS
def test_certified_classes_are_not_tried(toy: Any, threat: ThreatModel) -> None:
    """With every class ruled out nothing runs; with one left it is that of the run towards it alone."""
    nothing = torch.zeros(len(toy.labels), 10, dtype=torch.bool)
    with PassCounter(toy.model) as counter:
        assert torch.equal(attack(toy, threat, targets=nothing), toy.images)
    assert (counter.forwards, counter.backwards) == (len(toy.labels), 0)
    with torch.no_grad():
        likeliest = toy.model(toy.images).scatter(1, toy.labels[:, None], -torch.inf).argmax(dim=1, keepdim=True)
    only = nothing.scatter(1, likeliest, True)
    assert torch.equal(attack(toy, threat, targets=only), attack(toy, threat, most=1))


def test_misclassified_images_are_returned_as_they_are(toy: Any) -> None:
    wrong = (toy.labels + 1) % 10
    with PassCounter(toy.model) as counter:
        assert torch.equal(fab_targeted(toy.model, toy.images, wrong, threat=LINF), toy.images)
    assert counter.forwards == len(wrong)


def test_it_leaves_model_and_global_randomness_alone(toy: Any) -> None:
    before = torch.random.get_rng_state()
    images, adversarial = toy.images.clone(), attack(toy, LINF, most=1, steps=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(toy.images, images)
    assert not adversarial.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.model.parameters())


def test_no_images_give_no_images(toy: Any) -> None:
    assert attack(toy.part(0), LINF).shape == (0, 1, 8, 8)


class Made(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self._answer(images.flatten(1)[:, :10])


def test_a_pass_that_finds_nothing_is_carried_on() -> None:
    """Where no point is misclassified the pass that looks is also the one that linearises: 1 forward a step, not 2."""
    images, steps = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 20
    # The pixels never make up for 2, wherever in the box they are.
    model = Made(lambda pixels: pixels + 2 * functional.one_hot(torch.zeros(len(pixels), dtype=torch.long), 10)).eval()
    with PassCounter(model) as counter:
        adversarial = fab_targeted(
            model, images, torch.zeros(4, dtype=torch.long), threat=LINF.scaled(10), most=1, steps=steps
        )
    assert torch.equal(adversarial, images)
    # The clean pass, the first linearisation, and a look a step, of which the last one needs no gradient.
    assert (counter.forwards, counter.backwards) == (4 * (steps + 2), 4 * steps)


@THREATS
def test_vanishing_gradients_are_no_division_by_zero(threat: ThreatModel) -> None:
    """A constant network, whose gradients are all zero, holds: no point of it ever becomes NaN."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    fixed = functional.one_hot(torch.arange(4), 10).float()
    seen: list[Tensor] = []

    def answer(pixels: Tensor) -> Tensor:
        seen.append(pixels.detach())
        return fixed[: len(pixels)] + 0 * pixels

    adversarial = fab_targeted(Made(answer).eval(), images, torch.arange(4), threat=threat, most=2, steps=3)
    assert torch.equal(adversarial, images)
    assert all(torch.allclose(pixels, seen[0]) for pixels in seen)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda pixels: pixels * torch.nan, "logits are not finite numbers .nan seen, for 4 of 4"),
        (lambda pixels: pixels + torch.inf, "logits are not finite numbers .inf seen"),
        (lambda pixels: pixels[:, :3], "3 classes, but label"),
        (lambda pixels: pixels[:, 0], "shape .4, K."),
        (lambda pixels: pixels[:, :1], "K of at least 2"),
        (lambda pixels: functional.one_hot(torch.arange(4) + 3, 10).float() + 0 * pixels.detach(), "no gradient"),
        (
            lambda pixels: functional.one_hot(torch.arange(4) + 3, 10) + 0 * (pixels - pixels).abs().sqrt(),
            "input gradients are not finite",
        ),
        (
            lambda pixels: functional.one_hot(torch.arange(4) + 3, 10) + 0 * pixels / (not pixels.requires_grad),
            "logits are not finite",
        ),
    ],
)
def test_a_broken_model_is_refused_with_a_sentence(answer: Callable[[Tensor], Tensor], says: str) -> None:
    """NaN logits never change their arg-max: an attack that went on would call them robust."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=says):
        fab_targeted(Made(answer).eval(), images, torch.arange(4) + 3, threat=LINF, steps=2)


def test_a_model_in_training_mode_is_refused(toy: Any) -> None:
    toy.model.train()
    try:
        with pytest.raises(ModelError, match=r"model\.eval"):
            attack(toy, LINF)
    finally:
        toy.model.eval()


@pytest.mark.parametrize("changes", [{"steps": 0}, {"most": 0}])
def test_a_bad_setting_is_refused_with_a_sentence(toy: Any, changes: dict[str, int]) -> None:
    with pytest.raises(TrackError, match="at least one step"):
        attack(toy, LINF, **changes)
