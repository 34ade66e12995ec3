"""Module robust criticality against closed forms, and the promises of the search for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Split
from robustboard.defenses.architectures import build
from robustboard.defenses.robust_criticality import (
    Ascent,
    Criticality,
    adversarial_examples,
    candidates,
    robust_criticality,
)
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/10")


def examples(count: int = 24, classes: int = 3) -> Split:
    draws = torch.Generator().manual_seed(0)
    return Split(torch.rand(count, 1, 4, 4, generator=draws), torch.arange(count) % classes)


def network(name: str = "mlp-9-7") -> nn.Sequential:
    return build(name, image_shape=(1, 4, 4), classes=3, seed=0).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def one_example(classes: int = 2) -> tuple[nn.Sequential, Split]:
    """Logits W x of one image whose loss, for two classes, is softplus of minus (w_0 - w_1) x."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.5, -0.5, 0.2], [0.3, -0.4, 0.8, 0.1]]))
    return model, Split(torch.tensor([0.9, 0.2, 0.4, 0.7]).view(1, 1, 2, 2), torch.tensor([0]))


def exact(model: nn.Sequential, split: Split, radius: float) -> float:
    """The MRC of `one_example` in closed form.

    The margin (w_0 - w_1) x is linear in W with gradient (x, -x), of norm sqrt(2) ||x||, so that in a ball of radius r
    it falls by r sqrt(2) ||x||, and the loss is softplus of minus the margin.
    """
    weight, x = model[1].weight.detach().double(), split.images.flatten().double()
    margin = float((weight[0] - weight[1]) @ x)
    fall = radius * float(weight.norm()) * math.sqrt(2) * float(x.norm())
    return math.log1p(math.exp(fall - margin)) - math.log1p(math.exp(-margin))


@pytest.mark.parametrize("projection", ["epoch", "step"])
@pytest.mark.parametrize("radius", [0.05, 0.1, 0.5])
def test_one_example_of_a_linear_network_has_the_closed_form(projection: str, radius: float) -> None:
    """Its loss is convex in the weights with gradients all along one line, so the ascent finds the maximum itself."""
    model, split = one_example()
    found = robust_criticality(model, "1", split, ascent=Ascent(radius=radius, projection=projection), seed=0)  # type: ignore[arg-type]
    assert found.value == pytest.approx(exact(model, split, radius), rel=1e-4)
    assert found.distance == pytest.approx(radius, rel=1e-4)
    assert found.reach > radius


def test_a_short_ascent_inside_the_ball_is_that_many_gradient_steps() -> None:
    """Without a projection the worst weights are w + lr (g_0 + g_1 + ...), and all passes are made."""
    model, split = one_example()
    found = robust_criticality(model, "1", split, ascent=Ascent(lr=1e-3, epochs=2), seed=0)
    weight, x = model[1].weight.detach().clone(), split.images.flatten()
    for _ in range(2):
        moving = weight.clone().requires_grad_()
        loss = nn.functional.cross_entropy((moving @ x)[None], split.labels)
        weight = weight + 1e-3 * torch.autograd.grad(loss, moving)[0]
    after = nn.functional.cross_entropy((weight @ x)[None], split.labels)
    before = nn.functional.cross_entropy((model[1].weight @ x)[None], split.labels)
    assert found.epochs == 2
    assert found.value == pytest.approx((after - before).item(), rel=1e-3)
    assert found.reach == pytest.approx(found.distance)


@pytest.mark.parametrize("projection", ["epoch", "step"])
@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("module", ["1", "3", "5"])
def test_the_worst_weights_stay_in_the_ball(projection: str, variant: str, module: str) -> None:
    ascent = Ascent(lr=50.0, batch_size=5, projection=projection, variant=variant)  # type: ignore[arg-type]
    found = robust_criticality(network(), module, examples(), ascent=ascent, seed=0)
    assert 0 < found.distance <= 0.1
    assert found.reach > 0.1


@pytest.mark.parametrize("projection", ["epoch", "step"])
@pytest.mark.parametrize("lr", [0.01, 1.0, 20.0])
def test_the_code_finds_at_least_what_the_paper_s_algorithm_finds(projection: str, lr: float) -> None:
    """Both walk the same way until the first projection; the code goes on and keeps the worst point."""
    model = network()
    for module in candidates(model):
        values = {
            variant: robust_criticality(
                model,
                module,
                examples(),
                ascent=Ascent(lr=lr, variant=variant, projection=projection, epochs=4),  # type: ignore[arg-type]
                seed=0,
            )
            for variant in ("code", "paper")
        }
        assert values["code"].value >= values["paper"].value >= 0
        assert values["code"].epochs == 4
        assert values["paper"].epochs == 4 if values["paper"].reach <= 0.1 else values["paper"].epochs < 4


def test_a_larger_ball_holds_a_worse_point() -> None:
    model = network()
    values = [
        robust_criticality(model, "3", examples(), ascent=Ascent(radius=r), seed=0).value for r in (0.02, 0.1, 0.4)
    ]
    assert values == sorted(values)
    assert values[0] < values[-1]


def test_the_ball_is_relative() -> None:
    """Scaling a ReLU layer up and the next one down leaves the function, the ball and the criticality alone."""
    model = network("mlp-9")
    scaled = network("mlp-9")
    with torch.no_grad():
        scaled[1].weight.mul_(4)
        scaled[1].bias.mul_(4)
        scaled[3].weight.div_(4)
    # The scale of the gradient changes with that of the weights: the step follows it.
    plain = robust_criticality(model, "1", examples(), ascent=Ascent(lr=100.0, epochs=1), seed=0)
    other = robust_criticality(scaled, "1", examples(), ascent=Ascent(lr=1600.0, epochs=1), seed=0)
    assert other.value == pytest.approx(plain.value, rel=1e-3)


@pytest.mark.parametrize("lr", [1.0, 1e38])
def test_the_network_is_left_as_it_was(lr: float) -> None:
    """Weights, statistics, modes and flags, also where the ascent runs off."""
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).train()
    model[0].requires_grad_(False)
    before, split = state(model), examples()
    images = split.images.clone()
    for name in candidates(model):
        found = robust_criticality(model, name, split, ascent=Ascent(lr=lr), seed=0)
        assert all(math.isfinite(value) for value in (found.value, found.distance, found.reach))
        assert found.distance <= 0.1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(split.images, images)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True, True, True]


def test_an_ascent_that_overflows_ends_at_the_last_point_that_does_not() -> None:
    """The first step leads to weights of 1e38 whose logits overflow: its direction counts, the second is not made."""
    model, split = one_example()
    twice = Split(1.6 * split.images.repeat(2, 1, 1, 1), split.labels.repeat(2))
    found = robust_criticality(model, "1", twice, ascent=Ascent(lr=3.3e38, batch_size=1, projection="epoch"), seed=0)
    assert found.epochs == 1
    assert found.reach > 1e37
    assert found.value == pytest.approx(exact(model, Split(twice.images[:1], twice.labels[:1]), 0.1), rel=1e-4)


def test_an_ascent_whose_first_step_overflows_finds_nothing() -> None:
    found = robust_criticality(network(), "5", examples(), ascent=Ascent(lr=1e300, projection="epoch"), seed=0)
    assert found == Criticality("5", 0, 0, 0, 0, 1)


def test_layers_that_work_in_place_do_not_spoil_what_is_kept() -> None:
    """Activations before the module are computed once; a container that begins with an in-place layer gets a copy."""

    def residual(inplace: bool) -> nn.Sequential:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(16, 6), nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(6, 6)), nn.Linear(6, 3)
        ).eval()

    plain, inplace = residual(False), residual(True)
    inplace.load_state_dict(plain.state_dict())
    assert robust_criticality(plain, "2.1", examples(), ascent=Ascent(), seed=0) == robust_criticality(
        inplace, "2.1", examples(), ascent=Ascent(), seed=0
    )


class Opaque(nn.Module):
    """The same network, but not a chain that can be cut."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)  # type: ignore[no-any-return]


@pytest.mark.parametrize("module", ["0", "2", "5", "7"])
def test_kept_activations_change_nothing(module: str) -> None:
    model = build("cnn-small", image_shape=(1, 8, 8), classes=3, seed=0).eval()
    split = Split(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3)
    cut = robust_criticality(model, module, split, ascent=Ascent(epochs=3), seed=0)
    whole = robust_criticality(Opaque(model).eval(), f"inner.{module}", split, ascent=Ascent(epochs=3), seed=0)
    assert cut.value == pytest.approx(whole.value, rel=1e-3)


def test_a_weight_that_two_layers_share_moves_in_both() -> None:
    """The prefix ends before the first layer that holds the weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    model[3].weight = model[1].weight
    first, second = (
        robust_criticality(model.eval(), name, examples(), ascent=Ascent(batch_size=100, epochs=2), seed=0)
        for name in ("1", "3")
    )
    assert first.value == pytest.approx(second.value, rel=1e-4)


def test_a_module_of_zeros_has_no_ball() -> None:
    model = network("mlp-9")
    nn.init.zeros_(model[3].weight)
    assert robust_criticality(model, "3", examples(), ascent=Ascent(), seed=0) == Criticality("3", 0, 0, 0, 0, 0)


def test_candidates_are_convolutions_and_linear_layers_with_weights_of_their_own() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 1, 1),
            "norm": nn.BatchNorm2d(1),
            "derived": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "block": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        }
    )
    assert candidates(model) == ("conv", "block.0")


@pytest.mark.parametrize("name", ["0", "2", "nowhere"])
def test_other_modules_are_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(DefenseError, match=f"no convolution or linear layer '{name}'"):
        robust_criticality(network(), name, examples(), ascent=Ascent(), seed=0)


def test_a_network_without_a_finite_loss_is_refused() -> None:
    model = network("mlp-9")
    nn.init.constant_(model[3].weight, math.nan)
    with pytest.raises(DefenseError, match="nothing can rise"):
        robust_criticality(model, "1", examples(), ascent=Ascent(), seed=0)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"radius": 0.0}, {"lr": -1.0}])
def test_settings_without_meaning_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Ascent(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("threat", [LINF, ThreatModel.parse("l2", "1/2")], ids=["linf", "l2"])
def test_adversarial_examples_lie_in_the_ball_and_raise_the_loss(threat: ThreatModel) -> None:
    """An image's example depends on the image alone, not on its place in the split."""
    model, split = network(), examples()
    found = adversarial_examples(model, split, threat=threat, steps=10, seed=0)
    assert bool(threat.contains(found.images, split.images).all())
    loss = nn.functional.cross_entropy
    assert loss(model(found.images), split.labels) > loss(model(split.images), split.labels)
    backwards = Split(split.images.flip(0), split.labels.flip(0))
    again = adversarial_examples(model, backwards, threat=threat, steps=10, seed=0)
    assert torch.allclose(again.images.flip(0), found.images, atol=1e-5)
