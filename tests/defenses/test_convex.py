"""The convex method as a defense: which variant is trained when, on what ball, and what its certificate is worth."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.own_certificates import applicable, certify
from robustboard.attacks.pgd import pgd
from robustboard.attacks.quadratic import QuadraticNetwork
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import convex_programs, convex_relu_program, registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.convex import ConvexTraining
from robustboard.defenses.convex_features import linf_reach
from robustboard.defenses.frozen_base import trunk_of
from robustboard.errors import DefenseError

LINF, L2 = ThreatModel.parse("linf", "1/20"), ThreatModel.parse("l2", "1/4")
BASE = {"base": "standard", "base_epochs": 3, "architecture": "mlp-12-8", "epochs": 3}


def images(count: int, side: int, classes: int, *, channels: int = 1, seed: int = 0) -> Split:
    """A bright row or column that tells the class, in noise."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    pixels = 0.4 * torch.rand(count, channels, side, side, generator=draws)
    for place, label in enumerate(labels.tolist()):
        pixels[place, :, label % side] += 0.5
    return Split(pixels, labels)


def data_of(count: int = 60, side: int = 6, classes: int = 3, channels: int = 1) -> TrainingData:
    train, held = (images(count, side, classes, channels=channels, seed=seed) for seed in (0, 1))
    return TrainingData("tiny", train, held, classes)


def fit(
    data: TrainingData, threat: ThreatModel, *, folder: Path | None = None, seed: int = 0, **overrides: object
) -> nn.Module:
    return ConvexTraining(overrides).fit(
        data,
        threat,
        seed=seed,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=CheckpointStore(folder),
    )


def right(model: nn.Module, split: Split) -> Tensor:
    with torch.no_grad():
        return model(split.images).argmax(dim=1) == split.labels


SMALL, LARGE = data_of(count=40, side=3), data_of()


@pytest.mark.parametrize(
    ("data", "threat", "overrides", "form", "ball", "radius"),
    [
        (LARGE, L2, {}, "scalable", "l2", 0.25),
        (LARGE, LINF, {}, "scalable", "l2", 0.6 * 0.05 * linf_reach(LARGE.train.images)),
        (LARGE, LINF, {"activation": "relu"}, "scalable", "linf", 0.05),
        (LARGE, LINF, {"activation": "relu", "ball": "l2"}, "scalable", "l2", 0.03 * linf_reach(LARGE.train.images)),
        (LARGE, L2, {"activation": "relu"}, "scalable", "l2", 0.25),
        (LARGE, LINF, {"components": 5}, "program", "l2", 0.03 * linf_reach(LARGE.train.images)),
        (SMALL, LINF, {}, "program", "linf", 0.05),
        (SMALL, L2, {}, "program", "l2", 0.25),
        (SMALL, LINF, {"form": "scalable"}, "scalable", "l2", 0.03 * linf_reach(SMALL.train.images)),
        (SMALL, LINF, {"base": "standard"}, "scalable", "l2", 0.3),
    ],
)
def test_the_ball_follows_from_the_track_and_the_variant(
    data: TrainingData, threat: ThreatModel, overrides: dict[str, object], form: str, ball: str, radius: float
) -> None:
    hyper = ConvexTraining(overrides).hyper(data, threat)
    assert hyper.form_for(len(data.train), math.prod(data.image_shape)) == form
    assert (hyper.ball, hyper.radius) == (ball, pytest.approx(radius, rel=1e-6))
    assert (hyper.beta, hyper.feature_norm) == ((1e-3, 1.0) if form == "program" else (1e-4, None))


def test_many_classes_are_told_from_the_rest() -> None:
    """A curvature matrix for every pair of 200 classes would be 19,900 of them a step."""
    many = data_of(count=60, classes=30)
    assert ConvexTraining().hyper(many, LINF).multi_class == "one-vs-all"
    assert ConvexTraining().hyper(LARGE, LINF).multi_class == "pairwise"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"loss": "squared"}, "convex: the squared loss is that of single outputs"),
        ({"ball": "linf"}, "convex: the scalable polynomial form knows the worst case of L2 balls only"),
        ({"ball": "linf", "activation": "relu", "components": 3}, "convex: principal components turn an L-inf ball"),
        ({"architecture": "cnn-small"}, "convex: the network on pixels is two-layer"),
        ({"augment": True}, "convex: worst cases are taken around the images themselves"),
        ({"base": "convex"}, "convex: the base must be another defense"),
        ({"radius": -1}, "convex: radius, beta and penalty must not be negative"),
        ({"width": 0}, "convex: width and components must be at least 1"),
        ({"feature_norm": 0}, "convex: feature_norm must be positive"),
        ({"robust_examples": -1}, "convex: robust_examples must not be negative"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(DefenseError, match=sentence) as caught:
        fit(LARGE, LINF, **overrides)
    assert str(caught.value).endswith(".")


def test_an_unknown_base_is_a_sentence() -> None:
    with pytest.raises(DefenseError, match="The defense 'magic' is unknown"):
        fit(LARGE, LINF, base="magic")


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_certificate_of_a_trained_network_is_never_broken(threat: ThreatModel, classes: int) -> None:
    """The deployed network is one that the board certifies itself; most examples are, and PGD breaks none of those."""
    data = data_of(classes=classes)
    model = fit(data, threat, epochs=15)
    split = data.validation
    assert applicable(model) == ("quadratic",)
    bounds = certify(model, split.images, split.labels, threat=threat, method="quadratic", classes=classes)
    assert bounds.reason is None
    assert bounds.certified.float().mean().item() > 0.8
    found = pgd(
        model.requires_grad_(requires_grad=False),
        split.images,
        split.labels,
        threat=threat,
        keys=[str(place) for place in range(len(split))],
        seed=0,
        steps=20,
        restarts=2,
        step_size=threat.radius / 5,
    )
    assert not bool((bounds.certified & ~right(model, Split(found, split.labels))).any())


def test_robust_training_certifies_what_standard_training_does_not() -> None:
    """The radius is what does it: the same network trained at radius zero is accurate and hardly certified."""
    threat, data = ThreatModel.parse("l2", "2/3"), data_of()
    split, shares = data.validation, {}
    for radius in (0.0, threat.radius):
        model = fit(data, threat, epochs=15, radius=radius)
        bounds = certify(model, split.images, split.labels, threat=threat, method="quadratic", classes=3)
        assert right(model, split).float().mean().item() > 0.95
        shares[radius] = bounds.certified.float().mean().item()
    assert shares[threat.radius] > shares[0.0] + 0.2


@pytest.mark.parametrize("activation", ["polynomial", "relu"])
def test_a_small_problem_is_solved_by_the_program_once(
    activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes the program, whose solution is kept: the second fit does not solve, another radius does."""
    overrides = {"activation": activation, "width": 6}
    first = fit(SMALL, L2, folder=tmp_path, **overrides)
    assert right(first, SMALL.validation).float().mean().item() > 0.9

    def refuse(problem: object, solver: str) -> None:
        raise AssertionError("solved again")

    for module in (convex_programs, convex_relu_program):
        monkeypatch.setattr(module, "solve_accurately", refuse)
    second = fit(SMALL, L2, folder=tmp_path, **overrides)
    for before, after in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    with pytest.raises(AssertionError, match="solved again"):
        fit(SMALL, L2, folder=tmp_path, **overrides, radius=0.1)


def test_program_and_scalable_form_train_one_function() -> None:
    """With the same ball, regulariser and features, the factored form ends near the program's logits."""
    shared = {"beta": 0.01, "feature_norm": 1.0}
    program = fit(SMALL, L2, form="program", **shared)
    scalable = fit(SMALL, L2, form="scalable", epochs=600, lr=0.03, width=24, **shared)
    with torch.no_grad():
        expected, found = program(SMALL.validation.images), scalable(SMALL.validation.images)
        gaps = [logits - logits.mean(dim=1, keepdim=True) for logits in (expected, found)]
    assert (gaps[0] - gaps[1]).abs().mean().item() < 0.1 * gaps[0].abs().mean().item()


@pytest.mark.parametrize("activation", ["polynomial", "relu"])
def test_only_the_last_layers_of_a_base_change(activation: str) -> None:
    """The trunk is the base's to the last bit, whatever is trained on it, and takes no gradient."""
    data = data_of()
    base = registry.create("standard", {"architecture": "mlp-12-8", "epochs": 3}).fit(
        data, LINF, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )
    model = fit(data, LINF, activation=activation, **BASE)
    assert isinstance(model, nn.Sequential)
    trunk, kept = nn.Sequential(*list(base.children())[:3]), nn.Sequential(*list(model.children())[:3])
    for before, after in zip(trunk.state_dict().values(), kept.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    head = list(model.children())[3:]
    if activation == "polynomial":
        assert [type(layer) for layer in head] == [nn.Flatten, QuadraticNetwork]
    else:
        assert [type(layer) for layer in head] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert applicable(model) == ()


def test_trunks_of_convolutional_and_residual_networks() -> None:
    from robustboard.defenses.architectures import build

    pixels = torch.rand(2, 3, 8, 8)
    convolutional = build("cnn-small", image_shape=(3, 8, 8), classes=4, seed=0).eval()
    residual = build("resnet18", image_shape=(3, 8, 8), classes=4, seed=0).eval()
    for network, width in ((convolutional, 32 * 2 * 2), (residual, 512)):
        before = network(pixels)
        assert trunk_of(network)(pixels).shape == (2, width)
        torch.testing.assert_close(network(pixels), before)  # the network itself stays whole
    with pytest.raises(DefenseError, match="does not end in two linear layers"):
        trunk_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))


def test_the_frozen_base_keeps_its_statistics() -> None:
    """A trunk in train mode would move its batch normalisation by the very passes that make features."""
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    trunk = trunk_of(network)
    trunk(torch.rand(5, 1, 3, 3))
    assert int(trunk[0].num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_convex_training_meets_its_floor_on_digits() -> None:
    """Certified, not only attacked: clean >= 0.97 and certified >= 0.75 at eps 1/10."""
    from robustboard.bench.datasets import load_dataset
    from robustboard.bench.protocol import load_track, select, training_data

    track, dataset = load_track("digits-linf@1"), load_dataset("digits")
    test = select(track, dataset)
    model = fit(training_data(track, dataset), track.threat)
    labels = torch.from_numpy(test.labels)
    bounds = certify(model, test.tensor(), labels, threat=track.threat, method="quadratic", classes=10)
    assert right(model, Split(test.tensor(), labels)).float().mean().item() >= 0.97
    assert bounds.certified.float().mean().item() >= 0.75
