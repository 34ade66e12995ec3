"""A quadratic network computes its formula, and its margins are exactly the quadratics that are said."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.bounds import certify
from robustboard.attacks.quadratic import RELU_FIT, QuadraticNetwork, margin_forms
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError

PAIRS = torch.tensor([[0, 1], [2, 0], [3, 2]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(hidden: int, inputs: int, classes: int = 4, **more: tuple[float, float, float]) -> QuadraticNetwork:
    directions = drawn(hidden, inputs) / inputs**0.5
    return QuadraticNetwork(directions, drawn(hidden, classes, seed=1), offsets=drawn(hidden, seed=2), **more).eval()


def margins(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x).T
    return (logits[PAIRS[:, 0]] - logits[PAIRS[:, 1]]).detach()


@pytest.mark.parametrize("coefficients", [RELU_FIT, (1.0, 0.0, 0.0), (-0.3, 0.2, 1.0)])
def test_logits_follow_the_formula(coefficients: tuple[float, float, float]) -> None:
    model, x = network(7, 12, coefficients=coefficients), drawn(5, 12, seed=3)
    a, b, c = coefficients
    t = x.double() @ model.directions.double().T + model.offsets.double()
    expected = (a * t**2 + b * t + c) @ model.outputs.double()
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x.view(5, 3, 2, 2)), model(x))


def test_offsets_are_zero_unless_given() -> None:
    plain = QuadraticNetwork(drawn(3, 5), drawn(3, 2, seed=1))
    assert not plain.offsets.any()


def test_every_parameter_is_trained_and_saved() -> None:
    model = network(3, 5)
    model(drawn(2, 5)).sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad.abs().sum() > 0} == {
        *("directions", "offsets", "outputs")
    }
    other = QuadraticNetwork(torch.zeros(3, 5), torch.zeros(3, 4), coefficients=(1.0, 1.0, 1.0))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(drawn(2, 5)), model(drawn(2, 5)))


@pytest.mark.parametrize(
    ("directions", "outputs", "offsets"),
    [((3, 5), (4, 2), (3,)), ((3, 5), (3, 2), (4,)), ((3,), (3, 2), (3,)), ((3, 5), (3,), (3,))],
)
def test_shapes_that_do_not_fit_are_one_sentence(
    directions: tuple[int, ...], outputs: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    with pytest.raises(ModelError, match="needs directions"):
        QuadraticNetwork(torch.zeros(directions), torch.zeros(outputs), offsets=torch.zeros(offsets))


@pytest.mark.parametrize("coefficients", [(0.0, 1.0, 0.0), (float("nan"), 1.0, 0.0), (1.0, float("inf"), 0.0)])
def test_an_activation_without_a_square_is_refused(coefficients: tuple[float, float, float]) -> None:
    with pytest.raises(ModelError, match="a not zero"):
        QuadraticNetwork(torch.zeros(1, 1), torch.zeros(1, 1), coefficients=coefficients)


@pytest.mark.parametrize(("hidden", "inputs"), [(5, 12), (12, 5), (1, 6), (6, 6)], ids=str)
@pytest.mark.parametrize("coefficients", [RELU_FIT, (-0.7, 0.1, 0.0)])
def test_margins_at_any_perturbation_are_those_of_the_network(
    hidden: int, inputs: int, coefficients: tuple[float, float, float]
) -> None:
    model = network(hidden, inputs, coefficients=coefficients)
    forms, x, delta = margin_forms(model, PAIRS), drawn(6, inputs, seed=4), drawn(6, inputs, seed=5).double()
    t = torch.einsum("nd,dr,prs->pns", delta, forms.basis, forms.axes)
    by_form = forms.values(x) + (forms.curvatures[:, None] * t.square() + forms.slopes(x) * t).sum(-1)
    torch.testing.assert_close(by_form, margins(model.double(), x.double() + delta), rtol=1e-12, atol=1e-12)
    assert forms.curvatures.shape == (3, min(hidden, inputs))


def test_images_are_flattened_as_the_network_flattens_them() -> None:
    model, images = network(6, 12), torch.rand(4, 3, 2, 2)
    forms = margin_forms(model, PAIRS)
    torch.testing.assert_close(forms.values(images).float(), margins(model, images))
    torch.testing.assert_close(forms.slopes(images), forms.slopes(images.flatten(1)))


def test_slopes_are_the_gradient_and_lie_in_the_span_of_the_directions() -> None:
    model = network(5, 12).double()
    x = drawn(4, 12, seed=4).double().requires_grad_()
    forms = margin_forms(model, PAIRS)
    for pair, (label, rival) in enumerate(PAIRS.tolist()):
        logits = model(x)
        (gradient,) = torch.autograd.grad((logits[:, label] - logits[:, rival]).sum(), x)
        torch.testing.assert_close(forms.perturbation(forms.slopes(x.detach()))[pair], gradient)


def test_perturbations_keep_their_length() -> None:
    forms = margin_forms(network(5, 12), PAIRS)
    coordinates = drawn(3, 4, 5).double()
    lengths = torch.linalg.vector_norm(forms.perturbation(coordinates), dim=-1)
    torch.testing.assert_close(lengths, torch.linalg.vector_norm(coordinates, dim=-1))


def test_a_pair_turned_round_has_the_opposite_curvatures() -> None:
    forms = margin_forms(network(5, 12), torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(forms.curvatures[0], -forms.curvatures[1].flip(0))


def test_the_interval_bound_holds_and_is_exact_for_one_neuron() -> None:
    lower = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)) * 4 - 2
    upper = lower + torch.rand(50, 6, generator=torch.Generator().manual_seed(1))
    steps = torch.rand(400, 1, 6, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    for hidden in (1, 8):
        model = network(hidden, 6).double()
        seen = margins(model, (lower + steps * (upper - lower)).flatten(0, 1).double()).view(3, 400, 50).amin(dim=1)
        bound = margin_forms(model, PAIRS).interval(lower, upper)
        assert bool((bound <= seen + 1e-12).all())
        if hidden == 1:
            corners = torch.stack([torch.where(model.directions > 0, low, high) for low, high in _ends(lower, upper)])
            vertex = -(model.offsets + 0.5 / 0.18) / 1  # where the activation turns: t = -b / 2a
            ends = corners.double() @ model.directions.T
            inside = (ends[0] < vertex) & (ends[1] > vertex)
            exact = margins(model, corners.flatten(0, 1).double()).view(3, 2, 50).amin(dim=1)
            chosen = ~inside.squeeze(1).expand(50)
            torch.testing.assert_close(bound[:, chosen], exact[:, chosen])
            assert bool(chosen.any())


def _ends(lower: Tensor, upper: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (lower, upper), (upper, lower)


def test_size_is_no_less_than_any_margin() -> None:
    model = network(8, 6).double()
    forms, x = margin_forms(model, PAIRS), drawn(30, 6, seed=3).double()
    assert bool((forms.size(x.abs()) >= forms.values(x).abs()).all())
    away = nn.functional.normalize(drawn(30, 6, seed=4).double()) * 0.7
    assert bool((forms.size(x.abs(), radius=0.7) >= forms.values(x + away).abs()).all())


@pytest.mark.skipif(importlib.util.find_spec("auto_LiRPA") is None, reason="auto_LiRPA is not installed")
@pytest.mark.parametrize(("norm", "eps"), [("linf", "1/100"), ("l2", "1/20")])
def test_auto_lirpa_bounds_the_network_soundly_or_says_why_not(norm: str, eps: str) -> None:
    model, threat = nn.Sequential(nn.Flatten(), network(9, 16)).eval(), ThreatModel.parse(norm, eps)
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(dim=1)
    noise = torch.randn(300, *images.shape, generator=torch.Generator().manual_seed(1))
    nearby = [threat.project(images + threat.radius * part.sign(), images) for part in noise]
    seen = torch.stack([model(x).gather(1, labels[:, None]) - model(x) for x in nearby]).amin(dim=0)
    for method in ("ibp", "crown-ibp"):
        found = certify(model, images, labels, threat=threat, method=method, classes=4)
        assert found.reason is None
        rivals = ~nn.functional.one_hot(labels, 4).bool()
        assert bool((found.margins[rivals] <= seen[rivals] + 1e-5).all())
        assert bool(found.margins.isfinite()[rivals].all())
    reasons = {
        certify(model, images, labels, threat=threat, method=method, classes=4).reason
        for method in ("crown", "alpha-crown")
    }
    assert reasons == {"auto_LiRPA's CROWN and alpha-CROWN do not bound a quadratic activation."}


def test_forms_of_a_float64_network_record_no_gradient() -> None:
    """`double` of a float64 parameter is the parameter itself, which what is computed from the forms would follow."""
    forms = margin_forms(QuadraticNetwork(torch.eye(2), torch.ones(2, 2)).double(), torch.tensor([[0, 1]]))
    assert not forms.values(torch.ones(1, 2)).requires_grad
