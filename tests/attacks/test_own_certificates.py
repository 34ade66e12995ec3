"""The board's own certificate: recognised by type alone, below every margin that exists, and tight."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks import autoattack, keyed, trust_region
from robustboard.attacks.counting import PassCounter
from robustboard.attacks.own_certificates import METHODS, applicable, certify
from robustboard.attacks.pgd import ascend, pgd
from robustboard.attacks.proofs import TOLERANCE, Bounds
from robustboard.attacks.quadratic import QuadraticNetwork, margin_forms
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError

LINF, L2 = ThreatModel.parse("linf", "1/20"), ThreatModel.parse("l2", "3/10")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quadratic(hidden: int = 12, inputs: int = 16, classes: int = 5) -> QuadraticNetwork:
    """Centred on the middle of the pixel box, where no class leads by much."""
    directions, outputs = 3 * drawn(hidden, inputs) / inputs**0.5, drawn(hidden, classes, seed=1)
    offsets = drawn(hidden, seed=2) / 5 - directions.sum(dim=1) / 2
    return QuadraticNetwork(directions, outputs - outputs.mean(dim=0), offsets=offsets).eval()


def bounded(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, classes: int = 5) -> Bounds:
    return certify(model, images, labels, threat=threat, method="quadratic", classes=classes)


def pictures(count: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


class Digits:
    """A quadratic network on the digits, trained against PGD as it is by default, and test images."""

    def __init__(self, threat: ThreatModel) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images / 16).float().unsqueeze(1)
        labels = torch.from_numpy(data.target).long()
        self.threat, self.images, self.labels = threat, images[1500:1600], labels[1500:1600]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(
                nn.Flatten(), QuadraticNetwork(torch.randn(30, 64) / 8, torch.randn(30, 10) / 10)
            )
            optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
            for _ in range(14):
                for rows in torch.randperm(1500).split(128):
                    noise = torch.rand(len(rows), 1, 8, 8) * 2 - 1
                    start = threat.start(images[rows], noise)
                    step = threat.radius / 2
                    hard = ascend(
                        self.model, images[rows], labels[rows], threat=threat, start=start, steps=4, step_size=step
                    )
                    optimizer.zero_grad()
                    functional.cross_entropy(self.model(hard), labels[rows]).backward()
                    optimizer.step()
        self.model.eval()

    def certified(self) -> Bounds:
        return bounded(self.model, self.images, self.labels, self.threat, classes=10)


@pytest.fixture(scope="module", params=[("linf", "1/10"), ("l2", "2/5")], ids=["linf", "l2"])
def digits(request: pytest.FixtureRequest) -> Digits:
    return Digits(ThreatModel.parse(*request.param))


class Same(QuadraticNetwork):
    pass


class Stronger(QuadraticNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(part: int) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), quadratic())
    model[part].register_forward_hook(lambda module, inputs, output: output)
    return model


def _with(change: Callable[[nn.Sequential], object]) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Identity(), quadratic())
    change(model)
    return model


def _named() -> nn.Module:
    impostor = type("QuadraticNetwork", (nn.Module,), {"forward": lambda self, x: x.flatten(1)[:, :5]})
    impostor.__module__ = QuadraticNetwork.__module__
    return nn.Sequential(nn.Flatten(), impostor())


RECOGNISED: dict[str, Callable[[], nn.Module]] = {
    "alone": quadratic,
    "flattened": lambda: nn.Sequential(nn.Flatten(), quadratic()),
    "identities": lambda: nn.Sequential(nn.Identity(), nn.Flatten(), nn.Identity(), quadratic()),
    "frozen": lambda: nn.Sequential(quadratic().requires_grad_(requires_grad=False)),
    "loaded": lambda: _with(lambda model: model.load_state_dict(model.state_dict())),
}
REFUSED: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: Same(torch.ones(2, 16), torch.ones(2, 5)),
    "a subclass with another forward": lambda: nn.Sequential(Stronger(torch.ones(2, 16), torch.ones(2, 5))),
    "a namesake": _named,
    "a hook on the container": lambda: _with(lambda model: model.register_forward_hook(lambda *args: None)),
    "a hook on a part": lambda: _hooked(0),
    "a hook on the network": lambda: _hooked(1),
    "a pre-hook": lambda: _with(lambda model: model[2].register_forward_pre_hook(lambda *args: None)),
    "a backward hook": lambda: _with(lambda model: model[2].register_full_backward_hook(lambda *args: None)),
    "a forward of the instance": lambda: _with(lambda model: setattr(model[2], "forward", lambda x: x[:, :5])),
    "an attribute": lambda: _with(lambda model: setattr(model[1], "scale", 2)),
    "a compiled call": lambda: _with(lambda model: setattr(model, "_compiled_call_impl", lambda x: x[:, :5])),
    "a further layer": lambda: nn.Sequential(quadratic(), nn.Identity()),
    "a layer before": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 16), quadratic()),
    "a container inside": lambda: nn.Sequential(nn.Sequential(nn.Flatten()), quadratic()),
    "a flatten of the batch": lambda: nn.Sequential(nn.Flatten(0), quadratic()),
    "a subclass of a container": lambda: type("Custom", (nn.Sequential,), {})(quadratic()),
    "a further buffer": lambda: _with(lambda model: model[2].register_buffer("more", torch.ones(1))),
    "a further part": lambda: _with(lambda model: model[2].add_module("more", nn.Identity())),
    "a parametrization": lambda: _with(
        lambda model: nn.utils.parametrize.register_parametrization(model[2], "outputs", nn.Identity())
    ),
    "a parameter of its own type": lambda: _with(
        lambda model: setattr(model[2], "outputs", type("Own", (nn.Parameter,), {})(torch.ones(12, 5)))
    ),
    "nothing": nn.Sequential,
    "another network": lambda: nn.Linear(16, 5),
}


@pytest.mark.parametrize("make", RECOGNISED.values(), ids=RECOGNISED)
def test_a_quadratic_network_is_recognised(make: Callable[[], nn.Module]) -> None:
    assert applicable(make()) == METHODS == ("quadratic",)


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_might_compute_something_else_is_not(make: Callable[[], nn.Module]) -> None:
    assert applicable(make()) == ()


def test_a_network_that_is_not_quadratic_has_no_certificate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    found = bounded(model, pictures(4), torch.zeros(4, dtype=torch.long), LINF)
    assert found.reason == "The quadratic certificate is for quadratic networks alone, which this is not."
    assert not found.certified.any()
    with pytest.raises(BoundsError, match="'crown' is not one of quadratic"):
        certify(model, pictures(1), torch.zeros(1, dtype=torch.long), threat=LINF, method="crown", classes=5)


def test_code_that_differs_from_the_parameters_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded is the formula, and the module's own logits are compared with it."""
    model, images = quadratic(), pictures(8)
    forward = QuadraticNetwork.forward
    monkeypatch.setattr(QuadraticNetwork, "forward", lambda self, x: 1.01 * forward(self, x))
    found = bounded(model, images, model(images).argmax(dim=1), LINF)
    assert found.reason == "The network computes other logits than its parameters say, so it is not bounded."
    assert not found.certified.any()


def test_bounds_above_a_margin_that_exists_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trust_region.minimum

    def wrong(*args: Tensor) -> trust_region.TrustRegion:
        found = honest(*args)
        return trust_region.TrustRegion(found.value, found.point, found.bound + 5)

    monkeypatch.setattr(trust_region, "minimum", wrong)
    model, images = quadratic(), pictures(8)
    found = bounded(model, images, model(images).argmax(dim=1), L2)
    assert found.reason is not None
    assert "contradict" in found.reason


def test_classes_that_do_not_fit_and_weights_that_are_not_finite_are_reasons() -> None:
    model, images = quadratic(), pictures(3)
    labels = model(images).argmax(dim=1)
    assert bounded(model, images, labels, LINF, classes=7).reason == "The quadratic network has 5 classes, not 7."
    with torch.no_grad():
        model.directions[0, 0] = torch.inf
    assert not bounded(model, images, labels, LINF).certified.any()


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("hidden", [3, 12, 40])
def test_no_allowed_input_has_a_smaller_margin(threat: ThreatModel, hidden: int) -> None:
    model, images = nn.Sequential(nn.Flatten(), quadratic(hidden)).eval(), pictures()
    labels = model(images).argmax(dim=1)
    found = bounded(model, images, labels, threat)
    assert found.reason is None
    lowest = torch.full((40, 5), torch.inf)
    for rival in range(5):
        point = images.clone()
        for _ in range(40):
            point.requires_grad_()
            logits = model(point)
            margins = logits.gather(1, labels[:, None]) - logits
            lowest = torch.minimum(lowest, margins.detach())
            (gradient,) = torch.autograd.grad(margins[:, rival].sum(), point)
            length = gradient.flatten(1).norm(dim=1).clamp(min=1e-9).view(-1, 1, 1, 1)
            uphill = gradient.sign() if threat.norm == "linf" else gradient / length
            point = threat.project(point.detach() - threat.radius / 5 * uphill, images)
    rivals = ~functional.one_hot(labels, 5).bool()
    assert bool((found.margins[rivals] <= lowest[rivals] + 1e-5).all())
    assert bool((found.margins[~rivals] == torch.inf).all())
    assert 0 < int(found.certified.sum()) < 40
    smallest = lowest.masked_fill(~rivals, torch.inf).amin(dim=1)
    assert bool((smallest[found.certified] > 0).all())
    tight = found.certified | (smallest < 1e-3)
    assert tight.double().mean() > 0.9, "little lies between what is proved and what a descent breaks"


def test_certificates_of_a_trained_network_hold_against_pgd_and_autoattack(digits: Digits) -> None:
    found = digits.certified()
    rows = found.certified.nonzero().flatten()
    assert len(rows) > 30
    images, labels, threat = digits.images[rows], digits.labels[rows], digits.threat
    keys = [keyed.content_hash(image.numpy()) for image in images]
    size = threat.radius / 8
    attacked = [
        pgd(digits.model, images, labels, threat=threat, keys=keys, seed=0, steps=30, restarts=2, step_size=size),
        *(
            autoattack.run_stage(
                digits.model, images, labels, threat=threat, stage=stage, seed=0, batch_size=100, classes=10
            ).adversarial
            for stage in ("apgd_ce", "apgd_t")
        ),
    ]
    for adversarial in attacked:
        logits = digits.model(adversarial)
        assert bool((logits.argmax(dim=1) == labels).all())
        margins = (logits.gather(1, labels[:, None]) - logits).scatter(1, labels[:, None], torch.inf)
        assert bool((margins.amin(dim=1) >= found.margins[rows].amin(dim=1) - 1e-4).all())


def test_little_is_left_undecided_on_a_trained_network(digits: Digits) -> None:
    model, threat = digits.model, digits.threat
    point = ascend(
        model,
        digits.images,
        digits.labels,
        threat=threat,
        start=digits.images,
        steps=60,
        step_size=threat.radius / 8,
        loss="margin",
    )
    survives = (model(point).argmax(dim=1) == digits.labels) & (model(digits.images).argmax(dim=1) == digits.labels)
    certified = digits.certified().certified
    assert bool((survives | ~certified).all())
    # The L2 ball is not intersected with the pixel box, where most pixels of a digit lie on an edge.
    assert int((survives & ~certified).sum()) <= (3 if threat.norm == "linf" else 20)


def test_an_l2_certificate_is_exact() -> None:
    """At the minimiser, an allowed point where the box does not cut the ball, the margin is the bound."""
    model, images = quadratic(), 0.4 + 0.2 * pictures()
    threat = ThreatModel.parse("l2", "1/5")
    labels = model(images).argmax(dim=1)
    found = bounded(model, images, labels, threat)
    seen = torch.full((40, 5), torch.inf, dtype=torch.float64)
    wide = quadratic().double()
    for label, rival in torch.cartesian_prod(torch.arange(5), torch.arange(5)).tolist():
        rows = (labels == label).nonzero().flatten()
        if label == rival or not len(rows):
            continue
        forms = margin_forms(model, torch.tensor([[label, rival]]))
        least = trust_region.minimum(forms.curvatures[:, None], forms.slopes(images[rows]), 0.2)
        moved = images[rows].double() + forms.perturbation(least.point)[0].view(-1, 1, 4, 4)
        assert bool(((moved >= 0) & (moved <= 1)).all())
        logits = wide(moved)
        seen[rows, rival] = logits[:, label] - logits[:, rival]
    torch.testing.assert_close(found.margins.double(), seen, rtol=1e-6, atol=1e-6)
    assert bool((found.margins.double() <= seen).all())


def test_margins_of_misclassified_examples_are_unknown() -> None:
    model, images = quadratic(), pictures()
    labels = model(images).argmin(dim=1)
    found = bounded(model, images, labels, LINF)
    assert not found.certified.any()
    rivals = ~functional.one_hot(labels, 5).bool()
    assert bool((found.margins[rivals] == -torch.inf).all())


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_an_example_does_not_depend_on_the_others(threat: ThreatModel) -> None:
    model, images = quadratic(), pictures(12)
    labels = model(images).argmax(dim=1)
    together = bounded(model, images, labels, threat)
    alone = [bounded(model, images[i : i + 1], labels[i : i + 1], threat) for i in range(12)]
    assert torch.equal(together.certified, torch.cat([one.certified for one in alone]))
    torch.testing.assert_close(together.margins, torch.cat([one.margins for one in alone]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fewer_examples_are_certified_as_the_ball_grows(norm: str) -> None:
    model, images = quadratic(), pictures()
    labels = model(images).argmax(dim=1)
    base = Fraction(1, 100) if norm == "linf" else Fraction(1, 30)
    certified = [bounded(model, images, labels, ThreatModel(norm, base * k)).certified for k in (1, 2, 4, 8, 16)]
    for smaller, larger in itertools.pairwise(certified):
        assert bool((smaller | ~larger).all())
    assert int(certified[0].sum()) > int(certified[-1].sum())


def test_a_margin_within_float32_rounding_is_not_certified() -> None:
    """sigma(t) - sigma(-t) = 2 b t makes a linear network, whose margin x - threshold + eps is known exactly."""
    threat = ThreatModel.parse("linf", "1/8")
    directions, outputs = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    network = QuadraticNetwork(directions, outputs, coefficients=(0.09, 0.5, 0.0)).eval()
    margins = torch.tensor([TOLERANCE / 2, TOLERANCE * 1.5, 0.1])
    images = (0.125 + margins).view(3, 1, 1, 1)  # the least margin is x - 1/8
    found = bounded(network, images, torch.zeros(3, dtype=torch.long), threat, classes=2)
    torch.testing.assert_close(found.margins[:, 1], margins, rtol=0, atol=1e-6)
    assert found.certified.tolist() == [False, True, True]


def test_weights_that_cancel_leave_nothing_certified() -> None:
    """Neurons of size 1e8 that cancel: float32 logits are noise, whatever the formula says in float64."""
    direction = 1e3 * drawn(1, 16)
    directions = torch.cat([direction, direction * (1 + 1e-6)])
    outputs = torch.tensor([[1e3, 0.0], [-1e3, 0.0]])
    model, images = QuadraticNetwork(directions, outputs).eval(), pictures(30)
    labels = model(images).argmax(dim=1)
    found = bounded(model, images, labels, ThreatModel.parse("linf", "1/100000"), classes=2)
    assert not found.certified.any()


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
def test_passes_are_counted_and_examples_told(threat: ThreatModel) -> None:
    model, images, told = nn.Sequential(nn.Flatten(), quadratic()).eval(), pictures(10), []
    labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 5
    with PassCounter(model) as counter:
        found = certify(model, images, labels, threat=threat, method="quadratic", classes=5, on_examples=told.append)
    assert found.reason is None
    assert sum(told) == 10
    assert counter.forwards == 10 + 9 * (1 if threat.norm == "l2" else 3)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), quadratic()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bounded(model, pictures(5), model(pictures(5)).argmax(dim=1), LINF)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_notes_say_what_is_bounded() -> None:
    model, images = quadratic(), pictures(3)
    labels = model(images).argmax(dim=1)
    assert "does not intersect with the pixel box" in bounded(model, images, labels, L2).notes[0]
    assert "Shor's relaxation" in bounded(model, images, labels, LINF).notes[0]
