"""The claims about distillation and adversarial examples: each rule's verdicts, and each measure in small."""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustboard.attacks.jsma import JsmaResult
from robustboard.bench.claims import adversarial_examples, distillation, distilled
from robustboard.bench.claims.claim import Measurement, number
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.bench.claims.saturation import log10_softmax_gradients
from robustboard.defenses import registry

DIGITS = "digits-linf@1"
BY_ID = {claim.id: claim for claim in distillation.CLAIMS}


def made(**values: float) -> dict[str, Measurement]:
    return {key: number(key, value, 100) for key, value in values.items()}


def ends(
    without: float, with_: float, gain: float, second: tuple[float, float] | None = None
) -> dict[str, Measurement]:
    found = made(**{"one: without": without, "one: with": with_, "robust without": 0.3, "gain": gain})
    return found if second is None else found | made(**{"two: without": second[0], "two: with": second[1]})


def rates(cool: float, hot: float, first: float, last: float) -> dict[str, Measurement]:
    named = {
        "jsma, undefended": 0.9,
        "jsma, T = 1": cool,
        "jsma, T = 5": 0.5,
        "jsma, T = 20": hot,
        "jsma, T = 100": 0.0,
    }
    return made(**named, **{"pgd, T = 1": first, "pgd, T = 100": last})


def sizes(plain: float, hot: float, divided: float) -> dict[str, Measurement]:
    return made(**{"median, undefended": plain, "median, T = 100": hot, "divided, T = 100": divided})


def kinds(low: float, noise: float) -> dict[str, Measurement]:
    found = {key: number(key, 0.5, 100, low=low, high=0.9) for key in ("training set", "architecture")}
    both = number("both", max(low, 0.1), 100, low=low, high=0.9)
    return found | {"both": both, "noise": number("noise", 0.01, 100, low=0.0, high=noise)}


def errors(uniform: tuple[float, float], signs: tuple[float, float] = (0.9, 0.9)) -> dict[str, Measurement]:
    pairs = {"uniform": uniform, "signs": signs, "average": (0.85, 0.99), "plain": (0.9, 1.0)}
    return made(
        **{
            f"{attack}, {key}": rate
            for key, both in pairs.items()
            for attack, rate in zip(("fgsm", "pgd"), both, strict=True)
        }
    )


VERDICTS: list[tuple[str, Mapping[str, Measurement], str]] = [
    ("distillation-jsma-mnist", ends(0.95, 0.01, 1.0), "broken under the protocol"),
    ("distillation-jsma-mnist", ends(0.95, 0.01, 5.0), "reproduced"),
    ("distillation-jsma-mnist", ends(0.84, 0.01, 0.0), "not reproduced"),
    ("distillation-jsma-mnist", ends(0.95, 0.06, 0.0), "not reproduced"),
    ("distillation-jsma-mnist", ends(0.95, 0.01, 0.0, second=(0.95, 0.2)), "not reproduced"),
    ("distillation-jsma-cifar", ends(0.80, 0.10, -2.0), "broken under the protocol"),
    ("distillation-jsma-cifar", ends(0.80, 0.10, 9.0), "reproduced"),
    ("distillation-jsma-cifar", ends(0.70, 0.10, 0.0), "not transferred"),
    ("distillation-temperature", rates(0.9, 0.1, first=0.3, last=0.3), "broken under the protocol"),
    ("distillation-temperature", rates(0.9, 0.1, first=0.3, last=0.4), "reproduced"),
    ("distillation-temperature", rates(0.9, 0.5, first=0.3, last=0.3), "not reproduced"),
    ("distillation-gradients", sizes(-6, -200, -7), "broken under the protocol"),
    ("distillation-gradients", sizes(-6, -200, -100), "reproduced"),
    ("distillation-gradients", sizes(-6, -30, -6), "not reproduced"),
    ("distillation-features", made(**{"without": 15, "with": 110, "divided": 16}), "broken under the protocol"),
    ("distillation-features", made(**{"without": 15, "with": 110, "divided": 80}), "reproduced"),
    ("distillation-features", made(**{"without": 15, "with": 60, "divided": 16}), "not reproduced"),
    ("distillation-accuracy", made(**{"undefended": 0.99, "T = 1": 0.1, "T = 100": -1.2}), "reproduced"),
    ("distillation-accuracy", made(**{"undefended": 0.99, "T = 1": 0.1, "T = 100": -1.4}), "not reproduced"),
    ("distillation-break", made(divided=0.95, gain=1.0), "reproduced"),
    ("distillation-break", made(divided=0.89, gain=1.0), "not reproduced"),
    ("distillation-break", made(divided=0.95, gain=6.0), "not reproduced"),
    ("standard-transfer", kinds(low=0.3, noise=0.05), "reproduced"),
    ("standard-transfer", kinds(low=0.3, noise=0.35), "not reproduced"),
    ("standard-transfer", kinds(low=0.1, noise=0.05), "not reproduced"),
    ("standard-linear-fgsm", made(fgsm=0.99, noise=0.2), "reproduced"),
    ("standard-linear-fgsm", made(fgsm=0.94, noise=0.2), "not reproduced"),
    ("standard-linear-fgsm", made(fgsm=0.96, noise=0.97), "not reproduced"),
    ("standard-noise-and-averaging", errors((0.5, 0.9)), "reproduced"),
    ("standard-noise-and-averaging", errors((0.9, 0.5)), "reproduced"),
    ("standard-noise-and-averaging", errors((0.5, 0.7)), "not reproduced"),
]


@pytest.mark.parametrize(("claim", "found", "verdict"), VERDICTS)
def test_rules(claim: str, found: Mapping[str, Measurement], verdict: str) -> None:
    assert BY_ID[claim].judge(found) == verdict


def test_every_claim_is_judged_and_belongs_to_a_defense() -> None:
    assert {claim for claim, _, _ in VERDICTS} == set(BY_ID)
    for claim in distillation.CLAIMS:
        assert claim.defense in registry.names()
        assert claim.id.startswith(f"{claim.defense}-")
        assert all(text.endswith(".") for text in (claim.statement, claim.data, claim.rule))


def double_net(factor: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4)).double().eval()
    with torch.no_grad():
        net[3].weight *= factor
        net[3].bias *= factor
    return net


@pytest.mark.parametrize(("factor", "temperature"), [(1.0, 1.0), (60.0, 1.0), (60.0, 60.0), (2000.0, 1.0)])
def test_gradient_sizes_are_those_of_the_softmax(factor: float, temperature: float) -> None:
    """Against its derivatives in decimal arithmetic of 500 digits."""
    net = double_net(factor)
    images = torch.rand(3, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def logits(image: torch.Tensor) -> torch.Tensor:
        return net(image.unsqueeze(0))[0] / temperature

    expected = []
    with decimal.localcontext(prec=500, Emin=-(10**6)):
        for image in images:
            slopes = torch.autograd.functional.jacobian(logits, image).flatten(1).tolist()
            weights = [decimal.Decimal(z).exp() for z in logits(image).tolist()]
            shares = [weight / sum(weights) for weight in weights]
            total = decimal.Decimal(0)
            for column in zip(*slopes, strict=True):
                exact = [decimal.Decimal(value) for value in column]
                average = sum((share * value for share, value in zip(shares, exact, strict=True)), decimal.Decimal(0))
                total += sum(abs(share * (value - average)) for share, value in zip(shares, exact, strict=True))
            expected.append(float((total / 48).log10()))
    found = log10_softmax_gradients(net, images, temperature=temperature, batch_size=3)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    if factor == 2000:
        assert max(expected) < -100, "float32 must not be able to hold them"


def test_gradient_sizes_go_on_where_floats_end() -> None:
    """Two logits that differ by w x: |dF/dx| is F (1 - F) |w|, which at a gap of 5000 is about 10^-2171."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[6000.0, 4000.0], [0.0, 0.0]]))
    found = log10_softmax_gradients(net, torch.full((1, 1, 1, 2), 0.5))
    assert found.item() == pytest.approx(-5000 / math.log(10) + math.log10(5000), rel=1e-9)


def test_the_least_features_of_an_image() -> None:
    """The fewest over its targets; an image that no attempt moves has the whole budget, a misclassified one none."""
    success = torch.tensor([True, True, False, False, True, False])
    changed = torch.tensor([8, 4, 2, 6, 0, 2])
    found = distilled.least_features(JsmaResult(torch.zeros(6, 1, 2, 2), success, changed), classes=3)
    assert found.tolist() == [4, 112, 0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: Any) -> Laboratory:
    folder: Path = tmp_path_factory.mktemp("runs")
    return Laboratory(folder)


def test_attempts_are_every_wrong_class_of_every_image(lab: Laboratory) -> None:
    trained = distilled.undefended(lab, DIGITS)
    found = distilled.attempts(lab, trained, "all", images=3)
    with torch.no_grad():
        reached = trained.model(found.images).argmax(dim=1)
    wrong = [k for label in trained.test.labels[:3].tolist() for k in range(10) if k != label]
    assert found.success.tolist() == (reached == torch.tensor(wrong)).tolist()
    assert int(found.success.sum()) > 20


def test_jsma_at_the_ends(lab: Laboratory) -> None:
    """On digits too: hidden at T = 1, found again at z / T."""
    found = distilled.jsma_at_the_ends(lab, track=DIGITS, networks={"board": {}}, images=10, with_protocol=False)
    assert set(found) == {f"board: {key}" for key in ("without", "with", "divided", "logits")}
    assert all(one.n == 90 for one in found.values())
    assert found["board: without"].value > 0.9
    assert found["board: with"].value < 0.1
    assert found["board: divided"].value > 0.9


def test_claims_over_temperatures(lab: Laboratory) -> None:
    """The rules read what is measured: on digits JSMA and the gradients vanish at T = 100, and PGD still finds most."""
    temperatures = (1.0, 100.0)
    jsma = distilled.over_temperatures(lab, temperatures=temperatures, track=DIGITS, images=10, examples=100)
    assert distillation.judge_temperatures(jsma) in ("reproduced", "broken under the protocol")
    assert jsma["jsma, T = 100"].value < 0.1
    assert jsma["pgd, T = 100"].value < 0.4
    gradients = distilled.gradient_sizes(lab, temperatures=temperatures, track=DIGITS, examples=100)
    assert distillation.judge_gradients(gradients) == "broken under the protocol"
    assert gradients["below, T = 100"].value > 0.7 > gradients["below, undefended"].value
    accuracy = distilled.clean_accuracy(lab, temperatures=temperatures, track=DIGITS)
    assert accuracy["T = 100"].unit == "points"
    assert accuracy["T = 100"].value > -5


def test_features_needed(lab: Laboratory) -> None:
    found = distilled.features_needed(lab, track=DIGITS, images=20)
    assert distillation.judge_features(found) == "broken under the protocol"
    assert found["without"].n == 20


def test_adversarial_examples_transfer_between_networks(lab: Laboratory) -> None:
    found = adversarial_examples.transfer(lab, track=DIGITS, architectures=("mlp-30", "mlp-60-30"), examples=200)
    assert set(found) == {"training set", "architecture", "both", "noise"}
    assert adversarial_examples.judge_transfer(found) == "reproduced"


def test_linear_models_fall_to_fgsm(lab: Laboratory) -> None:
    """For softmax regression the sign of the gradient is nearly the worst case; random signs are not."""
    found = adversarial_examples.linear_model(lab, track=DIGITS, examples=200)
    assert found["fgsm"].value > 0.9
    assert found["noise"].value < 0.5 * found["fgsm"].value
    assert 0.1 < found["confidence"].value <= 1


def test_noise_and_averaging(lab: Laboratory) -> None:
    """The average of one network is that network; what was trained on noise is another, and falls too."""
    found = adversarial_examples.noise_and_averaging(lab, track=DIGITS, examples=100, members=1)
    assert len(found) == 8
    assert found["fgsm, average"].value == pytest.approx(found["fgsm, plain"].value, abs=0.05)
    assert found["pgd, average"].value == pytest.approx(found["pgd, plain"].value, abs=0.05)
    assert found["fgsm, uniform"].value != found["fgsm, plain"].value
    assert adversarial_examples.judge_no_help(found) == "reproduced"


def test_the_average_is_of_probabilities() -> None:
    members = [double_net(1.0), double_net(3.0)]
    images = torch.rand(5, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    averaged = adversarial_examples.Averaged(members).eval()
    expected = (members[0](images).softmax(dim=1) + members[1](images).softmax(dim=1)) / 2
    torch.testing.assert_close(averaged(images).softmax(dim=1), expected)
