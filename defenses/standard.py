"""Standard training: cross-entropy on clean images and no defense at all, the row that all others are read against."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import DefenseCard, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.training import GradientDefense, Objective, Recipe, sized


class Standard(GradientDefense[Recipe]):
    """Minimises the clean cross-entropy."""

    card = DefenseCard(
        name="standard",
        title="Standard training",
        paper="https://yann.lecun.org/exdb/publis/pdf/lecun-98.pdf",
        authors=("Yann LeCun", "Léon Bottou", "Yoshua Bengio", "Patrick Haffner"),
        year=1998,
        kind="undefended",
        summary="Cross-entropy on clean images; the undefended network that every defense is compared with.",
    )
    hyper_type = Recipe

    def defaults(self, data: TrainingData, threat: ThreatModel) -> Recipe:
        """A few epochs, whatever the radius."""
        del threat
        return Recipe(
            **sized(data, examples=300_000),
        )

    def objective(self, model: nn.Module, hyper: Recipe, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""

        def loss(batch: Batch) -> Tensor:
            return functional.cross_entropy(model(batch.images), batch.labels)

        return loss
