"""The interval attack: what a region says, how it grows, what it costs, and where a plain gradient sees nothing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.interval import Found, ascents, interval_attack
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)

LINF = ThreatModel.parse("linf", "1/10")
WIDE = ThreatModel.parse("linf", "3/10")


class Scaled(nn.Module):
    """A leading normalisation, which bounds are taken behind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("std", torch.tensor([0.2, 0.5]).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.3) / self.std


def convolution(*, normalised: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU()]
        model = nn.Sequential(*([Scaled()] if normalised else []), *layers, nn.Linear(8, 4))
    return model.double().eval()


def images_of(count: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def margins_at(model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
    """z_y - z_j for j != y in rising order, (N, K - 1)."""
    logits = model(points)
    others = torch.arange(logits.shape[1]).expand_as(logits) != labels[:, None]
    return logits.gather(1, labels[:, None]) - logits[others].view(len(labels), -1)


@pytest.mark.parametrize("normalised", [False, True])
def test_coefficients_of_a_tiny_region_are_gradients(normalised: bool) -> None:
    """Where no neuron changes sides the linear bound is the network itself, in pixel units."""
    model, images, labels = convolution(normalised=normalised), images_of(3), torch.tensor([0, 2, 3])
    network = BoundedNetwork(model, images[:1], classes=4, slope="same")
    bound, rows = network.coefficients(labels, lower=images - 1e-7, upper=images + 1e-7)
    assert torch.allclose(bound, margins_at(model, images, labels), atol=1e-5)
    for other in range(3):
        points = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(margins_at(model, points, labels)[:, other].sum(), points)
        assert torch.allclose(rows[:, other], gradient, atol=1e-9)


@pytest.mark.parametrize("slope", ["same", "adaptive"])
def test_coefficients_lie_below_the_margins(slope: Any) -> None:
    """A linear function whose least value over the box is CROWN's bound, and which no point of the box falls below."""
    model, images, labels = convolution(normalised=True), images_of(3), torch.tensor([0, 2, 3])
    network = BoundedNetwork(model, images[:1], classes=4, slope=slope)
    lower, upper = images - 0.05, images + 0.05
    bound, rows = network.coefficients(labels, lower=lower, upper=upper)
    assert torch.allclose(bound, network.margins(labels, lower=lower, upper=upper, method="crown"), atol=1e-9)
    assert not rows.requires_grad
    lowest = torch.where(rows > 0, lower[:, None], upper[:, None])
    draws, slack = torch.Generator().manual_seed(2), []
    for _ in range(50):
        points = lower + (upper - lower) * torch.rand(images.shape, generator=draws, dtype=images.dtype).round()
        linear = bound + (rows * (points[:, None] - lowest)).flatten(2).sum(dim=2)
        slack.append(margins_at(model, points, labels) - linear)
    assert torch.stack(slack).min() >= -1e-9


class Plateau(nn.Module):
    """Flat until the mean brightness passes 0.62, and wrong soon after: no gradient near an image of mean 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(16, 1)
        self.out = nn.Linear(1, 2)
        with torch.no_grad():
            self.mean.weight.fill_(1 / 16)
            self.mean.bias.fill_(-0.62)
            self.out.weight.copy_(torch.tensor([[0.0], [40.0]]))
            self.out.bias.copy_(torch.tensor([0.5, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.mean(images.flatten(1)).relu())


def plateau_images() -> Tensor:
    return 0.5 + 0.01 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.005


def attack(model: nn.Module, images: Tensor, labels: Tensor, **changes: Any) -> Found:
    options: dict[str, Any] = {"threat": WIDE, "seed": 0, "steps": 5, "restarts": 1, "step_size": 0.02} | changes
    return interval_attack(model, images, labels, keys=[str(i) for i in range(len(images))], **options)


@pytest.mark.parametrize("step", ["corner", "scaled"])
def test_a_growing_region_sees_beyond_a_plateau(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PGD never moves; regions grow threefold from eps / 30 to eps / 2, where the other class appears."""
    model, images = Plateau().eval(), plateau_images()
    labels = torch.zeros(len(images), dtype=torch.long)
    radii: list[float] = []
    bounded = BoundedNetwork.coefficients

    def spy(self: BoundedNetwork, labels: Tensor, *, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        radii.append(round(float((upper - lower).max()) / 2, 4))
        return bounded(self, labels, lower=lower, upper=upper)

    monkeypatch.setattr(BoundedNetwork, "coefficients", spy)
    found = attack(model, images, labels, step=step)
    plain = pgd(
        model,
        images,
        labels,
        threat=WIDE,
        keys=[str(i) for i in range(len(images))],
        seed=0,
        steps=5,
        restarts=ascents(1),
        step_size=0.02,
        losses=("ce",),
    )
    with torch.no_grad():
        assert bool((model(plain).argmax(dim=1) == labels).all())
        assert bool((model(found.images).argmax(dim=1) == 1).all())
    assert bool(found.broken.all())
    assert bool(WIDE.contains(found.images, images).all())
    assert radii == [0.01, 0.03, 0.09, 0.15]
    assert found.regions.tolist() == [4] * 6
    reach = (found.images - images).abs().amax(dim=(1, 2, 3))
    assert torch.allclose(reach, torch.full((6,), 0.3 if step == "corner" else 0.15), atol=1e-5)


def test_growth_and_smallest_region_are_the_caller_s(monkeypatch: pytest.MonkeyPatch) -> None:
    radii: list[float] = []
    bounded = BoundedNetwork.coefficients

    def spy(self: BoundedNetwork, labels: Tensor, *, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        radii.append(round(float((upper - lower).max()) / 2, 4))
        return bounded(self, labels, lower=lower, upper=upper)

    monkeypatch.setattr(BoundedNetwork, "coefficients", spy)
    images = plateau_images()[:1]
    attack(Plateau().eval(), images, torch.tensor([0]), smallest=0.05, growth=2)
    assert radii == [0.05, 0.1, 0.15]
    radii.clear()
    attack(Plateau().eval(), images, torch.tensor([0]), smallest=1.0)
    assert radii == [0.15]


def test_a_class_that_cannot_win_leaves_the_point_where_it_is() -> None:
    """The first restart stays at the clean image, whose regions all say no; the counts are those of the full search."""
    model, images = Plateau().eval(), plateau_images()
    with torch.no_grad():
        model.out.bias.copy_(torch.tensor([50.0, 0.0]))
    found = attack(model, images, torch.zeros(6, dtype=torch.long))
    assert not found.broken.any()
    assert torch.equal(found.images, images)
    assert found.gradients.tolist() == [5 * ascents(1)] * 6
    assert found.regions.tolist() == [3 * 4] * 6


def test_saturated_cross_entropy_is_seen_through(toy: Any) -> None:
    """Logits of tens of thousands give cross-entropy no gradient: the ascents do nothing, the interval steps do."""

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy.model

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images) * 1e4

    model, options = Loud().eval(), {"threat": LINF, "seed": 0, "steps": 8, "step_size": 0.02, "keys": toy.keys}
    plain = pgd(model, toy.images, toy.labels, restarts=ascents(2), losses=("ce",), **options)
    found = interval_attack(model, toy.images, toy.labels, restarts=2, **options)
    by_gradients = len(toy.labels) - sum(toy.still_correct(plain))
    assert int(found.broken.sum()) > 5 * by_gradients
    assert int(found.broken.sum()) > 0.3 * len(toy.labels)


@pytest.mark.parametrize("step", ["corner", "scaled"])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_it_stays_inside_counts_its_gradients_and_tells_the_truth(toy: Any, step: Any, loss: str) -> None:
    net = toy.part(60)
    with PassCounter(net.model) as counter:
        found = interval_attack(
            net.model,
            net.images,
            net.labels,
            threat=LINF,
            keys=net.keys,
            seed=0,
            steps=4,
            restarts=3,
            step_size=0.02,
            step=step,
            loss=loss,
        )
    assert bool(LINF.contains(found.images, net.images).all())
    assert found.broken.tolist() == [not right for right in net.still_correct(found.images)]
    assert 0 < int(found.broken.sum()) < 60
    assert int(found.gradients.sum()) == counter.backwards
    assert found.gradients[~found.broken].tolist() == [4 * ascents(3)] * int((~found.broken).sum())
    assert int(found.gradients[found.broken].max()) <= 4 * ascents(3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.model.parameters())


def test_verdicts_do_not_move_with_batch_or_order(toy: Any) -> None:
    net, tight = toy.part(60), ThreatModel.parse("linf", "1/20")

    def run(places: Tensor, seed: int = 0) -> Found:
        return interval_attack(
            net.model,
            net.images[places],
            net.labels[places],
            threat=tight,
            keys=[net.keys[i] for i in places.tolist()],
            seed=seed,
            steps=4,
            restarts=3,
            step_size=0.01,
        )

    whole, verdicts = run(torch.arange(60)), torch.zeros(60, dtype=torch.bool)
    for part in torch.randperm(60, generator=torch.Generator().manual_seed(5)).split(23):
        verdicts[part] = run(part).broken
    assert verdicts.tolist() == whole.broken.tolist()
    assert torch.equal(run(torch.arange(60)).images, whole.images)
    assert not torch.equal(run(torch.arange(60), seed=1).images, whole.images)


def test_misclassified_images_cost_nothing(toy: Any) -> None:
    net = toy.part(5)
    found = interval_attack(
        net.model, net.images, (net.labels + 1) % 10, threat=LINF, keys=net.keys, seed=0, steps=2, restarts=1,
        step_size=0.01,
    )  # fmt: skip
    assert torch.equal(found.images, net.images)
    assert bool(found.broken.all())
    assert int(found.gradients.sum()) == int(found.regions.sum()) == 0


def test_no_images_give_no_images() -> None:
    found = attack(Plateau().eval(), torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long))
    assert found.images.shape == (0, 1, 4, 4)
    assert found.broken.shape == found.gradients.shape == found.regions.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threat": ThreatModel.parse("l2", "1/2")}, "L-inf balls, not l2 ones"),
        ({"steps": 0}, "at least one step and one restart"),
        ({"restarts": 0}, "at least one step and one restart"),
        ({"loss": "hinge"}, "'hinge' is unknown; choose from ce, margin, dlr"),
        ({"step": "half"}, "'half' is not one of corner, scaled"),
        ({"growth": 1.0}, "growth above 1, not 0.01 and 1"),
        ({"smallest": 0.0}, "positive smallest radius"),
    ],
)
def test_a_bad_setting_is_refused_with_a_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TrackError, match=says):
        attack(Plateau().eval(), plateau_images(), torch.zeros(6, dtype=torch.long), **changes)


def test_a_model_in_training_mode_or_without_gradients_is_refused() -> None:
    images, labels = plateau_images(), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ModelError, match=r"model\.eval"):
        attack(Plateau(), images, labels)

    class Cut(Plateau):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.detach()).detach()

    with pytest.raises(ModelError, match="no gradient"):
        attack(Cut().eval(), images, labels)
