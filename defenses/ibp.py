"""Certified training: the loss is taken at verified lower bounds of the margins, so it covers the whole ball.

IBP: Gowal et al. 2018 (arXiv 1810.12715, sec. 3), interval bounds. CROWN-IBP: Zhang et al. 2020 (arXiv 1906.06316,
sec. 3.2), which starts from the tighter CROWN-IBP bounds and hands over to intervals as the radius grows. Both ramp the
radius from zero and shift weight from the clean loss to the verified one at the same pace.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.bounded_network import BoundedNetwork
from robustboard.attacks.lirpa_compat import INSTALL
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Claim, DefenseCard, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.training import GradientDefense, Objective, Recipe, device_of, sized


@dataclass(frozen=True, kw_only=True)
class RampHyper(Recipe):
    """The radius of certified training.

    Attributes:
        warmup: the share of the training that passes before the radius grows.
        ramp: the share over which it grows, linearly, to its final value.
        eps_scale: the final training radius over the track's; the papers train with more than they certify.
    """

    warmup: float = 0.05
    ramp: float = 0.5
    eps_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0 or self.ramp <= 0 or self.warmup + self.ramp > 1:
            raise ValueError(f"warmup and ramp must be shares of the training, not {self.warmup:g} and {self.ramp:g}")
        if self.eps_scale <= 0:
            raise ValueError(f"eps_scale must be positive, not {self.eps_scale:g}")

    def growth(self, done: float) -> float:
        """The radius as a share of its final value, after the share `done` of the training.

        >>> hyper = RampHyper(architecture="mlp-10", epochs=10, warmup=0.2, ramp=0.4)
        >>> [hyper.growth(done) for done in (0.1, 0.4, 0.9)]
        [0.0, 0.5, 1.0]
        """
        return min(1.0, max(0.0, (done - self.warmup) / self.ramp))


@dataclass(frozen=True, kw_only=True)
class IbpHyper(RampHyper):
    """The schedule of certified training.

    Attributes:
        kappa: the final weight of the clean loss; it starts at 1.
    """

    kappa: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"kappa must lie in [0, 1], not {self.kappa:g}")


@dataclass(frozen=True, kw_only=True)
class CrownIbpHyper(IbpHyper):
    """The schedule of CROWN-IBP training.

    Attributes:
        beta: the final weight of the CROWN-IBP bounds; it starts at 1, and the interval bounds have the rest.
    """

    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], not {self.beta:g}")


class Ibp(GradientDefense[IbpHyper]):
    """Minimises kappa CE(z, y) + (1 - kappa) CE(worst logits by intervals, y)."""

    card = DefenseCard(
        name="ibp",
        title="Interval bound propagation",
        paper="https://arxiv.org/abs/1810.12715",
        authors=(
            "Sven Gowal",
            "Krishnamurthy Dvijotham",
            "Robert Stanforth",
            "Rudy Bunel",
            "Chongli Qin",
            "Jonathan Uesato",
            "Relja Arandjelović",
            "Timothy Mann",
            "Pushmeet Kohli",
        ),
        year=2018,
        kind="certified",
        summary="The loss is taken at the worst logits that interval arithmetic allows, on a radius that grows.",
        claims=(
            Claim(
                "certified_accuracy",
                0.9777,
                "MNIST, L-inf eps 1/10",
                "transcribed by the SoK certified-robustness board",
            ),
            Claim(
                "certified_accuracy",
                0.9195,
                "MNIST, L-inf eps 3/10",
                "transcribed by the SoK certified-robustness board",
            ),
            Claim(
                "certified_accuracy",
                0.5002,
                "CIFAR-10, L-inf eps 2/255",
                "transcribed by the SoK certified-robustness board",
            ),
        ),
    )
    hyper_type = IbpHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> IbpHyper:
        """Interval steps cost three clean ones, so there are more of them than PGD-AT has."""
        del threat
        return IbpHyper(
            **sized(data, examples=700_000),
        )

    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        """Intervals are L-inf boxes, and bounds need auto_LiRPA."""
        return unsuited_to_intervals(self.card.name, threat)

    def objective(self, model: nn.Module, hyper: IbpHyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""
        bounded = BoundedNetwork(model, data.train.images[:1].to(device_of(model)), classes=data.classes)

        def loss(batch: Batch) -> Tensor:
            growth = hyper.growth(batch.done)
            clean_loss = functional.cross_entropy(model(batch.images), batch.labels)
            if growth == 0:
                return clean_loss
            lower, upper = box(batch.images, growth * hyper.eps_scale * threat.radius)
            margins = bounded.margins(batch.labels, lower=lower, upper=upper, method="ibp")
            return _mixed(clean_loss, margins, growth, hyper)

        return loss


class CrownIbp(GradientDefense[CrownIbpHyper]):
    """Minimises kappa CE(z, y) + (1 - kappa) CE(-(beta m_CROWN-IBP + (1 - beta) m_IBP), y)."""

    card = DefenseCard(
        name="crown-ibp",
        title="CROWN-IBP",
        paper="https://arxiv.org/abs/1906.06316",
        authors=(
            "Huan Zhang",
            "Hongge Chen",
            "Chaowei Xiao",
            "Sven Gowal",
            "Robert Stanforth",
            "Bo Li",
            "Duane Boning",
            "Cho-Jui Hsieh",
        ),
        year=2020,
        kind="certified",
        summary="The verified loss starts from linear bounds over interval ones and hands over to intervals.",
        claims=(
            Claim("certified_accuracy", 0.9298, "MNIST, L-inf eps 3/10 (7.02 % verified error)", "abstract"),
            Claim("certified_accuracy", 0.3306, "CIFAR-10, L-inf eps 8/255 (66.94 % verified error)", "abstract"),
        ),
    )
    hyper_type = CrownIbpHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> CrownIbpHyper:
        """A short ramp: linear bounds cost thirty clean steps, and cost nothing once beta is zero."""
        del threat
        return CrownIbpHyper(
            **sized(data, examples=500_000),
            ramp=0.15,
        )

    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        """Intervals are L-inf boxes, and bounds need auto_LiRPA."""
        return unsuited_to_intervals(self.card.name, threat)

    def objective(self, model: nn.Module, hyper: CrownIbpHyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""
        bounded = BoundedNetwork(model, data.train.images[:1].to(device_of(model)), classes=data.classes)

        def loss(batch: Batch) -> Tensor:
            growth = hyper.growth(batch.done)
            clean_loss = functional.cross_entropy(model(batch.images), batch.labels)
            if growth == 0:
                return clean_loss
            lower, upper = box(batch.images, growth * hyper.eps_scale * threat.radius)
            beta = 1 - (1 - hyper.beta) * growth
            margins = bounded.margins(batch.labels, lower=lower, upper=upper, method="ibp")
            if beta > 0:
                linear = bounded.margins(batch.labels, lower=lower, upper=upper, method="crown-ibp")
                margins = beta * linear + (1 - beta) * margins
            return _mixed(clean_loss, margins, growth, hyper)

        return loss


def verified_cross_entropy(margins: Tensor) -> Tensor:
    """The cross-entropy of the worst logits that lower bounds on the margins z_y - z_j, (N, K - 1), allow; a scalar.

    >>> verified_cross_entropy(torch.tensor([[0.0]]))
    tensor(0.6931)
    """
    worst = functional.pad(-margins, (1, 0))
    return functional.cross_entropy(worst, torch.zeros(len(margins), dtype=torch.long, device=margins.device))


def _mixed(clean_loss: Tensor, margins: Tensor, growth: float, hyper: IbpHyper) -> Tensor:
    kappa = 1 - (1 - hyper.kappa) * growth
    return kappa * clean_loss + (1 - kappa) * verified_cross_entropy(margins)


def box(images: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The lower and upper ends of the L-inf balls of a radius around images, within [0, 1]; both (N, C, H, W)."""
    return (images - radius).clamp(min=0.0), (images + radius).clamp(max=1.0)


def unsuited_to_intervals(name: str, threat: ThreatModel) -> str | None:
    """Why the defense `name` cannot train on interval bounds for a threat, in a sentence; None where it can."""
    if threat.norm != "linf":
        return f"{name} trains on interval bounds of L-inf boxes, so it does not suit an {threat.norm} track."
    if importlib.util.find_spec("auto_LiRPA") is None:
        return f"{name} needs auto_LiRPA, which is not installed; run `{INSTALL}`."
    return None
