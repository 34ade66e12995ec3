from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks import keyed
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.losses import margin_loss
from robustboard.attacks.pgd import ascend, pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")
THREATS = pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])


def attack(net: Any, threat: ThreatModel, **changes: Any) -> Tensor:
    options = {"seed": 0, "steps": 10, "restarts": 1, "step_size": 0.25 * threat.radius} | changes
    return pgd(net.model, net.images, net.labels, threat=threat, keys=net.keys, **options)


@THREATS
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_it_breaks_and_stays_inside(toy: Any, toy_of: Any, threat: ThreatModel, classes: int) -> None:
    """Both norms and few classes: an undefended network falls, and nothing leaves the ball."""
    net = toy if classes == 10 else toy_of[classes]
    wide = threat.scaled(3)
    adversarial = attack(net, wide)
    assert wide.contains(adversarial, net.images).all()
    assert sum(net.still_correct(adversarial)) < 0.6 * len(net.labels)


@THREATS
def test_verdicts_do_not_move_with_batch_or_order(toy: Any, threat: ThreatModel) -> None:
    """Whatever the split and order of the examples, each one's verdict is the same."""
    verdicts = toy.still_correct(attack(toy, threat, restarts=2))
    order = torch.randperm(len(toy.labels), generator=torch.Generator().manual_seed(5))
    found = torch.empty_like(toy.images)
    for part in order.split(37):
        found[part] = pgd(
            toy.model,
            toy.images[part],
            toy.labels[part],
            threat=threat,
            keys=[toy.keys[i] for i in part.tolist()],
            seed=0,
            steps=10,
            restarts=2,
            step_size=0.25 * threat.radius,
        )
    assert 0.1 < sum(verdicts) / len(verdicts) < 0.9, "the toy must leave something to decide"
    assert toy.still_correct(found) == verdicts


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        ({"losses": ("ce",)}, {"losses": ("ce", "margin", "dlr")}),
        ({"losses": ("ce",), "restarts": 1}, {"losses": ("ce",), "restarts": 6}),
    ],
)
def test_more_runs_only_break_more(toy: Any, weak: dict[str, Any], strong: dict[str, Any]) -> None:
    """The worst case over a larger set, example by example: nothing broken before is whole after."""
    fewer = toy.still_correct(attack(toy, LINF, steps=3, **weak))
    more = toy.still_correct(attack(toy, LINF, steps=3, **strong))
    assert all(before or not after for before, after in zip(fewer, more, strict=True))
    assert sum(more) < sum(fewer), "the further runs must be runs of their own"


def test_robust_accuracy_falls_as_eps_grows(toy: Any) -> None:
    threats = [ThreatModel.parse("linf", eps) for eps in ("1/50", "1/20", "1/10", "1/5")]
    shares = [sum(toy.still_correct(attack(toy, threat))) for threat in threats]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


def test_unbroken_examples_carry_their_largest_margin(toy: Any) -> None:
    """What is returned for a survivor is the best point seen, so never one worse than its own clean image."""
    adversarial = attack(toy, ThreatModel.parse("linf", "1/50"))
    with torch.no_grad():
        clean, found = (margin_loss(toy.model(images), toy.labels) for images in (toy.images, adversarial))
    assert bool((found >= clean).all())
    assert bool((found > clean).float().mean() > 0.99)


def test_broken_examples_stop_costing_passes(toy: Any) -> None:
    """An example leaves the search when it is broken; a network that falls at once costs almost nothing."""
    with PassCounter(toy.model) as easy:
        attack(toy, ThreatModel.parse("linf", "1/2"), restarts=3)
    with PassCounter(toy.model) as hard:
        attack(toy, ThreatModel.parse("linf", "1/1000"), restarts=3)
    survivors = sum(toy.still_correct(attack(toy, ThreatModel.parse("linf", "1/1000"))))
    # One clean pass, then for a survivor 3 losses x 3 restarts of 10 steps and a last look.
    assert hard.forwards >= len(toy.labels) + survivors * 9 * 11
    assert easy.forwards < 0.1 * hard.forwards


def test_misclassified_images_are_returned_as_they_are(toy: Any) -> None:
    wrong = (toy.labels + 1) % 10
    adversarial = pgd(
        toy.model, toy.images, wrong, threat=LINF, keys=toy.keys, seed=0, steps=1, restarts=1, step_size=0.1
    )
    assert torch.equal(adversarial, toy.images)


def test_the_seed_moves_the_starts(toy: Any) -> None:
    tight = ThreatModel.parse("linf", "1/50")
    first, again, other = (attack(toy, tight, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_saturated_cross_entropy_is_seen_through(toy: Any) -> None:
    """Logits of tens of thousands stop cross-entropy; margin and DLR still find what they find on the plain network."""

    class Loud(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return toy.model(images) * 1e4

    def survivors(model: nn.Module, losses: tuple[str, ...]) -> int:
        adversarial = pgd(
            model.eval(),
            toy.images,
            toy.labels,
            threat=LINF,
            keys=toy.keys,
            seed=0,
            steps=10,
            restarts=1,
            step_size=0.025,
            losses=losses,
        )
        return sum(toy.still_correct(adversarial))

    assert survivors(Loud(), ("ce",)) > 1.5 * survivors(toy.model, ("ce",))
    assert survivors(Loud(), ("ce", "margin", "dlr")) <= survivors(toy.model, ("margin", "dlr")) + 3


def test_it_leaves_model_and_global_randomness_alone(toy: Any) -> None:
    before = torch.random.get_rng_state()
    images, attacked = toy.images.clone(), attack(toy, LINF)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(toy.images, images)
    assert not attacked.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy.model.parameters())


def test_no_images_give_no_images(toy: Any) -> None:
    assert attack(toy.part(0), LINF).shape == (0, 1, 8, 8)


class Broken(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return self._answer(images.flatten(1)[:, :10])


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
    ],
)
def test_a_broken_model_is_refused_with_a_sentence(answer: Callable[[Tensor], Tensor], says: str) -> None:
    """NaN logits never change their arg-max: an attack that went on would call them robust."""
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ModelError, match=says):
        pgd(
            Broken(answer).eval(),
            images,
            torch.arange(4) + 3,
            threat=LINF,
            keys=list("abcd"),
            seed=0,
            steps=2,
            restarts=1,
            step_size=0.01,
        )


def test_a_model_in_training_mode_is_refused(toy: Any) -> None:
    toy.model.train()
    try:
        with pytest.raises(ModelError, match=r"model\.eval"):
            attack(toy, LINF)
    finally:
        toy.model.eval()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "at least one step"),
        ({"restarts": 0}, "at least one step"),
        ({"losses": ("hinge",)}, "hinge"),
        ({"losses": ()}, "none"),
    ],
)
def test_a_bad_setting_is_refused_with_a_sentence(toy: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TrackError, match=says):
        attack(toy, LINF, **changes)


def test_two_classes_without_an_applicable_loss_are_refused(toy_of: Any) -> None:
    with pytest.raises(TrackError, match="2 classes"):
        attack(toy_of[2], LINF, losses=("dlr",))


@THREATS
def test_ascend_is_madrys_loop(toy: Any, threat: ThreatModel) -> None:
    """Step for step the same points as the loop written out by hand."""
    net = toy.part(20)
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    start = threat.start(net.images, draw(net.keys, (1, 8, 8), 0))
    points = start
    for _ in range(5):
        points = points.clone().requires_grad_()
        functional.cross_entropy(net.model(points), net.labels, reduction="sum").backward()
        gradient = points.grad
        if threat.norm == "l2":
            gradient = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        else:
            gradient = gradient.sign()
        points = threat.project(points.detach() + 0.02 * gradient, net.images)
    net.model.zero_grad(set_to_none=True)
    ascended = ascend(net.model, net.images, net.labels, threat=threat, start=start, steps=5, step_size=0.02, loss="ce")
    assert torch.allclose(ascended, points, atol=1e-6)
    assert torch.equal(start, threat.start(net.images, draw(net.keys, (1, 8, 8), 0)))


def test_ascend_takes_a_loss_of_its_own_and_any_mode(toy: Any) -> None:
    """TRADES ascends the divergence from the clean prediction, while the network trains; both must be possible."""
    toy.model.train()
    try:
        clean = toy.model(toy.images).softmax(dim=1).detach()

        def divergence(logits: Tensor, labels: Tensor) -> Tensor:
            del labels
            return functional.kl_div(logits.log_softmax(dim=1), clean, reduction="none").sum(dim=1)

        start = LINF.start(toy.images, keyed.uniform(toy.keys, (1, 8, 8), 0))
        with PassCounter(toy.model) as counter:
            moved = ascend(
                toy.model, toy.images, toy.labels, threat=LINF, start=start, steps=7, step_size=0.02, loss=divergence
            )
        assert toy.model.training
    finally:
        toy.model.eval()
    with torch.no_grad():
        before, after = (divergence(toy.model(images), toy.labels).mean() for images in (start, moved))
    assert after > 2 * before
    # One forward and one backward a step, or adversarial training pays for what it does not use.
    assert (counter.forwards, counter.backwards) == (7 * len(toy.labels), 7 * len(toy.labels))


def test_ten_steps_on_digits_take_under_a_second(toy: Any) -> None:
    """The attack of the demo and of every unit test; measured at about a tenth of this limit on one core."""
    attack(toy.part(20), LINF)
    began = time.perf_counter()
    attack(toy, LINF)
    assert time.perf_counter() - began < 1.0
