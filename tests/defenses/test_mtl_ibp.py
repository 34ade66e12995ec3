"""MTL-IBP: what it minimises, on networks where both ends of the combination are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.architectures import build
from robustboard.defenses.batches import Batch
from robustboard.defenses.ibp import Ibp, IbpHyper
from robustboard.defenses.mtl_ibp import MtlIbp, MtlIbpHyper
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/20")


def batch(*, done: float = 0.9, classes: int = 3) -> Batch:
    images = 0.3 + 0.4 * torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(6) % classes, done, generator("draws"))


def data_of(some: Batch, classes: int = 3) -> TrainingData:
    split = Split(some.images, some.labels)
    return TrainingData("tiny", split, split, classes)


def loss_of(model: nn.Module, *, classes: int = 3, done: float = 0.9, **hyper: float) -> float:
    some = batch(done=done, classes=classes)
    settings = MtlIbpHyper(architecture="mlp-20", epochs=1, warmup=0.1, ramp=0.5, **hyper)  # type: ignore[arg-type]
    return MtlIbp().objective(model, settings, data_of(some, classes), LINF)(some).item()


@pytest.fixture
def model() -> nn.Sequential:
    return build("mlp-20", image_shape=(1, 4, 4), classes=3, seed=0)


def test_the_loss_is_the_convex_combination_of_its_ends(model: nn.Sequential) -> None:
    """The ends are the loss of an attack, which is no more than that of the worst logits by intervals."""
    adversarial, verified = loss_of(model, alpha=0.0, eps_scale=1.0), loss_of(model, alpha=1.0, eps_scale=1.0)
    clean = functional.cross_entropy(model(batch().images), batch().labels).item()
    assert clean < adversarial < verified
    mixed = loss_of(model, alpha=0.3, eps_scale=1.0)
    assert mixed == pytest.approx(0.7 * adversarial + 0.3 * verified, rel=1e-6)


def test_alpha_one_is_interval_training(model: nn.Sequential) -> None:
    some = batch()
    hyper = IbpHyper(architecture="mlp-20", epochs=1, warmup=0.1, ramp=0.5, kappa=0.0, eps_scale=1.3)
    expected = Ibp().objective(model, hyper, data_of(some), LINF)(some).item()
    assert loss_of(model, alpha=1.0, eps_scale=1.3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("eps_scale", "attack_scale", "radii"), [(1.0, 1.0, 1.0), (1.5, 1.0, 1.5), (1.0, 2.1, 2.1)])
def test_the_attack_reaches_the_corner_of_its_own_ball(eps_scale: float, attack_scale: float, radii: float) -> None:
    """Of a linear network the corner is the worst case: the margin falls by the radius times an L1 norm."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    found = loss_of(linear, classes=2, alpha=0.0, eps_scale=eps_scale, attack_scale=attack_scale)
    some = batch(classes=2)
    with torch.no_grad():
        logits, weight = linear(some.images), linear[1].weight
        own, other = some.labels, 1 - some.labels
        margin = logits.gather(1, own[:, None])[:, 0] - logits.gather(1, other[:, None])[:, 0]
        fall = radii * LINF.radius * (weight[own] - weight[other]).abs().sum(dim=1)
    assert found == pytest.approx(functional.softplus(fall - margin).mean().item(), rel=1e-4)


def test_the_radius_grows_from_zero(model: nn.Sequential) -> None:
    """Clean before the ramp; then both ends grow with it."""
    clean = functional.cross_entropy(model(batch().images), batch().labels).item()
    assert loss_of(model, done=0.05) == clean
    rising = [loss_of(model, done=done) for done in (0.2, 0.35, 0.6)]
    assert clean < rising[0] < rising[1] < rising[2]


def test_the_penalty_is_the_sum_of_absolute_weights(model: nn.Sequential) -> None:
    with torch.no_grad():
        total = sum(layer.weight.abs().sum().item() for layer in model if isinstance(layer, nn.Linear))
    assert loss_of(model, l1=0.01) - loss_of(model) == pytest.approx(0.01 * total, rel=1e-3)
    assert loss_of(model, done=0.0, l1=0.01) - loss_of(model, done=0.0) == pytest.approx(0.01 * total, rel=1e-3)


def test_an_l2_track_is_refused_in_a_sentence() -> None:
    reason = "mtl-ibp trains on interval bounds of L-inf boxes, so it does not suit an l2 track."
    assert registry.create("mtl-ibp").unsuited(data_of(batch()), ThreatModel.parse("l2", "1/2")) == reason


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"alpha": "1.1"}, r"alpha must lie in \[0, 1\]"),
        ({"attack_scale": "0"}, "step_size and attack_scale positive"),
        ({"steps": "0"}, "steps must be at least 1"),
        ({"l1": "-1"}, "l1 must not be negative"),
        ({"eps_scale": "0"}, "eps_scale must be positive"),
        ({"ramp": "0"}, "shares of the training"),
    ],
)
def test_impossible_hyper_parameters_are_refused(overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(DefenseError, match=sentence):
        registry.create("mtl-ibp", overrides).hyper(data_of(batch()), LINF)


@pytest.mark.slow
def test_certified_and_accurate_on_digits() -> None:
    """The floor of a modern certified baseline at eps 1/10, by intervals and linear bounds."""
    from sklearn.datasets import load_digits

    bundled, eps = load_digits(), ThreatModel.parse("linf", "1/10")
    images = (torch.from_numpy(bundled.images) / 16).float().unsqueeze(1)
    labels = torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, held, rest = order[:360], order[360:500], order[500:]
    data = TrainingData("digits", Split(images[rest], labels[rest]), Split(images[held], labels[held]), 10)
    trained = registry.create("mtl-ibp").fit(
        data, eps, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )
    lower, upper = eps.outer_box(images[test])
    with torch.no_grad():
        right = trained(images[test]).argmax(dim=1) == labels[test]
        bounded = BoundedNetwork(trained, images[:1], classes=10)
        methods = ("ibp", "crown-ibp")
        sure = [bounded.margins(labels[test], lower=lower, upper=upper, method=method) > 0 for method in methods]
    assert right.float().mean().item() >= 0.96
    assert (sure[0].all(dim=1) | sure[1].all(dim=1)).float().mean().item() >= 0.72
