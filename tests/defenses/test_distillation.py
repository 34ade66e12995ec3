"""Defensive distillation does what its paper says, and what was later found: gradients vanish, the boundary stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.jsma import JsmaResult, jsma
from robustboard.attacks.keyed import generator
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.architectures import build
from robustboard.defenses.batches import Batch
from robustboard.defenses.distillation import Distillation, hard_labels, soft_labels
from robustboard.defenses.standard import Standard
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/10")
TINY = {"architecture": "mlp-12", "epochs": 3, "batch_size": 16}


def tiny_data(count: int = 48) -> TrainingData:
    """Three classes of 4 x 4 images that a small perceptron learns."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.4 * torch.rand(count, 1, 4, 4, generator=draws)
    images[torch.arange(count), 0, labels] += 0.5
    split = Split(images, labels)
    return TrainingData("tiny", split, split, 3)


def batch(count: int = 12) -> Batch:
    split = tiny_data(count).train
    return Batch(split.images, split.labels, 0.0, generator("draws"))


def network(seed: int) -> nn.Sequential:
    return build("mlp-12", image_shape=(1, 4, 4), classes=3, seed=seed)


def fit(
    data: TrainingData,
    overrides: Mapping[str, object],
    *,
    seed: int = 0,
    checkpoints: CheckpointStore | None = None,
    progress: Any = None,
    method: type[Distillation] | type[Standard] = Distillation,
) -> nn.Module:
    return method(overrides).fit(
        data,
        LINF,
        seed=seed,
        device=torch.device("cpu"),
        progress=progress or NoProgress(),
        checkpoints=checkpoints or CheckpointStore(),
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_losses_are_the_paper_s() -> None:
    """-log softmax(z / T)_y for the teacher; -sum_i Q_i log softmax(z / T)_i, Q = softmax(z_teacher / T), after it."""
    teacher, student, some = network(0), network(1), batch()
    with torch.no_grad():
        scores = (student(some.images) / 7).log_softmax(dim=1)
        labels = (teacher(some.images) / 7).softmax(dim=1)
    hard = hard_labels(student, temperature=7.0)(some).item()
    soft = soft_labels(student, teacher, temperature=7.0)(some).item()
    assert hard == pytest.approx(-scores[torch.arange(12), some.labels].mean().item(), rel=1e-6)
    assert soft == pytest.approx(-(labels * scores).sum(dim=1).mean().item(), rel=1e-6)


def test_a_student_that_equals_its_teacher_stays() -> None:
    """The loss is least, and its gradient zero, where the student's probabilities are the teacher's."""
    teacher, some = network(0), batch()
    student, other = network(0), network(1)
    loss = soft_labels(student, teacher, temperature=3.0)(some)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(float(weight.grad.abs().max()) < 1e-6 for weight in student.parameters() if weight.grad is not None)
    assert soft_labels(other, teacher, temperature=3.0)(some).item() > loss.item()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_gradients_fall_with_the_temperature() -> None:
    """The gradient in z is (softmax(z / T) - y) / T: with SGD a high temperature all but stops the training."""
    sizes = {}
    for temperature in (1.0, 100.0):
        model = network(0)
        hard_labels(model, temperature=temperature)(batch()).backward()  # type: ignore[no-untyped-call]
        sizes[temperature] = sum(
            float(weight.grad.abs().sum()) for weight in model.parameters() if weight.grad is not None
        )
    assert sizes[1.0] / sizes[100.0] == pytest.approx(100, rel=0.2)


def test_the_teacher_labels_what_the_student_sees_with_dropout_off() -> None:
    """Labels are those of the mini-batch at hand, augmented or not, and the same each time."""
    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), *network(0)[1:])
    student, some = network(1), batch()
    loss = soft_labels(student, teacher, temperature=2.0)
    assert loss(some).item() == loss(some).item()
    moved = replace(some, images=some.images.flip(2) ** 0.25)
    with torch.no_grad():
        wanted = (teacher.eval()(moved.images) / 2).softmax(dim=1)
        expected = functional.cross_entropy(student(moved.images) / 2, wanted).item()
    assert loss(moved).item() == pytest.approx(expected, rel=1e-6)
    assert loss(moved).item() != pytest.approx(loss(some).item(), rel=1e-3)


class Recording(CheckpointStore):
    """Knows the last state of each stage."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.last: dict[str, dict[str, Any]] = {}

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        super().save(name, state)
        self.last[name] = {key: value.clone() for key, value in state["model"].items()}


def test_stages_and_their_starts() -> None:
    """A shared start, a teacher, a student; without a warm start both begin from weights of their own."""
    warm, cold = Recording(), Recording()
    model = fit(tiny_data(), TINY, checkpoints=warm)
    fit(tiny_data(), {**TINY, "warm_start_epochs": 0}, checkpoints=cold)
    assert list(warm.last) == ["distillation-start", "distillation-teacher", "distillation-student"]
    assert list(cold.last) == ["distillation-teacher", "distillation-student"]
    assert all(torch.equal(value, warm.last["distillation-student"][key]) for key, value in model.state_dict().items())
    assert not torch.equal(warm.last["distillation-teacher"]["1.weight"], warm.last["distillation-student"]["1.weight"])


def test_teacher_and_student_start_from_the_same_plain_epochs() -> None:
    """A warm start is ordinary training at T = 1; where T is so large that SGD stands still, nothing else follows."""
    options = {**TINY, "optimizer": "sgd", "lr": 0.1}
    plain = fit(tiny_data(), {**options, "epochs": 2}, method=Standard).state_dict()
    store = Recording()
    fit(tiny_data(), {**options, "temperature": 1e9, "warm_start_epochs": 2}, checkpoints=store)
    for key, value in plain.items():
        assert torch.equal(value, store.last["distillation-start"][key])
        torch.testing.assert_close(value, store.last["distillation-teacher"][key], atol=1e-7, rtol=0)
        torch.testing.assert_close(value, store.last["distillation-student"][key], atol=1e-7, rtol=0)


def test_the_student_is_deployed_without_the_temperature() -> None:
    """What `fit` returns is the bare network: no layer divides its logits."""
    model = fit(tiny_data(), TINY)
    assert [type(layer) for layer in model.children()] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert not model.training


def test_the_learning_rate_s_gain_is_capped_by_the_temperature() -> None:
    cold = {**TINY, "warm_start_epochs": 0, "optimizer": "sgd", "lr": 0.01}
    gained = fit(tiny_data(), {**cold, "temperature": 8, "lr_gain": 20})
    direct = fit(tiny_data(), {**cold, "temperature": 8, "lr": 0.08})
    assert same(gained, direct)
    assert same(
        fit(tiny_data(), {**cold, "temperature": 1, "lr_gain": 20}), fit(tiny_data(), {**cold, "temperature": 1})
    )


class Killed(Exception):  # noqa: N818
    pass


class KillsAt(NoProgress):
    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.left, self.current = stage, steps, ""

    def begin(self, stage: str, total: int) -> None:
        self.current = stage

    def advance(self, steps: int = 1) -> None:
        if self.stage in self.current:
            self.left -= 1
            if self.left == 0:
                raise Killed


@pytest.mark.parametrize("stage", ["start", "teacher", "student"])
def test_every_stage_resumes(stage: str, tmp_path: Path) -> None:
    """Killed in any stage, the training ends with the weights of one that was not; finished stages are not repeated."""
    options = {**TINY, "warm_start_epochs": 3}
    whole = fit(tiny_data(), options)
    with pytest.raises(Killed):
        fit(tiny_data(), options, checkpoints=CheckpointStore(tmp_path), progress=KillsAt(stage, steps=5))
    again = Recording(tmp_path)
    assert same(fit(tiny_data(), options, checkpoints=again), whole)
    stages = ["start", "teacher", "student"]
    assert list(again.last) == [f"distillation-{name}" for name in stages[stages.index(stage) :]]


def test_another_temperature_is_another_training(tmp_path: Path) -> None:
    """Kept states of one temperature are never continued at another."""
    fit(tiny_data(), {**TINY, "temperature": 5}, checkpoints=CheckpointStore(tmp_path))
    kept = fit(tiny_data(), {**TINY, "temperature": 50}, checkpoints=CheckpointStore(tmp_path))
    assert same(kept, fit(tiny_data(), {**TINY, "temperature": 50}))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"temperature": "0.5"}, "temperature must be at least 1, not 0.5"),
        ({"warm_start_epochs": "-1"}, "warm_start_epochs must not be negative"),
        ({"lr_gain": "0.5"}, "lr_gain at least 1"),
    ],
)
def test_hyper_parameters_are_refused_in_a_sentence(overrides: dict[str, str], sentence: str) -> None:
    with pytest.raises(DefenseError, match=sentence):
        fit(tiny_data(), overrides)


@dataclass(frozen=True)
class Pair:
    """An undefended network and one distilled at T = 100, on test images that neither has seen."""

    standard: nn.Module
    distilled: nn.Module
    images: Tensor
    labels: Tensor

    def logits(self, model: nn.Module, images: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(self.images if images is None else images)
        return found

    def survives(self, model: nn.Module, *losses: str) -> float:
        """The accuracy under PGD with these losses."""
        keys = [str(place) for place in range(len(self.labels))]
        found = pgd(
            model,
            self.images,
            self.labels,
            threat=LINF,
            keys=keys,
            seed=0,
            steps=20,
            restarts=1,
            step_size=0.02,
            losses=losses,
        )
        return (self.logits(model, found).argmax(dim=1) == self.labels).float().mean().item()

    def jsma(self, model: nn.Module, **options: Any) -> JsmaResult:
        """Every image of the first 40 into each of its wrong classes, with 16 of the 64 features."""
        rows = self.images[:40].repeat_interleave(9, dim=0)
        targets = torch.cat([torch.tensor([k for k in range(10) if k != y]) for y in self.labels[:40].tolist()])
        return jsma(model, rows, targets, pairs=8, **options)


@pytest.fixture(scope="module")
def pair() -> Pair:
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = (torch.from_numpy(bundled.images) * 255 / 16).round().div(255).float().unsqueeze(1)
    labels = torch.from_numpy(bundled.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, rest = order[:360], order[360:]
    data = TrainingData("digits", Split(images[rest], labels[rest]), Split(images[test][:1], labels[test][:1]), 10)
    return Pair(fit(data, {}, method=Standard), fit(data, {}), images[test], labels[test])


def test_accuracy_is_kept_and_logits_grow_with_the_temperature(pair: Pair) -> None:
    """Training only ever sees z / T, so that z grows towards T times its usual size."""
    plain, distilled = pair.logits(pair.standard), pair.logits(pair.distilled)
    assert (distilled.argmax(dim=1) == pair.labels).float().mean() >= 0.93
    growth = distilled.abs().amax(dim=1).mean() / plain.abs().amax(dim=1).mean()
    assert 30 < growth < 300


def test_cross_entropy_stalls_and_other_losses_do_not(pair: Pair) -> None:
    """Masking: by cross-entropy nearly robust, by margin and DLR as broken as the undefended network."""
    clean = (pair.logits(pair.distilled).argmax(dim=1) == pair.labels).float().mean().item()
    undefended = pair.survives(pair.standard, "ce", "margin", "dlr")
    assert pair.survives(pair.distilled, "ce") >= clean - 0.1
    assert undefended <= 0.5
    for loss in ("margin", "dlr"):
        assert pair.survives(pair.distilled, loss) <= undefended + 0.1


def test_cross_entropy_of_divided_logits_does_not_stall(pair: Pair) -> None:
    class Divided(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = pair.distilled(images) / 100
            return logits

    assert pair.survives(Divided().eval(), "ce") <= pair.survives(pair.standard, "ce") + 0.1


def test_the_gradient_of_cross_entropy_is_exactly_zero(pair: Pair) -> None:
    """Float32 rounds the softmax of well-classified images to zeros and ones, and with it the gradient to nothing."""

    def zero(model: nn.Module) -> float:
        points = pair.images.clone().requires_grad_()
        loss = functional.cross_entropy(model(points), pair.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        return (gradient.flatten(1).abs().amax(dim=1) == 0).float().mean().item()

    assert zero(pair.standard) <= 0.05
    assert zero(pair.distilled) >= 0.8


def test_jsma_fails_until_the_logits_are_divided(pair: Pair) -> None:
    """The paper's measure falls from nearly all to nearly none, and is back once the softmax is taken of z / T."""
    assert pair.jsma(pair.standard).success.float().mean() >= 0.9
    assert pair.jsma(pair.distilled).success.float().mean() <= 0.05
    assert pair.jsma(pair.distilled, temperature=100.0).success.float().mean() >= 0.85


@pytest.mark.slow
def test_mnist_floors_of_the_paper_s_measure(data_file: Any) -> None:
    """100 images, nine targets each, 112 of 784 features: the paper has 95.89 % without and 0.45 % with the defense."""
    from robustboard.bench.datasets import load_dataset
    from robustboard.bench.protocol import as_floats, load_track, training_data

    dataset = load_dataset("mnist", data_dirs=[data_file("mnist.npz").parent])
    data = training_data(load_track("mnist-linf@1"), dataset)
    images = torch.from_numpy(as_floats(dataset.test.images[:100]))
    rows = images.repeat_interleave(9, dim=0)
    labels = torch.from_numpy(dataset.test.labels[:100])
    targets = torch.cat([torch.tensor([k for k in range(10) if k != label]) for label in labels.tolist()])
    standard, distilled = fit(data, {}, method=Standard), fit(data, {})
    assert jsma(standard, rows, targets).success.float().mean() >= 0.90
    assert jsma(distilled, rows, targets).success.float().mean() <= 0.05
    assert jsma(distilled, rows, targets, temperature=100.0).success.float().mean() >= 0.85
