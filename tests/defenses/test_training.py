"""The shared loop: what a mini-batch is, how the learning rate moves, and that a resumed training is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress, Split, TrainingData
from robustboard.defenses.batches import Batch, augmented, epoch_batches
from robustboard.defenses.training import Recipe, accuracy, evaluating, fresh_model, learning_rate, sized, train
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/10")


def blobs(count: int = 40, channels: int = 1, *, seed: int = 0) -> TrainingData:
    """Two classes that differ in their brighter half."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.4 * torch.rand(count, channels, 8, 8, generator=draws)
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    return TrainingData("blobs", Split(images[8:], labels[8:]), Split(images[:8], labels[:8]), 2)


class Killed(Exception):  # noqa: N818 (a signal, not an error)
    pass


class Kill(NoProgress):
    """Kills the training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, steps: int = 1) -> None:
        del steps
        self.left -= 1
        if self.left == 0:
            raise Killed


class Heard(NoProgress):
    def __init__(self) -> None:
        self.total, self.steps, self.notes = 0, 0, []  # type: ignore[var-annotated]

    def begin(self, stage: str, total: int) -> None:
        self.total = total

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    def note(self, **values: float) -> None:
        self.notes.append(values)


def fit(
    name: str,
    data: TrainingData,
    *,
    threat: ThreatModel = LINF,
    seed: int = 3,
    progress: NoProgress | None = None,
    folder: Path | None = None,
    **overrides: object,
) -> nn.Module:
    # A two-layer network on the pixels has no architecture to choose.
    network = {} if name == "convex" else {"architecture": "mlp-12"}
    defense = registry.create(name, {"epochs": 5, "batch_size": 10, **network, **overrides})
    return defense.fit(
        data,
        threat,
        seed=seed,
        device=torch.device("cpu"),
        progress=progress or NoProgress(),
        checkpoints=CheckpointStore(folder),
    )


def same(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("steps", [1, 9, 14, 20], ids="killed at step {}".format)
def test_a_killed_training_ends_with_the_same_weights(name: str, steps: int, tmp_path: Path) -> None:
    data = blobs()
    whole = fit(name, data)
    with pytest.raises(Killed):
        fit(name, data, progress=Kill(steps), folder=tmp_path)
    assert same(whole, fit(name, data, folder=tmp_path))


def test_batch_statistics_and_augmentation_resume_too(tmp_path: Path) -> None:
    """Running statistics, crops and flips of a colour training are those of the uninterrupted one."""
    data = blobs(channels=3)
    options = {"architecture": "resnet18", "epochs": 2, "batch_size": 16, "optimizer": "sgd", "lr": 0.01}
    whole = fit("pgd-at", data, steps=1, **options)
    with pytest.raises(Killed):
        fit("pgd-at", data, steps=1, progress=Kill(3), folder=tmp_path, **options)
    assert same(whole, fit("pgd-at", data, steps=1, folder=tmp_path, **options))


def test_a_finished_training_returns_at_once(tmp_path: Path) -> None:
    heard = Heard()
    first = fit("standard", blobs(), folder=tmp_path)
    again = fit("standard", blobs(), folder=tmp_path, progress=heard)
    assert same(first, again)
    assert heard.notes == []
    assert heard.steps == heard.total


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"lr": 0.01}, {"threat": ThreatModel.parse("linf", "1/9")}, {"data": blobs(seed=1)}],
    ids=str,
)
def test_the_state_of_another_training_is_ignored(change: dict[str, object], tmp_path: Path) -> None:
    """Another seed, recipe, radius or data set starts again."""
    fit("pgd-at", blobs(), folder=tmp_path)
    options: dict[str, object] = {"data": blobs(), **change}
    assert same(fit("pgd-at", **options), fit("pgd-at", folder=tmp_path, **options))  # type: ignore[arg-type]


def test_seeds_differ() -> None:
    assert not same(fit("standard", blobs(), seed=0), fit("standard", blobs(), seed=1))


def test_progress_tells_every_step_and_epoch() -> None:
    heard = Heard()
    fit("standard", blobs(), progress=heard)
    assert heard.total == heard.steps == 5 * 4
    assert [note["epoch"] for note in heard.notes] == [1, 2, 3, 4, 5]
    assert heard.notes[-1]["loss"] < heard.notes[0]["loss"]
    assert heard.notes[-1]["validation"] == 1.0


def run(objective: Callable[[nn.Module], Callable[[Batch], Tensor]], data: TrainingData, **recipe: object) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))
    return train(
        model,
        objective(model),
        data,
        Recipe(architecture="given", epochs=2, **recipe),  # type: ignore[arg-type]
        threat=LINF,
        name="method",
        seed=0,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=CheckpointStore(),
    )


def test_dropout_neither_reads_nor_moves_the_global_random_state() -> None:
    def objective(model: nn.Module) -> Callable[[Batch], Tensor]:
        return lambda batch: functional.cross_entropy(model(batch.images), batch.labels)

    weights = []
    for state in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 2))
            torch.manual_seed(state)
            before = torch.get_rng_state()
            train(
                model,
                objective(model),
                blobs(),
                Recipe(architecture="given", epochs=2),
                threat=LINF,
                name="method",
                seed=0,
                device=torch.device("cpu"),
                progress=NoProgress(),
                checkpoints=CheckpointStore(),
            )
            assert torch.equal(before, torch.get_rng_state())
            weights.append(model)
    assert same(*weights)


def test_a_diverged_training_is_one_sentence() -> None:
    with pytest.raises(DefenseError, match="method diverged in epoch 1; try a smaller lr"):
        run(lambda model: lambda batch: model(batch.images).sum() * math.nan, blobs())


def test_an_empty_training_split_is_one_sentence() -> None:
    data = blobs()
    empty = TrainingData("empty", Split(data.train.images[:0], data.train.labels[:0]), data.validation, 2)
    with pytest.raises(DefenseError, match="its training split is empty"):
        run(lambda model: lambda batch: model(batch.images).sum(), empty)


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 3))
def test_an_epoch_shows_every_image_once_in_batches_of_almost_one_size(count: int, size: int, epoch: int) -> None:
    split = Split(torch.arange(count).view(-1, 1, 1, 1).float(), torch.arange(count))
    batches = list(
        epoch_batches(split, size=size, augment=False, epoch=epoch, epochs=4, seed=0, device=torch.device("cpu"))
    )
    sizes = [len(batch.labels) for batch in batches]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()) == list(range(count))
    assert all(torch.equal(batch.images.flatten().long(), batch.labels) for batch in batches)
    done = [batch.done for batch in batches]
    assert done[0] == epoch / 4
    assert done == sorted(done)
    assert done[-1] < (epoch + 1) / 4


def test_augmentation_moves_and_mirrors_whole_images_of_all_channels() -> None:
    """Every augmented image is a shifted, perhaps mirrored, piece of the reflected original."""
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(30, 3, 16, 16, generator=draws)
    padded = functional.pad(images, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for image, result in zip(padded, augmented(images, draws), strict=True):
        places = {
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if torch.equal(
                image[:, row : row + 16, column : column + 16].flip(2 if flip else ()),  # type: ignore[arg-type]
                result,
            )
        }
        assert len(places) == 1
        seen |= places
    assert {flip for _, _, flip in seen} == {False, True}
    assert len({row for row, _, _ in seen}) == 5


@given(st.sampled_from(["one-cycle", "piecewise", "constant"]), st.floats(0, 0.999))
def test_the_learning_rate_stays_a_share(schedule: str, done: float) -> None:
    assert 0 < learning_rate(schedule, done) <= 1  # type: ignore[arg-type]


def test_piecewise_falls_tenfold_twice() -> None:
    assert [learning_rate("piecewise", done) for done in (0.4, 0.6, 0.9)] == [1.0, 0.1, 0.01]


def test_evaluating_restores_the_mode() -> None:
    model = nn.Linear(1, 1).train()
    with evaluating(model):
        assert not model.training
    assert model.training


def test_accuracy_is_a_share_and_nan_of_nothing() -> None:
    split = Split(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 0]))
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    assert accuracy(model, split) == pytest.approx(2 / 3)
    assert math.isnan(accuracy(model, Split(split.images[:0], split.labels[:0])))


def test_colour_images_are_normalised_inside_and_grey_ones_are_not() -> None:
    assert "0.mean" in fresh_model("mlp-3", blobs(channels=3), seed=0).state_dict()
    assert "0.mean" not in fresh_model("mlp-3", blobs(), seed=0).state_dict()


def test_large_data_sets_get_fewer_epochs() -> None:
    assert sized(blobs(), examples=10**6)["epochs"] == 100
    assert sized(blobs(), examples=320)["epochs"] == 10
    assert sized(blobs(), examples=1)["epochs"] == 2


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("standard", {"epochs": 0}, "epochs and batch_size must be at least 1"),
        ("standard", {"lr": "-1"}, "lr must be positive"),
        ("fgsm-at", {"alpha": "2"}, r"alpha must lie in \[0, 1\]"),
        ("pgd-at", {"steps": "0"}, "steps must be at least 1"),
        ("trades", {"beta": "-1"}, "beta must not be negative"),
        ("ibp", {"warmup": "0.7"}, "shares of the training"),
        ("ibp", {"kappa": "1.5"}, r"kappa must lie in \[0, 1\]"),
        ("crown-ibp", {"beta": "2"}, r"beta must lie in \[0, 1\]"),
    ],
)
def test_impossible_hyper_parameters_are_refused(name: str, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(DefenseError, match=sentence):
        registry.create(name, overrides).hyper(blobs(), LINF)


class Counts:
    """A controller whose state is how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def epoch_end(self, epoch: int) -> dict[str, float]:
        self.calls += 1
        return {"called": self.calls, "at": epoch}

    def state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def restore(self, state: Mapping[str, int]) -> None:
        self.calls = state["calls"]


def steered(
    store: CheckpointStore, progress: Progress, *, start: float = 1.0, frozen: bool = False
) -> tuple[nn.Module, Counts]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[4].weight.mul_(start)  # type: ignore[operator]
    model[2].requires_grad_(requires_grad=False)
    counts = Counts()
    train(
        model,
        lambda batch: functional.cross_entropy(model(batch.images), batch.labels),
        blobs(),
        Recipe(architecture="given", epochs=3, batch_size=8),
        threat=LINF,
        name="steered",
        seed=0,
        device=torch.device("cpu"),
        progress=progress,
        checkpoints=store,
        controller=counts,
        frozen_statistics=frozen,
    )
    return model, counts


def test_a_resumed_controller_continues_where_it_was(tmp_path: Path) -> None:
    """Killed in the third epoch: the controller's state comes back with the weights, and its numbers are logged."""
    with pytest.raises(Killed):
        steered(CheckpointStore(tmp_path), Kill(2 * 4 + 2))
    heard = Heard()
    resumed, counts = steered(CheckpointStore(tmp_path), heard)
    assert [(note["called"], note["at"]) for note in heard.notes] == [(3, 3)]
    assert counts.calls == 3
    assert same(resumed, steered(CheckpointStore(), NoProgress())[0])


def test_a_checkpoint_of_other_initial_weights_is_ignored(tmp_path: Path) -> None:
    steered(CheckpointStore(tmp_path), NoProgress())
    heard = Heard()
    steered(CheckpointStore(tmp_path), heard, start=2.0)
    assert len(heard.notes) == 3


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parameters_and_statistics_stay(frozen: bool) -> None:
    model, _ = steered(CheckpointStore(), NoProgress(), frozen=frozen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 2))
    assert torch.equal(model[2].weight, fresh[2].weight)
    assert not torch.equal(model[4].weight, fresh[4].weight)
    assert torch.equal(model[1].running_mean, fresh[1].running_mean) is frozen
