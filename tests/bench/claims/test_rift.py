"""The rules of RiFT's claims give each verdict they can, and the paper's measures count as the paper counts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.arrays import ImageSet
from robustboard.bench.claims.claim import Measurement, PaperClaim
from robustboard.bench.claims.fine_tuned import adversarial, corrupted, standard
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.bench.claims.rift import CLAIMS, TABLES, choices, criticality_as_bound, largest_gain
from robustboard.bench.corruptions import FIRST_FIVE, SEVERITIES, corrupt
from robustboard.defenses.architectures import build
from robustboard.defenses.fine_tuning import FineTuning

BY_ID: Mapping[str, PaperClaim] = {claim.id: claim for claim in CLAIMS}


def interval(low: float, high: float) -> Measurement:
    return Measurement("difference", (low + high) / 2, 100, low, high, "points")


def single(value: float) -> Measurement:
    return Measurement("number", value, 100, value, value)


def test_every_claim_is_about_rift() -> None:
    assert len(BY_ID) == len(CLAIMS) == 5
    assert all(claim.defense == "rift" and claim.id.startswith("rift-") for claim in CLAIMS)


UP, FLAT, DOWN = (0.1, 2.0), (-0.4, 0.3), (-2.0, -0.3)


@pytest.mark.parametrize(
    ("clean", "ood", "adversarial", "protocol", "verdict"),
    [
        (UP, UP, FLAT, FLAT, "reproduced"),
        (UP, UP, UP, UP, "reproduced"),
        (UP, UP, (-0.5, -0.1), FLAT, "reproduced"),
        (UP, UP, DOWN, FLAT, "not reproduced"),
        (FLAT, UP, FLAT, FLAT, "not transferred"),
        (UP, FLAT, FLAT, FLAT, "not transferred"),
        (UP, UP, FLAT, DOWN, "broken under the protocol"),
        (FLAT, FLAT, FLAT, DOWN, "not transferred"),
    ],
)
def test_generalisation(clean, ood, adversarial, protocol, verdict) -> None:
    measured = {"clean": clean, "ood": ood, "adversarial": adversarial, "protocol": protocol}
    found = {key: interval(*limits) for key, limits in measured.items()}
    assert BY_ID["rift-generalisation"].judge(found) == verdict


@pytest.mark.parametrize("identity", ["rift-which-module", "rift-one-module"])
def test_the_first_choice_must_lead_over_every_other(identity: str) -> None:
    judge = BY_ID[identity].judge
    other = {"adversarial any": interval(*DOWN)}
    assert judge({**other, "lead over a": interval(*UP), "lead over b": interval(*UP)}) == "reproduced"
    assert judge({**other, "lead over a": interval(*UP), "lead over b": interval(*FLAT)}) == "not transferred"


@pytest.mark.parametrize(("value", "verdict"), [(2.8, "refuted by the paper"), (4.5, "reproduced")])
def test_five_per_cent(value: float, verdict: str) -> None:
    assert BY_ID["rift-five-percent"].judge({"largest": single(value)}) == verdict


def test_the_largest_gain_is_the_paper_s() -> None:
    """2.80 points, SCORE on CIFAR-100; the mean gains of table 1 are those that the paper prints."""
    found = largest_gain(Laboratory.__new__(Laboratory))["largest"]
    assert (found.value, found.n) == (2.8, 34)
    rows = [TABLES[f"{name}, CIFAR-10"] for name in ("ResNet18", "ResNet34", "WRN34-10")]
    clean = [after - before for (before, after), _ in rows]
    ood = [after - before for _, (before, after) in rows]
    assert np.mean(clean) == pytest.approx(1.21, abs=0.006)
    assert np.mean(ood) == pytest.approx(1.49, abs=0.006)


@pytest.mark.parametrize(
    ("fixed", "fresh", "verdict"),
    [
        ({"a": 0.1, "b": 5.0}, {"a": 0.2, "b": 5.5}, "reproduced"),
        ({"a": 0.1, "b": 5.0}, {"a": 0.3, "b": 5.5}, "broken under the protocol"),
        ({"a": 0.0}, {"a": 0.04}, "reproduced"),
    ],
)
def test_the_bound_holds_up_to_twice(fixed: dict[str, float], fresh: dict[str, float], verdict: str) -> None:
    found = {f"fixed {key}": single(value) for key, value in fixed.items()}
    found |= {f"fresh {key}": single(value) for key, value in fresh.items()}
    assert BY_ID["rift-criticality-bound"].judge(found) == verdict


# The measures.


def images(count: int = 20, channels: int = 3) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 256, size=(count, channels, 8, 8), dtype=np.uint8), np.arange(count) % 3)


def network() -> nn.Module:
    return build("mlp-9", image_shape=(3, 8, 8), classes=3, seed=0).eval()


class Answers(nn.Module):
    """Right for every image whose first pixel, in levels, is at most a limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, inputs: Tensor) -> Tensor:
        score = self.limit / 255 - inputs[:, 0, 0, 0]
        return torch.stack([score, -score, torch.full_like(score, -9.0)], dim=1)


def test_standard_is_accuracy_on_the_pixels() -> None:
    some = ImageSet(images().images, np.zeros(20, dtype=np.int64))
    assert standard(Answers(100.5), some).tolist() == (some.images[:, 0, 0, 0] <= 100).tolist()


def test_adversarial_is_exact_where_one_pixel_decides() -> None:
    """PGD crosses the ball, so an image falls exactly if its first pixel is within eps of the limit."""
    some = ImageSet(images().images, np.zeros(20, dtype=np.int64))
    found = adversarial(Answers(100.5), some, ThreatModel.parse("linf", "20/255"), seed=0)
    assert found.tolist() == (some.images[:, 0, 0, 0].astype(int) + 20 <= 100).tolist()


def test_adversarial_repeats_and_is_no_more_than_clean() -> None:
    threat = ThreatModel.parse("linf", "8/255")
    first, again = (adversarial(network(), images(), threat, seed=0) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.sum() <= standard(network(), images()).sum()


def test_corrupted_is_the_unweighted_mean_over_conditions() -> None:
    some = images(6)
    networks = [network(), Answers(100.0).eval()]
    found = corrupted(networks, some, seed=0)
    for model, shares in zip(networks, found, strict=True):
        expected = np.zeros(6)
        for name in FIRST_FIVE:
            for severity in SEVERITIES:
                changed = corrupt(some.images, corruption=name, severity=severity, keys=some.hashes, seed=0)
                with torch.no_grad():
                    expected += (
                        model(torch.from_numpy(changed / np.float32(255))).argmax(1).numpy() == some.labels
                    ) / 25
        assert shares == pytest.approx(expected)


class Small(Laboratory):
    """Claims on the embedded digits: the measures themselves, in seconds."""

    def network(self, defense: str, track: str, **overrides: object):  # type: ignore[no-untyped-def, override]
        return super().network(defense, "digits-linf@1", **{**overrides, "architecture": "mlp-20-10"})

    def dataset(self, track: str):  # type: ignore[no-untyped-def]
        return super().dataset("digits-linf@1")


def test_choices_measure_every_choice_and_the_lead_over_each_but_the_first(tmp_path) -> None:
    settings = {
        "least": FineTuning(tuning_epochs=1, criticality_examples=100, criticality_epochs=1),
        "all": FineTuning(tuning_epochs=1, modules="all"),
    }
    found = choices(Small(tmp_path), settings, images=60, epochs=2)
    assert set(found) == {"clean least", "adversarial least", "clean all", "adversarial all", "lead over all"}
    lead = found["adversarial least"].value - found["adversarial all"].value
    assert found["lead over all"].value == pytest.approx(lead)
    assert "modules 1, 3, 5" in found["clean all"].what


def test_criticality_is_measured_both_ways_for_every_module(tmp_path) -> None:
    found = criticality_as_bound(Small(tmp_path), track="digits-linf@1", epochs=2, examples=50)
    assert set(found) == {f"{way} {module}" for way in ("fixed", "fresh") for module in ("1", "3", "5")}
    assert {found[f"fixed {module}"].under for module in "135"} == {"paper"}
    assert {found[f"fresh {module}"].under for module in "135"} == {"protocol"}
