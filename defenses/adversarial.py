"""Adversarial training: the loss is taken at perturbed images that are made anew in every step.

FGSM-AT: Goodfellow, Shlens, Szegedy 2015 (arXiv 1412.6572, sec. 6). PGD-AT: Madry et al. 2018 (arXiv 1706.06083,
sec. 2.1 and 5). TRADES: Zhang et al. 2019 (arXiv 1901.08573, eq. 5 and algorithm 1). Perturbations are made against the
network in eval mode, and no gradient flows through their making.

Where the radius is large, a network that is attacked at full strength from its first step may never leave the constant
prediction. So the radius can grow from zero over the first part of the training (`ramp`), as in certified training;
docs/tuning.md has what that changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.fgsm import fgsm
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import Claim, DefenseCard, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.training import GradientDefense, Objective, Recipe, evaluating, sized


@dataclass(frozen=True, kw_only=True)
class AdversarialHyper(Recipe):
    """What all adversarial training has.

    Attributes:
        ramp: the share of the training over which the radius grows, linearly, from zero to the track's; 0 trains at
            the full radius throughout.
    """

    ramp: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp must be a share of the training, not {self.ramp:g}")

    def growth(self, done: float) -> float:
        """The radius as a share of the track's, after the share `done` of the training.

        >>> hyper = AdversarialHyper(architecture="mlp-10", epochs=10, ramp=0.5)
        >>> [hyper.growth(done) for done in (0.0, 0.25, 0.75)]
        [0.0, 0.5, 1.0]
        """
        return min(1.0, done / self.ramp) if self.ramp else 1.0


@dataclass(frozen=True, kw_only=True)
class FgsmHyper(AdversarialHyper):
    """FGSM-AT's hyper-parameters.

    Attributes:
        alpha: the weight of the clean loss; the paper's is one half.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {self.alpha:g}")


@dataclass(frozen=True, kw_only=True)
class PgdHyper(AdversarialHyper):
    """PGD-AT's hyper-parameters.

    Attributes:
        steps: gradient steps an image and epoch.
        step_size: the length of a step at the full radius, in pixel units of [0, 1]; it grows with the radius.
    """

    steps: int
    step_size: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.step_size <= 0:
            raise ValueError(
                f"steps must be at least 1 and step_size positive, not {self.steps} and {self.step_size:g}"
            )


@dataclass(frozen=True, kw_only=True)
class TradesHyper(PgdHyper):
    """TRADES' hyper-parameters.

    Attributes:
        beta: the weight of the robust term, the paper's 1/lambda.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, not {self.beta:g}")


class FgsmTraining(GradientDefense[FgsmHyper]):
    """Minimises alpha J(x) + (1 - alpha) J(x + eps sign grad_x J(x))."""

    card = DefenseCard(
        name="fgsm-at",
        title="FGSM adversarial training",
        paper="https://arxiv.org/abs/1412.6572",
        authors=("Ian J. Goodfellow", "Jonathon Shlens", "Christian Szegedy"),
        year=2015,
        kind="empirical",
        summary="Half of the loss is taken at one full-size gradient-sign step from the clean image.",
        claims=(
            Claim(
                "fgsm_accuracy",
                0.821,
                "MNIST, maxout network, FGSM at eps 1/4 (17.9 % error)",
                "section 6, as public notes on the paper quote it",
            ),
            Claim(
                "clean_accuracy",
                0.99218,
                "MNIST, maxout network (0.782 % error)",
                "section 6, as public notes on the paper quote it",
            ),
        ),
    )
    hyper_type = FgsmHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> FgsmHyper:
        """As many epochs as PGD-AT has."""
        del threat
        return FgsmHyper(
            **sized(data, examples=500_000),
        )

    def objective(self, model: nn.Module, hyper: FgsmHyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""

        def loss(batch: Batch) -> Tensor:
            clean_loss = functional.cross_entropy(model(batch.images), batch.labels)
            growth = hyper.growth(batch.done)
            if growth == 0:
                return clean_loss
            with evaluating(model):
                adversarial = fgsm(model, batch.images, batch.labels, threat=grown(threat, growth))
            adversarial_loss = functional.cross_entropy(model(adversarial), batch.labels)
            return hyper.alpha * clean_loss + (1 - hyper.alpha) * adversarial_loss

        return loss


class PgdTraining(GradientDefense[PgdHyper]):
    """Minimises the loss at the end of projected gradient ascent from a random start."""

    card = DefenseCard(
        name="pgd-at",
        title="PGD adversarial training",
        paper="https://arxiv.org/abs/1706.06083",
        authors=(
            "Aleksander Madry",
            "Aleksandar Makelov",
            "Ludwig Schmidt",
            "Dimitris Tsipras",
            "Adrian Vladu",
        ),
        year=2018,
        kind="empirical",
        summary="The loss is taken at the end of several projected gradient steps from a random start in the ball.",
        claims=(
            Claim("robust_accuracy", 0.893, "MNIST, L-inf eps 3/10, PGD-100, 20 restarts", "table 1, from memory"),
            Claim("clean_accuracy", 0.988, "MNIST", "table 1, from memory"),
            Claim(
                "robust_accuracy",
                0.458,
                "CIFAR-10, wide residual network, L-inf eps 8/255, PGD-20",
                "table 2, from memory",
            ),
            Claim(
                "clean_accuracy",
                0.873,
                "CIFAR-10, wide residual network",
                "table 2, as github.com/ndb796/Pytorch-Adversarial-Training-CIFAR quotes it",
            ),
        ),
    )
    hyper_type = PgdHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> PgdHyper:
        """Seven steps (the paper's number for CIFAR-10) that can cross the ball, and a ramp; see docs/tuning.md."""
        return PgdHyper(
            **sized(data, examples=500_000),
            ramp=0.25,
            steps=7,
            step_size=threat.radius / 4,
        )

    def objective(self, model: nn.Module, hyper: PgdHyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""

        def loss(batch: Batch) -> Tensor:
            growth = hyper.growth(batch.done)
            if growth == 0:
                return functional.cross_entropy(model(batch.images), batch.labels)
            ball = grown(threat, growth)
            with evaluating(model):
                adversarial = ascend(
                    model,
                    batch.images,
                    batch.labels,
                    threat=ball,
                    start=ball.start(batch.images, batch.noise(threat.norm)),
                    steps=hyper.steps,
                    step_size=hyper.step_size * growth,
                )
            return functional.cross_entropy(model(adversarial), batch.labels)

        return loss


class Trades(GradientDefense[TradesHyper]):
    """Minimises CE(f(x), y) + beta max_{x'} KL(f(x) || f(x'))."""

    card = DefenseCard(
        name="trades",
        title="TRADES",
        paper="https://arxiv.org/abs/1901.08573",
        authors=(
            "Hongyang Zhang",
            "Yaodong Yu",
            "Jiantao Jiao",
            "Eric P. Xing",
            "Laurent El Ghaoui",
            "Michael I. Jordan",
        ),
        year=2019,
        kind="empirical",
        summary="The clean loss, plus beta times how far the prediction moves within the ball (a KL divergence).",
        claims=(
            Claim(
                "robust_accuracy",
                0.5643,
                "CIFAR-10, WRN-34-10, L-inf eps 0.031, beta 6, PGD-20",
                "the number that AutoAttack's README lists as reported; the setting from memory",
            ),
            Claim(
                "clean_accuracy",
                0.8492,
                "CIFAR-10, WRN-34-10, beta 6",
                "README of github.com/yaodongyu/TRADES; beta from memory",
            ),
        ),
    )
    hyper_type = TradesHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> TradesHyper:
        """PGD-AT's steps and epochs, and the paper's beta."""
        return TradesHyper(
            **sized(data, examples=500_000),
            steps=7,
            step_size=threat.radius / 4,
        )

    def objective(self, model: nn.Module, hyper: TradesHyper, data: TrainingData, threat: ThreatModel) -> Objective:
        """The loss of one mini-batch."""

        def loss(batch: Batch) -> Tensor:
            growth = hyper.growth(batch.done)
            if growth == 0:
                return functional.cross_entropy(model(batch.images), batch.labels)
            adversarial = least_agreeing(model, batch, threat=grown(threat, growth), hyper=hyper)
            clean_logits = model(batch.images)
            divergence = _kl(functional.softmax(clean_logits, dim=1), model(adversarial)).mean()
            return functional.cross_entropy(clean_logits, batch.labels) + hyper.beta * divergence

        return loss


def least_agreeing(model: nn.Module, batch: Batch, *, threat: ThreatModel, hyper: TradesHyper) -> Tensor:
    """TRADES' inner maximisation: images of the ball whose prediction is far from the clean one, (N, C, H, W).

    The divergence has gradient zero at the clean image, so the ascent starts at a normal draw of deviation 0.001
    around it (algorithm 1).
    """
    with evaluating(model):
        with torch.no_grad():
            clean = functional.softmax(model(batch.images), dim=1)
        return ascend(
            model,
            batch.images,
            batch.labels,
            threat=threat,
            start=batch.images + 0.001 * batch.noise("l2"),
            steps=hyper.steps,
            step_size=hyper.step_size * hyper.growth(batch.done),
            loss=lambda logits, _: _kl(clean, logits),
        )


def grown(threat: ThreatModel, growth: float) -> ThreatModel:
    """The threat with `growth` times its radius, 0 < growth <= 1; at 1 it is the very same.

    >>> grown(ThreatModel.parse("linf", "1/10"), 0.5).eps
    Fraction(1, 20)
    """
    return threat if growth == 1 else threat.scaled(Fraction(growth))


def _kl(clean: Tensor, logits: Tensor) -> Tensor:
    """KL(clean || softmax(logits)) of each example: probabilities (N, K) and logits (N, K) to (N,)."""
    return functional.kl_div(functional.log_softmax(logits, dim=1), clean, reduction="none").sum(dim=1)
