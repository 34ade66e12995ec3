"""RiFT: adversarial training, then clean fine-tuning of the one module that robustness depends on least.

Zhu et al. 2023 (arXiv 2308.02533; ICCV 2023); the steps are in `fine_tuning`. By its own evidence, the validation
split, RiFT is never worse than its parent: the parent's weights can always be chosen, and are where nothing else can be
shown to keep their robust accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Claim, Defense, DefenseCard, Progress, TrainingData
from robustboard.defenses.adversarial import FgsmTraining, PgdTraining, Trades
from robustboard.defenses.fine_tuning import FineTuning, fine_tune
from robustboard.defenses.training import GradientDefense, Recipe
from robustboard.errors import DefenseError

PARENTS: Mapping[str, type[GradientDefense[Any]]] = MappingProxyType(
    {kind.card.name: kind for kind in (FgsmTraining, PgdTraining, Trades)}
)


@dataclass(frozen=True, kw_only=True)
class RiftHyper(FineTuning, Recipe):
    """The parent's recipe and RiFT's hyper-parameters.

    The fields of `Recipe` are the parent's, so `epochs=5` shortens its training.

    Attributes:
        parent: how the network is trained before: `pgd-at`, `trades` or `fgsm-at`.
        parent_settings: hyper-parameters that only the parent has, such as `steps=10,ramp=0`.
    """

    parent: Literal["pgd-at", "trades", "fgsm-at"] = "pgd-at"
    parent_settings: str = ""

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        FineTuning.__post_init__(self)


class Rift(Defense[RiftHyper]):
    """Tunes the least critical module of an adversarially trained network on clean data."""

    card = DefenseCard(
        name="rift",
        title="Robust critical fine-tuning (RiFT)",
        paper="https://arxiv.org/abs/2308.02533",
        authors=("Kaijie Zhu", "Jindong Wang", "Xixu Hu", "Xing Xie", "Ge Yang"),
        year=2023,
        kind="empirical",
        summary="Adversarial training, then clean fine-tuning of the module that robustness depends on least.",
        claims=(
            Claim("clean_accuracy", 0.8344, "CIFAR-10, ResNet-18, L-inf 8/255; 0.8146 before", "table 1"),
            Claim(
                "pgd_10_accuracy",
                0.5365,
                "CIFAR-10, ResNet-18, worst of three runs of PGD-10; 0.5363 before",
                "table 1",
            ),
            Claim("corruption_accuracy", 0.7569, "CIFAR-10-C, ResNet-18; 0.7356 before", "table 1"),
        ),
    )
    hyper_type = RiftHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> RiftHyper:
        """The parent's own recipe, and the smallest margin that the validation split can rule out."""
        named = str(self.overrides.get("parent", RiftHyper.parent))
        recipe = PARENTS.get(named, PgdTraining)().defaults(data, threat)
        shared: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
        return RiftHyper(**shared, margin=resolvable_margin(len(data.validation)))

    def parent(self, hyper: RiftHyper) -> GradientDefense[Any]:
        """The defense that trains the network to start from, as `hyper` has it.

        Raises:
            DefenseError: if `parent_settings` cannot be read.
        """
        recipe = {field.name: getattr(hyper, field.name) for field in dataclasses.fields(Recipe)}
        return PARENTS[hyper.parent]({**recipe, **_settings(hyper.parent_settings)})

    def fit(
        self,
        data: TrainingData,
        threat: ThreatModel,
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
        checkpoints: CheckpointStore,
    ) -> nn.Module:
        """Train the parent, bit for bit as its own row does, and fine-tune it; see `Defense.fit`."""
        hyper = self.hyper(data, threat)
        network = self.parent(hyper).fit(
            data, threat, seed=seed, device=device, progress=progress, checkpoints=checkpoints
        )
        return fine_tune(network, data, threat, hyper, seed=seed, progress=progress, checkpoints=checkpoints).network


def resolvable_margin(examples: int) -> float:
    """Half a point, or where the examples cannot tell so little apart, 3/N.

    By the rule of three 3/N is what N examples exclude at level 0.05 if not one of them changes.

    >>> resolvable_margin(6000), resolvable_margin(150)
    (0.005, 0.02)
    """
    return max(0.005, 3 / max(examples, 4))


def _settings(text: str) -> dict[str, object]:
    """`steps=10,ramp=0` as overrides."""
    settings: dict[str, object] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise DefenseError(f"rift: parent_settings must be like steps=10,ramp=0, not {text!r}.")
        settings[name.strip()] = value.strip()
    return settings
