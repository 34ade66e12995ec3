"""RiFT: what moves and what stays, what it selects on, where it starts, and that it resumes bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import content_hash
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.adversarial import PgdTraining, Trades
from robustboard.defenses.architectures import build
from robustboard.defenses.fine_tuning import FineTuning, Tuned, chosen_modules, fine_tune, tune_modules
from robustboard.defenses.interpolation import interpolate
from robustboard.defenses.rift import Rift, RiftHyper, resolvable_margin
from robustboard.defenses.robust_criticality import Criticality
from robustboard.defenses.training import learning_rate
from robustboard.errors import DefenseError

LINF = ThreatModel.parse("linf", "1/20")
CPU = torch.device("cpu")
# Quick, and with rules loose enough for a step away from the parent on a few dozen images.
QUICK = FineTuning(criticality_epochs=2, tuning_epochs=2, tuning_lr=0.1, tuning_batch_size=12, grid=4, margin=0.5)
SHORT = {"epochs": 4, "batch_size": 12, "architecture": "mlp-12", "criticality_epochs": 2, "tuning_epochs": 2}


def blobs(count: int = 60, classes: int = 3, *, seed: int = 0) -> TrainingData:
    """A bright square whose place tells the class, in much noise."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = 0.7 * torch.rand(count, 1, 8, 8, generator=draws)
    for place, label in enumerate(labels.tolist()):
        images[place, :, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 0.3
    held = count // 3
    return TrainingData("blobs", Split(images[held:], labels[held:]), Split(images[:held], labels[:held]), classes)


def normalised() -> nn.Sequential:
    """A network with batch normalisation and dropout, whose statistics are not those of the clean images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
            nn.Linear(8, 3),
        )
        network(3 * torch.rand(40, 1, 8, 8))
    return network.eval()


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def changed(before: Mapping[str, Tensor], network: nn.Module) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


def tune(network: nn.Module, modules: tuple[str, ...], **settings: Any) -> nn.Module:
    return tune_modules(
        network,
        modules,
        blobs(),
        LINF,
        dataclasses.replace(QUICK, **settings),
        seed=0,
        progress=NoProgress(),
        checkpoints=CheckpointStore(),
    )


class Killed(Exception):  # noqa: N818 (a signal, not an error)
    pass


class Kill(NoProgress):
    """Counts calls of `advance` in all stages, and kills at one of them."""

    def __init__(self, limit: int | None = None) -> None:
        self.calls, self.limit = 0, limit
        self.stages: list[tuple[str, int]] = []
        self.done = 0

    def begin(self, stage: str, total: int) -> None:
        self.stages.append((stage, total))

    def advance(self, steps: int = 1) -> None:
        self.calls += 1
        self.done += steps
        if self.calls == self.limit:
            raise Killed


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("module", ["0", "4", "7"])
def test_only_the_chosen_module_moves(module: str, bn_mode: str) -> None:
    """Weights and bias of the module; the statistics of every batch normalisation drift in train mode alone."""
    network = normalised()
    before = state(network)
    tuned = tune(network, (module,), bn_mode=bn_mode)
    statistics = {
        f"{norm}.{name}" for norm in (1, 5) for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    moved = {f"{module}.weight", f"{module}.bias"}
    # A bias before batch normalisation has no gradient where statistics are those of the batch.
    if bn_mode == "train" and module != "7":
        moved -= {f"{module}.bias"}
        found = changed(before, tuned) - {f"{module}.bias"}
    else:
        found = changed(before, tuned)
    assert found == (moved | statistics if bn_mode == "train" else moved)
    assert changed(before, network) == set()
    assert all(parameter.requires_grad for parameter in tuned.parameters())
    assert not tuned.training


def test_a_name_is_matched_as_a_whole() -> None:
    """The authors' code tunes every parameter whose name contains the module's; `1` is not `1.1` or `11`."""
    network = nn.Sequential(*[nn.Flatten()], *[nn.Linear(64, 64) for _ in range(11)], nn.Linear(64, 3)).eval()
    assert changed(state(network), tune(network, ("1",), tuning_lr=1e-3)) == {"1.weight", "1.bias"}


def test_all_is_every_parameter_and_a_container_is_not_tuned_twice() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 6), nn.LayerNorm(6)), nn.Linear(6, 3)).eval()
    settings = dataclasses.replace(QUICK, modules="all")
    assert chosen_modules(network, (), settings) == ("1.0", "1.1", "2")
    assert changed(state(network), tune(network, ("1.0", "1.1", "2"))) == set(network.state_dict())


def criticalities(*values: float) -> tuple[Criticality, ...]:
    ranked = [Criticality(str(2 * place + 1), value, 0, 0, 0, 1) for place, value in enumerate(values)]
    return tuple(sorted(ranked, key=lambda one: one.value))


@pytest.mark.parametrize(
    ("modules", "count", "wanted"),
    [
        ("least-critical", 1, ("3",)),
        ("least-critical", 2, ("3", "5")),
        ("least-critical", 3, ("3", "5", "1")),
        ("most-critical", 1, ("1",)),
        ("most-critical", 2, ("1", "5")),
        ("last", 1, ("5",)),
        ("all", 1, ("1", "3", "5")),
    ],
)
def test_the_ablations_of_tables_3_and_4(modules: str, count: int, wanted: tuple[str, ...]) -> None:
    network = build("mlp-5-4", image_shape=(1, 8, 8), classes=3, seed=0)
    settings = FineTuning(modules=modules, count=count)  # type: ignore[arg-type]
    assert chosen_modules(network, criticalities(9.0, 0.1, 2.0), settings) == wanted


def test_fewer_modules_than_wanted_are_a_sentence() -> None:
    network = build("mlp-5", image_shape=(1, 8, 8), classes=3, seed=0)
    with pytest.raises(DefenseError, match="to tune 3 modules, but this network has 2"):
        fine_tune(network, blobs(), LINF, dataclasses.replace(QUICK, count=3), seed=0)


def test_a_network_with_nothing_to_tune_is_a_sentence() -> None:
    with pytest.raises(DefenseError, match="convolution or linear layer"):
        fine_tune(nn.Sequential(nn.Flatten(), nn.LayerNorm(64)), blobs(), LINF, QUICK, seed=0)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_an_empty_split_is_a_sentence(part: str) -> None:
    data = blobs()
    none = Split(data.train.images[:0], data.train.labels[:0])
    with pytest.raises(DefenseError, match="needs training and validation images"):
        fine_tune(normalised(), dataclasses.replace(data, **{part: none}), LINF, QUICK, seed=0)


def run(network: nn.Module, **options: Any) -> Tuned:
    settings = options.pop("settings", QUICK)
    return fine_tune(network, options.pop("data", blobs()), LINF, settings, seed=3, **options)


def test_any_trained_network_can_be_the_parent_and_stays_as_it_is() -> None:
    """The returned weights are the chosen point of the line, whose outcomes are what `pgd` itself says."""
    network, data = normalised(), blobs()
    before = state(network)
    found = run(network)
    assert changed(before, network) == set()
    assert [one.value for one in found.criticalities] == sorted(one.value for one in found.criticalities)
    assert found.modules == (found.criticalities[0].module,)
    assert found.alpha > 0, "this training has something to gain, or the test shows nothing"
    tuned = tune_again(network, found.modules, data)
    wanted = interpolate(before, tuned.state_dict(), found.alpha)
    assert all(torch.equal(value, wanted[name]) for name, value in found.network.state_dict().items())
    chosen = next(point for point in found.outcomes if point.alpha == found.alpha)
    keys = [content_hash(image.numpy()) for image in data.validation.images]
    images = pgd(
        found.network,
        data.validation.images,
        data.validation.labels,
        threat=LINF,
        keys=keys,
        seed=3,
        steps=10,
        restarts=1,
        step_size=LINF.radius / 4,
        losses=("ce",),
    )
    with torch.no_grad():
        assert torch.equal(found.network(data.validation.images).argmax(dim=1) == data.validation.labels, chosen.clean)
        assert chosen.robust is not None
        assert torch.equal(found.network(images).argmax(dim=1) == data.validation.labels, chosen.robust)


def tune_again(network: nn.Module, modules: tuple[str, ...], data: TrainingData) -> nn.Module:
    return tune_modules(
        network, modules, data, LINF, QUICK, seed=3, progress=NoProgress(), checkpoints=CheckpointStore()
    )


def test_without_evidence_the_parent_comes_back_to_the_bit() -> None:
    """Twenty images cannot rule out a fall of one point: nothing but the parent is admissible."""
    network = normalised()
    found = run(network, settings=dataclasses.replace(QUICK, margin=0.01))
    assert found.alpha == 0.0
    assert changed(state(network), found.network) == set()


@pytest.mark.parametrize("stage", ["criticality", "train rift", "choose alpha"])
def test_a_killed_run_ends_with_the_same_weights(stage: str, tmp_path: Path) -> None:
    network = normalised()
    whole = Kill()
    uninterrupted = run(network, progress=whole)
    assert whole.done == sum(total for _, total in whole.stages)
    inside = [name for name, _ in whole.stages].index(stage)
    before = sum(total for _, total in whole.stages[:inside])
    with pytest.raises(Killed):
        run(network, progress=Kill(before + 2), checkpoints=CheckpointStore(tmp_path))
    again = run(network, checkpoints=CheckpointStore(tmp_path))
    assert changed(state(uninterrupted.network), again.network) == set()
    assert again.criticalities == uninterrupted.criticalities
    assert again.alpha == uninterrupted.alpha


class Counting(CheckpointStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saves = 0

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        super().save(name, state)
        self.saves += 1


@pytest.mark.parametrize(
    "change", [{}, {"criticality_radius": 0.2}, {"tuning_lr": 0.05}, {"margin": 0.3}, {"data": blobs(seed=1)}], ids=str
)
def test_states_of_another_run_are_not_continued(change: dict[str, Any], tmp_path: Path) -> None:
    """A finished run is not repeated; one with another setting or other data is that of an empty folder."""
    network = normalised()
    run(network, checkpoints=CheckpointStore(tmp_path))
    data = change.pop("data", blobs())
    options = {"data": data, "settings": dataclasses.replace(QUICK, **change)}
    store = Counting(tmp_path)
    kept = run(network, checkpoints=store, **options)
    fresh = run(network, **options)
    assert changed(state(fresh.network), kept.network) == set()
    assert kept.criticalities == fresh.criticalities
    assert (store.saves == 0) == (change == {} and data.train.images.equal(blobs().train.images))


def test_fresh_adversaries_are_at_least_as_bad() -> None:
    """Examples that follow the weights find no smaller criticality than those that stay, up to what PGD misses."""
    network = build("mlp-12-8", image_shape=(1, 8, 8), classes=3, seed=0).eval()
    settings = dataclasses.replace(QUICK, criticality_epochs=4)
    fixed = {one.module: one.value for one in run(network, settings=settings).criticalities}
    fresh = run(network, settings=dataclasses.replace(settings, criticality_adversary="fresh"))
    for one in fresh.criticalities:
        assert one.value >= 0.9 * fixed[one.module]
    assert sum(one.value for one in fresh.criticalities) > sum(fixed.values())


# The adapter.


def fit(defense: Any, data: TrainingData, folder: Path | None = None) -> nn.Module:
    return defense.fit(  # type: ignore[no-any-return]
        data, LINF, seed=5, device=CPU, progress=NoProgress(), checkpoints=CheckpointStore(folder)
    )


@pytest.mark.parametrize(("parent", "kind"), [("pgd-at", PgdTraining), ("trades", Trades)])
def test_the_parent_is_that_of_its_own_row_to_the_bit(parent: str, kind: type[Any], tmp_path: Path) -> None:
    """With nothing admissible RiFT returns its parent, which must be what the method alone trains."""
    data = blobs()
    shared = {"epochs": 4, "batch_size": 12, "architecture": "mlp-12"}
    found = fit(Rift({**SHORT, "parent": parent, "margin": 1e-4}), data, tmp_path)
    alone = fit(kind(shared), data)
    assert changed(state(alone), found) == set()
    kept = CheckpointStore(tmp_path).load(parent)
    assert kept is not None
    assert all(torch.equal(kept["model"][name], value) for name, value in state(alone).items())


@pytest.mark.parametrize("parent", ["pgd-at", "trades", "fgsm-at"])
def test_the_parent_s_recipe_is_its_own_default(parent: str) -> None:
    data = blobs()
    defense = Rift({"parent": parent, "parent_settings": "ramp=0.125", "epochs": 7})
    hyper = defense.hyper(data, LINF)
    own = defense.parent(hyper).hyper(data, LINF)
    alone = type(defense.parent(hyper))({"ramp": 0.125, "epochs": 7}).hyper(data, LINF)
    assert own == alone
    assert hyper.epochs == 7


@pytest.mark.parametrize("text", ["steps", "=3", "steps=1,beta"])
def test_parent_settings_that_cannot_be_read_are_a_sentence(text: str) -> None:
    with pytest.raises(DefenseError, match="must be like steps=10,ramp=0"):
        fit(Rift({**SHORT, "parent_settings": text}), blobs())


def test_parent_settings_of_another_method_are_a_sentence() -> None:
    with pytest.raises(DefenseError, match="pgd-at has no hyper-parameter 'beta'"):
        fit(Rift({**SHORT, "parent_settings": "beta=3"}), blobs())


@pytest.mark.parametrize(
    "change",
    [{"parent": "ibp"}, {"count": 0}, {"count": 2, "modules": "all"}, {"margin": 0}, {"level": 1}, {"tuning_lr": 0}],
    ids=str,
)
def test_settings_without_meaning_are_a_sentence(change: dict[str, object]) -> None:
    with pytest.raises(DefenseError, match=r"^rift: .*\.$"):
        Rift(change).hyper(blobs(), LINF)


def test_the_margin_is_what_the_split_can_tell() -> None:
    """With 3/N, and nothing lost, the test just says yes at level 0.05."""
    assert resolvable_margin(10_000) == 0.005
    assert resolvable_margin(100) == pytest.approx(0.03)
    assert 0 < resolvable_margin(0) < 1
    assert (1 - resolvable_margin(143)) ** 143 == pytest.approx(math.exp(-3), rel=0.05)


def test_the_test_set_is_not_there_to_be_seen() -> None:
    """Only training images are tuned on and only validation images chosen on: moving one split moves one stage."""
    network, data = normalised(), blobs()
    plain = run(network)

    def relabelled(split: Split) -> Split:
        return Split(split.images, (split.labels + 1) % 3)

    moved_validation = run(network, data=dataclasses.replace(data, validation=relabelled(data.validation)))
    assert moved_validation.criticalities == plain.criticalities
    assert not torch.equal(moved_validation.outcomes[0].clean, plain.outcomes[0].clean)
    moved_training = run(network, data=dataclasses.replace(data, train=relabelled(data.train)))
    assert moved_training.criticalities != plain.criticalities
    assert torch.equal(moved_training.outcomes[0].clean, plain.outcomes[0].clean)
    assert {field.name for field in dataclasses.fields(data)} == {"name", "train", "validation", "classes"}


def test_hyper_parameters_are_recipe_and_fine_tuning() -> None:
    hyper = Rift().hyper(blobs(), LINF)
    assert isinstance(hyper, RiftHyper)
    assert (hyper.recipe.optimizer, hyper.recipe.schedule, hyper.recipe.lr) == ("sgd", "half-way", 1e-3)
    assert [learning_rate(hyper.recipe.schedule, done) for done in (0.0, 0.49, 0.5, 0.99)] == [1.0, 1.0, 0.1, 0.1]
    assert hyper.ascent.radius == 0.1
