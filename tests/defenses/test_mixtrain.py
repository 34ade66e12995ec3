"""MixTrain: its bounds against the rule written out by hand, what a mini-batch pays for, and how the weight moves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData
from robustboard.defenses.architectures import build, channel_statistics
from robustboard.defenses.batches import Batch
from robustboard.defenses.ibp import verified_cross_entropy
from robustboard.defenses.mixing import Measured, Mixing, feedback_weight, scheduled_weight
from robustboard.defenses.mixtrain import MixTrain, MixTrainHyper, mixed_objective
from robustboard.defenses.verifier import Verifier, keyed_subset
from robustboard.errors import DefenseError

if importlib.util.find_spec("auto_LiRPA") is None:
    pytest.skip("auto_LiRPA is not installed", allow_module_level=True)

LINF = ThreatModel.parse("linf", "1/10")
L2 = ThreatModel.parse("l2", "1/2")


def zonotope(layers: list[nn.Module], lower: Tensor, upper: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Symbolic intervals of one box, forward: the bounds before every ReLU, and the output (centre, rows).

    The rows are the coefficients of the inputs, each times its half-width, and one row for each unstable neuron met.
    """
    centre = ((lower + upper) / 2).unsqueeze(0)
    half = (upper - lower).flatten() / 2
    rows = torch.diag(half).view(-1, *lower.shape)
    hidden = []
    for layer in layers:
        if not isinstance(layer, nn.ReLU):
            # An affine layer moves the centre with its bias, and the rows without.
            centre, rows = layer(centre), layer(rows) - layer(torch.zeros_like(centre))
            continue
        radius = rows.abs().sum(dim=0)
        low, high = centre[0] - radius, centre[0] + radius
        hidden.append((low, high))
        below, above = low.clamp(max=0.0), torch.maximum(high.clamp(min=0.0), low.clamp(max=0.0) + 1e-8)
        slope = above / (above - below)
        unstable = (low < 0) & (high > 0)
        shift = torch.where(unstable, -slope * low / 2, torch.zeros_like(low))
        fresh = torch.diag(shift.flatten()).view(-1, *shift.shape)[unstable.flatten()]
        centre, rows = slope * centre + shift, torch.cat([slope * rows, fresh])
    return hidden, (centre[0], rows)


def lowest_margins(output: Any, label: int) -> Tensor:
    """Lower bounds on z_y - z_j for j != y: the true class is subtracted before the radius is taken."""
    centre, rows = output
    others = [j for j in range(len(centre)) if j != label]
    return (centre[label] - centre[others]) - (rows[:, [label]] - rows[:, others]).abs().sum(dim=0)


@pytest.mark.parametrize("name", ["mlp-20-15", "cnn-small"])
@pytest.mark.parametrize("colour", [False, True])
def test_symbolic_bounds_are_the_zonotope_s(name: str, colour: bool) -> None:
    """Every bound before a ReLU and every margin equal the forward rule of the authors' library, to 1e-5."""
    shape, draws = (3 if colour else 1, 8, 8), torch.Generator().manual_seed(0)
    images, labels = torch.rand(3, *shape, generator=draws), torch.tensor([0, 3, 1])
    normalize = channel_statistics(torch.rand(20, *shape, generator=draws)) if colour else None
    model = build(name, image_shape=shape, classes=4, seed=0, normalize=normalize)
    lower, upper = (images - 0.05).clamp(min=0.0), (images + 0.05).clamp(max=1.0)
    network = BoundedNetwork(model, images[:1], classes=4, slope="same")
    margins = network.margins(labels, lower=lower, upper=upper, method="crown")
    nodes = [node for node in network.network.modules() if type(node).__name__ == "BoundRelu"]
    unstable = 0
    for place, label in enumerate(labels.tolist()):
        hidden, output = zonotope(list(model), lower[place], upper[place])
        torch.testing.assert_close(margins[place], lowest_margins(output, label), atol=1e-5, rtol=1e-5)
        assert len(nodes) == len(hidden) >= 2
        for node, (low, high) in zip(nodes, hidden, strict=True):
            torch.testing.assert_close(node.inputs[0].lower[place], low, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(node.inputs[0].upper[place], high, atol=1e-5, rtol=1e-5)
            unstable += int(((low < 0) & (high > 0)).sum())
    assert unstable > 20, "or the slopes were not compared"


def test_the_authors_schedule() -> None:
    """0.1 for the ramp and five epochs more, then 2.5 times as much every five epochs, up to 50 (S = 10 of 60)."""
    weights = [scheduled_weight(epoch / 60, ramp=10 / 60, interval=5 / 60) for epoch in range(60)]
    assert weights[:15] == [0.1] * 15
    assert weights[15:45:5] == pytest.approx([0.25, 0.625, 1.5625, 3.90625, 9.765625, 24.4140625])
    assert weights[45:] == [50.0] * 15
    assert all(weights[start : start + 5] == [weights[start]] * 5 for start in range(0, 60, 5))
    assert scheduled_weight(0.99, ramp=10 / 60, interval=5 / 60, largest=5) == 5
    assert scheduled_weight(0.99, ramp=1e-3, interval=1e-3) == 50, "however many steps"


@pytest.mark.parametrize(
    ("weight", "accuracy_now", "best", "verified", "before", "after"),
    [
        (0.5, 0.944, 0.950, 0.4, 0.3, 0.4),  # accuracy fell by more than half a point
        (0.5, 0.944, 0.950, 0.2, 0.3, 0.4),  # ... which comes first, though verified accuracy fell too
        (0.15, 0.900, 0.950, 0.4, 0.3, 0.1),  # never below a tenth
        (0.5, 0.946, 0.950, 0.3, 0.3, 0.6),  # accuracy held, verified accuracy did not rise
        (0.85, 0.950, 0.950, 0.2, 0.3, 0.9),  # never above nine tenths
        (0.5, 0.950, 0.940, 0.4, 0.3, 0.5),  # both rose
    ],
)
def test_the_feedback_rule(
    weight: float, accuracy_now: float, best: float, verified: float, before: float, after: float
) -> None:
    now = Measured(accuracy_now, verified)
    assert feedback_weight(weight, now=now, best_accuracy=best, verified_before=before) == after


def mixing(rule: Any, measured: list[Measured] | None = None, **options: Any) -> Mixing:
    answers = iter(measured or [])
    settings = {"ramp": 0.25, "interval": 0.25, "largest": 50.0, "epochs": 4} | options
    return Mixing(rule, measure=lambda: next(answers), **settings)


def test_feedback_begins_after_the_ramp_and_tells_what_it_did() -> None:
    """The epoch of the ramp changes nothing; each later epoch is logged with the weight that it used."""
    seen = [Measured(0.99, 0.0), Measured(0.90, 0.3), Measured(0.90, 0.3), Measured(0.80, 0.5)]
    controller = mixing("feedback", seen)
    told = [dict(controller.epoch_end(epoch)) for epoch in (1, 2, 3, 4)]
    assert [row["weight"] for row in told] == [0.5, 0.5, 0.5, 0.6]
    assert [(row["accuracy"], row["verified"]) for row in told] == [(now.accuracy, now.verified) for now in seen]
    assert controller.weights(1.0) == (0.5, 0.5), "accuracy fell from the best after the ramp, not from that within it"


def test_the_schedule_pays_no_heed_and_adds() -> None:
    controller = mixing("schedule", [Measured(0.1, 0.0)] * 4)
    assert [controller.epoch_end(epoch)["weight"] for epoch in (1, 2, 3, 4)] == pytest.approx([0.1, 0.1, 0.25, 0.625])
    assert controller.weights(0.0) == (1.0, 0.1)


def test_a_restored_controller_goes_on_as_it_would_have() -> None:
    seen = [Measured(0.9, 0.1), Measured(0.92, 0.2), Measured(0.9, 0.3), Measured(0.9, 0.3), Measured(0.92, 0.3)]
    whole = mixing("feedback", seen, epochs=5)
    expected = [whole.epoch_end(epoch) for epoch in range(1, 6)]
    first = mixing("feedback", seen[:3], epochs=5)
    for epoch in (1, 2, 3):
        first.epoch_end(epoch)
    second = mixing("feedback", seen[3:], epochs=5)
    second.restore(first.state())
    assert [second.epoch_end(epoch) for epoch in (4, 5)] == expected[3:]
    assert second.state() == whole.state()


def data_of(count: int = 40, shape: tuple[int, int, int] = (1, 6, 6)) -> TrainingData:
    """Three classes, told by where an image is bright."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.4 * torch.rand(count, *shape, generator=draws)
    for place, label in enumerate(labels.tolist()):
        images[place, :, 2 * label : 2 * label + 2] += 0.5
    return TrainingData("stripes", Split(images[12:], labels[12:]), Split(images[:12], labels[:12]), 3)


def hyper_of(**changes: Any) -> MixTrainHyper:
    return MixTrainHyper(architecture="mlp-12", epochs=6, **changes)


class Spy(Verifier):
    """Notes what is bounded."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[Tensor, Tensor, float]] = []

    def margins(self, images: Tensor, labels: Tensor, *, growth: float = 1.0) -> Tensor:
        self.seen.append((images, labels, growth))
        return super().margins(images, labels, growth=growth)


def spied(hyper: MixTrainHyper) -> tuple[nn.Sequential, Spy, Callable[[Batch], Tensor], TrainingData]:
    data = data_of()
    model = build("mlp-12", image_shape=(1, 6, 6), classes=3, seed=0)
    spy = Spy(model, data, LINF, bound=hyper.bound)
    controller = Mixing(
        "schedule",
        ramp=hyper.ramp,
        interval=hyper.interval,
        largest=hyper.largest,
        epochs=6,
        measure=lambda: Measured(0, 0),
    )
    return model, spy, mixed_objective(model, spy, controller, hyper), data


def batch_at(done: float, data: TrainingData, draws: torch.Generator | None = None) -> Batch:
    return Batch(data.train.images, data.train.labels, done, draws or generator("draws"))


def test_only_k_points_are_bounded_and_the_clean_loss_has_all() -> None:
    """CE over the mini-batch, plus w times the verified cross-entropy of k of its points."""
    model, spy, loss, data = spied(hyper_of(sampled=3, alpha=1.0))
    value = loss(batch_at(0.9, data))
    value.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in model.parameters())
    ((images, labels, growth),) = spy.seen
    assert (len(images), growth) == (3, 1.0)
    for image, label in zip(images, labels, strict=True):
        places = (data.train.images == image).flatten(1).all(dim=1).nonzero().flatten()
        assert data.train.labels[places].tolist() == [label]
    network = BoundedNetwork(model, images[:1], classes=3, slope="same")
    box = {"lower": (images - LINF.radius).clamp(min=0.0), "upper": (images + LINF.radius).clamp(max=1.0)}
    verified = verified_cross_entropy(network.margins(labels, **box, method="crown"))
    clean = functional.cross_entropy(model(data.train.images), data.train.labels)
    weight = scheduled_weight(0.9, ramp=1 / 6, interval=1 / 12)
    assert value.item() == pytest.approx((clean + weight * verified).item(), rel=1e-5)


def test_points_are_drawn_uniformly_with_replacement() -> None:
    """Over many mini-batches every point is drawn about equally often, and some are drawn twice at once."""
    hyper = hyper_of(sampled=4, alpha=1.0)
    _, spy, loss, data = spied(hyper)
    draws, rounds = generator("many"), 150
    for _ in range(rounds):
        loss(batch_at(0.5, data, draws))
    counts, twice = torch.zeros(len(data.train)), 0
    for images, _, _ in spy.seen:
        places = (images[:, None] == data.train.images[None]).flatten(2).all(dim=2).nonzero()[:, 1]
        counts += torch.bincount(places, minlength=len(counts))
        twice += len(places.unique()) < len(places)
    expected = 4 * rounds / len(counts)
    # Poisson-like counts: chi-squared per degree of freedom, whose 99.9 % point for 27 degrees is about 2.
    assert float(((counts - expected) ** 2 / expected).mean()) < 2.0
    assert twice > 0.1 * rounds, "six pairs of 28 points: one draw in five has a repeat"


@pytest.mark.parametrize(("alpha", "expected"), [(0.8, 160), (0.3, 60), (1.0, 200)])
def test_alpha_is_how_often_a_mini_batch_is_bounded(alpha: float, expected: int) -> None:
    _, spy, loss, data = spied(hyper_of(sampled=1, alpha=alpha))
    draws = generator("coins")
    for _ in range(200):
        loss(batch_at(0.5, data, draws))
    assert abs(len(spy.seen) - expected) <= 4 * (200 * alpha * (1 - alpha)) ** 0.5


def test_the_radius_grows_linearly_over_the_ramp() -> None:
    model, spy, loss, data = spied(hyper_of(sampled=1, alpha=1.0, ramp=0.5))
    assert loss(batch_at(0.0, data)).item() == pytest.approx(
        functional.cross_entropy(model(data.train.images), data.train.labels).item()
    )
    for done in (0.125, 0.25, 0.5, 0.9):
        loss(batch_at(done, data))
    assert [growth for _, _, growth in spy.seen] == [0.25, 0.5, 1.0, 1.0]


def test_the_cheap_bound_is_crown_ibp() -> None:
    """Named for what it is: the margins are CROWN-IBP's, not the symbolic ones."""
    model, data = build("mlp-12-12", image_shape=(1, 6, 6), classes=3, seed=0), data_of()
    images, labels = data.train.images[:4], data.train.labels[:4]
    box = {"lower": (images - LINF.radius).clamp(min=0.0), "upper": (images + LINF.radius).clamp(max=1.0)}
    expected = BoundedNetwork(model, images[:1], classes=3).margins(labels, **box, method="crown-ibp")
    cheap = Verifier(model, data, LINF, bound="crown-ibp").margins(images, labels)
    symbolic = Verifier(model, data, LINF, bound="sym").margins(images, labels)
    torch.testing.assert_close(cheap, expected)
    assert not torch.allclose(cheap, symbolic, atol=1e-3)


@pytest.mark.parametrize("bound", ["sym", "crown-ibp"])
@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_margins_hold_over_the_ball(threat: ThreatModel, bound: Any) -> None:
    data = data_of()
    model = build("mlp-12-12", image_shape=(1, 6, 6), classes=3, seed=0)
    images, labels = data.train.images[:8], data.train.labels[:8]
    bounds = Verifier(model, data, threat, bound=bound).margins(images, labels)
    draws = torch.Generator().manual_seed(1)
    for _ in range(40):
        noise = torch.randn(images.shape, generator=draws)
        points = threat.start(images, noise.sign() if threat.norm == "linf" else noise)
        with torch.no_grad():
            logits = model(points)
        others = torch.arange(3).expand(8, 3) != labels[:, None]
        margins = logits.gather(1, labels[:, None]) - logits[others].view(8, 2)
        assert bool((margins >= bounds - 1e-5).all())


def test_only_what_is_classified_correctly_is_verified() -> None:
    """Proved means proved for the label: of a trained network many are, and with other labels none is."""
    data = data_of()
    model = registry.create("mixtrain", {"architecture": "mlp-12", "epochs": 20, "batch_size": 10}).fit(
        data, LINF, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )
    verifier, told = Verifier(model, data, LINF, bound="sym"), []
    verified = verifier.verified(data.train, on_examples=told.append)
    with torch.no_grad():
        correct = model(data.train.images).argmax(dim=1) == data.train.labels
        proved = (verifier.margins(data.train.images, data.train.labels) > 0).all(dim=1)
    assert verified.tolist() == proved.tolist()
    assert sum(told) == len(data.train)
    assert bool((correct | ~verified).all())
    assert verified.float().mean() > 0.3
    assert not verifier.verified(Split(data.train.images, (data.train.labels + 1) % 3)).any()
    assert verifier.verified(Split(data.train.images[:0], data.train.labels[:0])).shape == (0,)


def test_the_measured_images_follow_from_their_pixels() -> None:
    """Another order of the split, and the same images are measured."""
    held = data_of(400).train
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    first, second = keyed_subset(held, 50), keyed_subset(Split(held.images[order], held.labels[order]), 50)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert len(keyed_subset(held, 10_000)) == len(held)
    assert not torch.equal(first.images, held.images[:50])


class Heard(NoProgress):
    def __init__(self, kill_at: int | None = None) -> None:
        self.notes: list[dict[str, float]] = []
        self.kill_at, self.steps = kill_at, 0

    def advance(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps == self.kill_at:
            raise KeyboardInterrupt

    def note(self, **values: float) -> None:
        self.notes.append(values)


def trained(progress: Heard, folder: Path | None = None, **overrides: Any) -> nn.Module:
    settings = {"architecture": "mlp-12", "epochs": 8, "batch_size": 10, "measured": 12, **overrides}
    return registry.create("mixtrain", settings).fit(
        data_of(), LINF, seed=0, device=torch.device("cpu"), progress=progress, checkpoints=CheckpointStore(folder)
    )


def test_a_killed_feedback_training_keeps_its_weight(tmp_path: Path) -> None:
    """The weight of epoch six depends on what epochs three to five measured; a resumed training knows."""
    whole, killed, resumed = Heard(), Heard(kill_at=5 * 3 + 1), Heard()
    expected = trained(whole, mixing="feedback")
    with pytest.raises(KeyboardInterrupt):
        trained(killed, tmp_path, mixing="feedback")
    model = trained(resumed, tmp_path, mixing="feedback")
    assert killed.notes + resumed.notes == whole.notes
    assert len({note["weight"] for note in whole.notes}) > 1, "or there was nothing to keep"
    for first, second in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(first, second)


def test_every_epoch_tells_weight_accuracy_and_verified_accuracy() -> None:
    heard = Heard()
    trained(heard)
    assert [note["epoch"] for note in heard.notes] == list(range(1, 9))
    assert all(0 <= note["verified"] <= note["accuracy"] <= 1 for note in heard.notes)
    assert heard.notes[0]["weight"] == pytest.approx(0.1)
    assert heard.notes[-1]["weight"] == 50.0


def test_defaults_follow_the_authors_and_fit_one_core() -> None:
    """Shares of their sixty epochs: a ramp of ten, steps of five; two points of a mini-batch where bounds are dear."""
    split = Split(torch.rand(60, 1, 28, 28), torch.arange(60) % 10)
    large = MixTrain().defaults(TrainingData("any", split, split, 10), LINF)
    assert (large.sampled, large.alpha, large.weight_decay, large.largest) == (2, 0.8, 1e-4, 5)
    assert (60 * large.ramp, 60 * large.interval) == pytest.approx((10, 5))
    small = MixTrain().defaults(data_of(), LINF)
    assert (small.sampled, small.epochs, small.bound, small.mixing, small.largest) == (6, 60, "sym", "schedule", 50)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampled": 0}, "sampled and measured must be at least 1"),
        ({"measured": 0}, "sampled and measured must be at least 1"),
        ({"alpha": 0}, "alpha must be a probability above 0"),
        ({"alpha": 1.5}, "alpha must be a probability above 0"),
        ({"ramp": 0}, "must be shares of the training"),
        ({"interval": 2}, "must be shares of the training"),
        ({"largest": 0}, "largest must be positive"),
        ({"mixing": "random"}, "one of schedule, feedback"),
        ({"bound": "crown"}, "one of sym, crown-ibp"),
    ],
)
def test_a_bad_hyper_parameter_is_refused_in_a_sentence(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DefenseError, match=says):
        registry.create("mixtrain", change).hyper(data_of(), LINF)


@pytest.mark.slow
def test_verified_accuracy_on_mnist_rises_from_nothing_to_sixty_percent(data_file: Callable[[str], Path]) -> None:
    """The network that an epoch of clean training leaves proves nothing; minutes of MixTrain prove most digits."""
    from robustboard.bench.claims.laboratory import Laboratory

    folder = data_file("mnist.npz").parent
    setup = Laboratory(Path("unused"), data_dirs=(folder,)).setup("mnist-linf@1")
    options = {"seed": 0, "device": torch.device("cpu"), "checkpoints": CheckpointStore()}
    plain = registry.create("standard", {"epochs": 1}).fit(setup.data, LINF, progress=NoProgress(), **options)  # type: ignore[arg-type]
    test = Split(setup.test.images[:200], setup.test.labels[:200])
    assert not Verifier(plain, setup.data, LINF, bound="sym").verified(test).any()
    heard = Heard()
    model = registry.create("mixtrain").fit(setup.data, LINF, progress=heard, **options)  # type: ignore[arg-type]
    assert Verifier(model, setup.data, LINF, bound="sym").verified(test).float().mean() > 0.6
    assert heard.notes[-1]["verified"] > 0.6
