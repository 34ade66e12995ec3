"""Differential training against its theory: margins of linear classifiers, the loss written out, offsets."""

from __future__ import annotations

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.differential import (
    Centred,
    Differential,
    differential_loss,
    pointwise_squared_loss,
    settle,
)
from robustboard.defenses.feature_rank import cross_entropy_margin_bound, feature_rank, penultimate_features
from robustboard.defenses.offsets import class_offsets, deviation, midpoint_offset, offsets
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/10")
FORMS = ["log", "squared"]
LOSSES = [*FORMS, "cross-entropy", "centred-cross-entropy", "pointwise-squared"]


def planar(shift: float) -> tuple[Tensor, Tensor]:
    """Two separable classes (30, 10) in a plane, which lies `shift` away from the origin in eight more directions."""
    draws = torch.Generator().manual_seed(3)
    labels = torch.arange(30) % 2
    plane = 0.6 * torch.randn(30, 2, generator=draws, dtype=torch.float64)
    plane[:, 0] += torch.where(labels == 1, 5.2, 2.4)
    return torch.cat([plane, torch.full((30, 8), shift, dtype=torch.float64)], dim=1), labels


def margin(direction: Tensor, offset: Tensor | float, points: Tensor, labels: Tensor) -> float:
    """The distance of the nearest point from the hyperplane, negative if one is on the wrong side."""
    return float(((points @ direction + offset) * (2 * labels - 1)).min() / direction.norm())


def support_vectors(points: Tensor, labels: Tensor, *, penalised: bool) -> tuple[Tensor, float]:
    """The hard-margin SVM; with `penalised` the offset counts like a weight."""
    weight, offset = cp.Variable(points.shape[1]), cp.Variable()
    objective = cp.sum_squares(weight) + (cp.square(offset) if penalised else 0)
    constraints = [cp.multiply(2 * labels.numpy() - 1, points.numpy() @ weight + offset) >= 1]
    cp.Problem(cp.Minimize(objective), constraints).solve(solver=cp.CLARABEL)
    return torch.from_numpy(np.asarray(weight.value)), float(offset.value)


def descend(loss, *parameters: Tensor, steps: int = 3000, rate: float = 0.1) -> None:
    """Gradient descent whose step is divided by the loss: the same limit direction, without the logarithmic wait."""
    for _ in range(steps):
        value = loss()
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.data -= rate / value.item() * gradient


@pytest.fixture(scope="module")
def by_cross_entropy() -> tuple[Tensor, float]:
    """Direction and offset that descent on the cross-entropy finds on the shifted plane."""
    points, labels = planar(1.0)
    weight = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    signs = 2 * labels - 1
    descend(lambda: functional.softplus(-signs * (points @ weight + offset)).mean(), weight, offset)
    return weight.detach(), offset.item()


def by_differences(points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and offset of differential training on a linear model, by the method's own functions."""
    weights = torch.zeros(2, points.shape[1], dtype=torch.float64, requires_grad=True)
    descend(lambda: differential_loss(points @ weights.T, labels, "log"), weights)
    weights = weights.detach()
    biases = offsets(points @ weights.T, labels)
    return (weights[1] - weights[0]) / 2, (biases[1] - biases[0]) / 2


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.0])
def test_the_direction_converges_to_that_of_the_largest_margin(shift: float) -> None:
    """Theorem 2, wherever the plane lies: the hard-margin SVM's direction, and with the midpoint its margin."""
    points, labels = planar(shift)
    largest = margin(*support_vectors(points, labels, penalised=False), points, labels)
    direction, offset = by_differences(points, labels)
    assert margin(direction, offset, points, labels) == pytest.approx(largest, rel=2e-3)
    assert margin(direction, offset, points, labels) <= largest * (1 + 1e-6)


def test_the_direction_is_that_of_scikit_learn_s_machine() -> None:
    from sklearn.svm import SVC

    points, labels = planar(1.0)
    machine = SVC(kernel="linear", C=1e6).fit(points.numpy(), labels.numpy())
    expected = torch.from_numpy(machine.coef_[0].copy())
    direction, offset = by_differences(points, labels)
    assert float(direction @ expected / direction.norm() / expected.norm()) == pytest.approx(1, abs=1e-4)
    assert float(offset / direction.norm()) == pytest.approx(machine.intercept_[0] / float(expected.norm()), abs=5e-3)


def test_cross_entropy_obeys_the_bound_and_ends_at_the_augmented_machine(
    by_cross_entropy: tuple[Tensor, float],
) -> None:
    """Theorem 1: offset and weights are penalised alike, which costs margin where the data lie off the origin."""
    points, labels = planar(1.0)
    weight, offset = by_cross_entropy
    found = margin(weight, offset, points, labels)
    gamma = margin(*support_vectors(points, labels, penalised=False), points, labels)
    augmented = margin(*support_vectors(points, labels, penalised=True), points, labels)
    assert found == pytest.approx(augmented, rel=1e-2)
    scale = found * float(weight.norm())
    rank = feature_rank(points)
    assert rank.k_99 == 2
    assert rank.offset == pytest.approx(8.0)
    bound = cross_entropy_margin_bound(gamma, offset / scale, rank.offset)
    assert found <= bound * (1 + 1e-3)
    assert bound < 0.95 * gamma
    # The component of w along every constant direction is B Delta_k.
    torch.testing.assert_close(weight[2:], torch.full((8,), offset, dtype=torch.float64), rtol=1e-3, atol=0)


def test_centred_features_take_the_objection_away(by_cross_entropy: tuple[Tensor, float]) -> None:
    """The same descent on the points less their mean comes far closer to the largest margin."""
    points, labels = planar(1.0)
    gamma = margin(*support_vectors(points, labels, penalised=False), points, labels)
    centre, signs = points.mean(dim=0), 2 * labels - 1
    weight = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    descend(lambda: functional.softplus(-signs * ((points - centre) @ weight + offset)).mean(), weight, offset)
    centred = margin(weight.detach(), offset.detach() - centre @ weight.detach(), points, labels)
    assert gamma - centred < 0.25 * (gamma - margin(*by_cross_entropy, points, labels))


def pairs(logits: Tensor, labels: Tensor) -> dict[tuple[int, int], list[Tensor]]:
    """The margins of all pairs of points by their pair of classes, written out."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    for (i, own), (j, other) in itertools.product(enumerate(labels.tolist()), repeat=2):
        if own < other:
            across = (logits[i, own] - logits[i, other]) - (logits[j, own] - logits[j, other])
            found.setdefault((own, other), []).append(across / 2)
    return found


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(2, 14), st.integers(0, 1000))
def test_the_loss_is_the_mean_over_classes_and_points_written_out(classes: int, count: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=draws, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=draws)
    margins = pairs(logits, labels)
    forms = {"log": lambda m: functional.softplus(-m), "squared": lambda m: (m - 1).square()}
    for form, loss in forms.items():
        means = [loss(torch.stack(some)).mean() for some in margins.values()]
        expected = torch.stack(means).mean().item() if means else 0.0
        assert differential_loss(logits, labels, form).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)  # type: ignore[arg-type]


def test_two_classes_give_the_paper_s_loss() -> None:
    """Over a score s = (z_1 - z_0) / 2, all pairs alike."""
    draws = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 2, generator=draws), torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 1])
    score = (logits[:, 1] - logits[:, 0]) / 2
    differences = score[labels == 1].unsqueeze(1) - score[labels == 0]
    assert differential_loss(logits, labels, "log").item() == pytest.approx(
        functional.softplus(-differences).mean().item()
    )
    assert differential_loss(logits, labels, "squared").item() == pytest.approx(
        (differences - 1).square().mean().item()
    )


@pytest.mark.parametrize("form", FORMS)
def test_offsets_cancel_and_the_gradient_is_that_of_the_pairs(form: str) -> None:
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 3, generator=draws, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(8) % 3
    loss = differential_loss(logits, labels, form)  # type: ignore[arg-type]
    moved = differential_loss(logits + torch.tensor([3.0, -7.0, 0.5]), labels, form)  # type: ignore[arg-type]
    assert moved.item() == pytest.approx(loss.item(), rel=1e-9)
    gradient = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(gradient.sum(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda z: differential_loss(z, labels, form), (logits,))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_one_class_moves_nothing(form: str) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = differential_loss(logits, torch.ones(4, dtype=torch.long), form)  # type: ignore[arg-type]
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_the_pointwise_control_has_the_optimum_of_the_pairs() -> None:
    """At half margins of 1/2 both vanish; an offset that the pairs do not see costs the control."""
    labels = torch.tensor([0, 1, 2, 1])
    logits = functional.one_hot(labels, 3).double()
    assert pointwise_squared_loss(logits, labels).item() == 0
    assert differential_loss(logits, labels, "squared").item() == 0
    shifted = logits + torch.tensor([0.5, 0.0, 0.0])
    assert pointwise_squared_loss(shifted, labels).item() > 0.01
    assert differential_loss(shifted, labels, "squared").item() == pytest.approx(0, abs=1e-12)


def test_the_midpoint_lies_between_the_nearest_points() -> None:
    upper, lower = torch.tensor([5.0, 2.0, 9.0]), torch.tensor([-3.0, 1.0])
    offset = midpoint_offset(upper, lower)
    assert (upper + offset).min().item() == pytest.approx(-(lower + offset).max().item())


def test_a_stray_point_does_not_move_the_midpoint_of_overlapping_classes() -> None:
    """Of 1000 points one is where the other class is: the rest decide."""
    upper, lower = torch.linspace(1, 2, 1000), torch.linspace(-2, -1, 1000)
    upper[0] = -50
    assert midpoint_offset(upper, lower).item() == pytest.approx(0, abs=0.02)


def test_class_offsets_minimise_the_cross_entropy_of_scaled_scores() -> None:
    """At the optimum the predicted shares of the classes are the true ones; a large scale does not upset the fit."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=draws)
    scores = functional.one_hot(labels, 4) + 0.3 * torch.randn(200, 4, generator=draws) + torch.tensor([9.0, 0, -4, 1])
    small = class_offsets(scores, labels)
    assert small.sum().item() == pytest.approx(0, abs=1e-5)
    torch.testing.assert_close(class_offsets(1e6 * scores, labels), 1e6 * small, rtol=1e-4, atol=1.0)
    shift = torch.tensor([1.0, 0.0, 5.0, -6.0])
    torch.testing.assert_close(class_offsets(scores + shift, labels), small - shift, rtol=1e-4, atol=1e-4)
    shares = ((scores + small) / deviation(scores)).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(shares, torch.bincount(labels, minlength=4) / 200, atol=1e-4, rtol=0)
    assert ((scores + small).argmax(dim=1) == labels).float().mean().item() > 0.95
    assert (scores.argmax(dim=1) == labels).float().mean().item() < 0.5


def test_a_class_without_examples_gets_a_finite_offset() -> None:
    scores = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    found = class_offsets(scores, torch.arange(30) % 2)
    assert bool(torch.isfinite(found).all())
    assert found[2] < found[:2].min()


@pytest.mark.parametrize("classes", [2, 4])
def test_settling_changes_scale_and_offsets_alone(classes: int) -> None:
    """Differences of scores keep their ratios, have unit deviation, and two classes are equally far from the border."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % classes
    features = torch.randn(80, 6, generator=draws) + 6 * functional.one_hot(labels, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(6, classes)
    with torch.no_grad():
        head.weight.copy_(40 * torch.eye(6)[:classes])
        before = features @ head.weight.T
    settle(head, features, labels)
    with torch.no_grad():
        after = features @ head.weight.T
        logits = head(features)
    ratio = (before[:, 1] - before[:, 0]) / (after[:, 1] - after[:, 0])
    torch.testing.assert_close(ratio, ratio[:1].expand(80), rtol=1e-3, atol=0)
    assert deviation(after).item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(after.sum(dim=1), torch.zeros(80), atol=1e-4, rtol=0)
    assert bool((logits.argmax(dim=1) == labels).all())
    if classes == 2:
        own = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
        assert own[labels == 0].min().item() == pytest.approx(own[labels == 1].min().item(), rel=1e-3)


def blobs(count: int = 60, classes: int = 3) -> TrainingData:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = 0.5 * torch.rand(count, 1, 4, 4, generator=draws)
    for place, label in enumerate(labels.tolist()):
        images[place, :, label] += 0.4
    return TrainingData("blobs", Split(images[12:], labels[12:]), Split(images[:12], labels[:12]), classes)


def fit(data: TrainingData, **overrides: object) -> nn.Module:
    return Differential({"architecture": "mlp-20-7", "epochs": 8, "batch_size": 16, **overrides}).fit(
        data, LINF, seed=1, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_trained_network_is_an_ordinary_one(loss: str, classes: int) -> None:
    """Of the same layers as any other, all parameters free to move, and right on its training images."""
    data = blobs(classes=classes)
    model = fit(data, loss=loss, epochs=100, lr=0.01)
    assert [type(layer) for layer in model.children()] == [
        nn.Flatten,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
        nn.ReLU,
        nn.Linear,
    ]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert bool((model(data.train.images).argmax(dim=1) == data.train.labels).all())


def test_folding_gives_the_logits_of_features_less_their_training_mean() -> None:
    data = blobs()
    model = fit(data, loss="centred-cross-entropy")
    assert isinstance(model, nn.Sequential)
    head = model[-1]
    features = penultimate_features(model, data.train.images)
    with torch.no_grad():
        logits = model(data.train.images)
        by_hand = (features - features.mean(dim=0)) @ head.weight.T  # type: ignore[operator]
    rest = logits - by_hand
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), atol=1e-5, rtol=0)
    assert rest.abs().max() < 1  # what is left is the trained bias, not W times the mean


def test_centring_uses_the_mini_batch_in_training_and_its_running_mean_after() -> None:
    layer = nn.Linear(3, 2)
    centred = Centred(layer).train()
    features = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + 5
    torch.testing.assert_close(centred(features), layer(features - features.mean(dim=0)))
    for _ in range(100):
        centred(features)
    centred.eval()
    torch.testing.assert_close(centred.centre, features.mean(dim=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(centred(features[:1]), layer(features[:1] - centred.centre))


@pytest.mark.parametrize("loss", ["squared", "centred-cross-entropy"])
def test_a_killed_training_of_every_kind_resumes(loss: str, tmp_path) -> None:
    """Offsets and running means are part of the state: killed in the fourth epoch, the weights end up the same."""

    class Killed(Exception):  # noqa: N818 (a signal, not an error)
        pass

    class Kill(NoProgress):
        left = 3 * 3 + 2

        def advance(self, steps: int = 1) -> None:
            self.left -= steps
            if self.left == 0:
                raise Killed

    def run(progress: NoProgress, store: CheckpointStore) -> dict[str, Tensor]:
        method = Differential({"architecture": "mlp-9-7", "epochs": 6, "batch_size": 16, "loss": loss})
        model = method.fit(blobs(), LINF, seed=1, device=torch.device("cpu"), progress=progress, checkpoints=store)
        return model.state_dict()

    whole = run(NoProgress(), CheckpointStore())
    with pytest.raises(Killed):
        run(Kill(), CheckpointStore(tmp_path))
    resumed = run(NoProgress(), CheckpointStore(tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_validation_figures_are_those_of_a_usable_classifier() -> None:
    """Without offsets the accuracy of an epoch would mean nothing: here they are worth more than the direction."""

    class Heard(NoProgress):
        def __init__(self) -> None:
            self.validation: list[float] = []

        def note(self, **values: float) -> None:
            self.validation.append(values["validation"])

    heard = Heard()
    Differential({"architecture": "mlp-9-7", "epochs": 20, "batch_size": 16}).fit(
        blobs(classes=2), LINF, seed=1, device=torch.device("cpu"), progress=heard, checkpoints=CheckpointStore()
    )
    assert heard.validation[-1] == 1.0


def test_images_of_one_class_are_refused_in_a_sentence() -> None:
    data = blobs()
    one = Split(data.train.images[:4], torch.zeros(4, dtype=torch.long))
    with pytest.raises(DefenseError, match=r"pairs of classes, and all training images of blobs are of one class\."):
        fit(TrainingData("blobs", one, data.validation, 3))


def test_accurate_on_digits() -> None:
    """The floor of a row on the board, for the extension to ten classes."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = (torch.from_numpy(bundled.images) / 16).float().unsqueeze(1)
    labels = torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, held, rest = order[:360], order[360:500], order[500:]
    data = TrainingData("digits", Split(images[rest], labels[rest]), Split(images[held], labels[held]), 10)
    model = registry.create("differential").fit(
        data, LINF, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )
    with torch.no_grad():
        right = model(images[test]).argmax(dim=1) == labels[test]
    assert right.float().mean().item() >= 0.95
    assert math.isfinite(model(images[test]).abs().max().item())
