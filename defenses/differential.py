"""Differential training (Nar et al. 2019, arXiv 1901.08360): the loss is taken at differences of features.

For two classes with points x_i and y_j and a score s(x) = w^T phi(x), the paper minimises, over all pairs,

    (L)  sum_ij log(1 + exp(-(s(x_i) - s(y_j))))      or, as we read its form for nonlinear networks,
    (S)  sum_ij (s(x_i) - s(y_j) - 1)^2

An offset of the score cancels, and with it what keeps cross-entropy from the direction of the largest margin
(theorems 1 and 2). The offset is set afterwards, half-way between the classes. Neither says anything of the margin in
pixels, and (S) makes scores flat around the training points, which costs PGD more than other attacks: see the claim
differential-pgd-cifar10.

The paper treats two classes. For more, a pair of points x of class k and x' of class l has the margin
m = ((z_k - z_l)(x) - (z_k - z_l)(x')) / 2 in the logits z, and every two classes count alike. That is an extension of
ours; for two classes it is the paper's loss of s = (z_1 - z_0) / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.adapter import CheckpointStore, DefenseCard, Progress, Split, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.feature_rank import last_layer, penultimate_features
from robustboard.defenses.offsets import deviation, offsets
from robustboard.defenses.training import GradientDefense, Objective, Recipe, fresh_model, sized, train

PairLoss = Literal["log", "squared"]


@dataclass(frozen=True, kw_only=True)
class DifferentialHyper(Recipe):
    """Differential training's hyper-parameters.

    Attributes:
        loss: `log` is (L), `squared` is (S). The others are controls on the same mini-batches: `cross-entropy`;
            `centred-cross-entropy`, on features less their mean, to which theorem 1 has nothing to object; and
            `pointwise-squared`, the square of (S) without the differences.
    """

    loss: Literal["log", "squared", "cross-entropy", "centred-cross-entropy", "pointwise-squared"] = "squared"


class Differential(GradientDefense[DifferentialHyper]):
    """Minimises a loss of score differences over all pairs of points of different classes in a mini-batch."""

    card = DefenseCard(
        name="differential",
        title="Differential training",
        paper="https://arxiv.org/abs/1901.08360",
        authors=("Kamil Nar", "Orhan Ocal", "S. Shankar Sastry", "Kannan Ramchandran"),
        year=2019,
        kind="empirical",
        summary="The loss is taken at differences of scores between points of different classes, where offsets cancel; "
        "beyond two classes, which is all that the paper treats, it is an extension of this board's.",
    )
    hyper_type = DifferentialHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> DifferentialHyper:
        """Standard training's epochs, whatever the radius, and the form (S).

        Summaries of the paper say that its loss is changed for nonlinear networks, and (L) would not be. On the
        validation split of the digits (143 images, seeds 0 and 1) (S) is 97.9 and 97.9 % accurate, (L) 94.4 and 95.1 %.
        """
        del threat
        return DifferentialHyper(
            **sized(data, examples=300_000),
        )

    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        """A difference needs two classes."""
        del threat
        if len(data.train) and bool((data.train.labels == data.train.labels[0]).all()):
            return f"differential trains on pairs of classes, and all training images of {data.name} are of one class."
        return None

    def objective(
        self, model: nn.Module, hyper: DifferentialHyper, data: TrainingData, threat: ThreatModel
    ) -> Objective:
        """The loss of one mini-batch."""
        del data, threat
        form = hyper.loss

        def loss(batch: Batch) -> Tensor:
            logits = model(batch.images)
            if form == "log" or form == "squared":
                return differential_loss(logits, batch.labels, form)
            if form == "pointwise-squared":
                return pointwise_squared_loss(logits, batch.labels)
            return functional.cross_entropy(logits, batch.labels)

        return loss

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
        """Train the direction, then place the offsets; see `Defense.fit`."""
        hyper = self.hyper(data, threat)
        model = fresh_model(hyper.architecture, data, seed=seed).to(device)
        head, controller = last_layer(model), None
        if hyper.loss == "centred-cross-entropy":
            _replace(model, head, Centred(head))
        elif hyper.loss in ("log", "squared"):
            nn.init.zeros_(head.bias)
            head.bias.requires_grad = False
            controller = _Offsets(model, head, data.train)
        train(
            model,
            self.objective(model, hyper, data, threat),
            data,
            hyper,
            threat=threat,
            name=self.card.name,
            seed=seed,
            device=device,
            progress=progress,
            checkpoints=checkpoints,
            controller=controller,
            stratified=True,
        )
        if hyper.loss == "centred-cross-entropy":
            _fold(model, head, data.train)
        elif controller is not None:
            settle(head, penultimate_features(model, data.train.images), data.train.labels)
            head.bias.requires_grad = True
        return model.eval()


def differential_loss(logits: Tensor, labels: Tensor, form: PairLoss) -> Tensor:
    """The mean over all pairs of classes of the mean loss over all pairs of their points, a scalar.

    A batch of a single class has no pairs, and the loss zero.

    Args:
        logits: (N, K).
        labels: int64 (N,).
        form: `log`, softplus(-m), or `squared`, (m - 1)^2.

    >>> logits = torch.tensor([[0.0, 4.0], [0.0, 2.0], [0.0, 1.0]])  # scores 2, 1 and 0.5
    >>> differential_loss(logits, torch.tensor([1, 1, 0]), "squared")  # differences 1.5 and 0.5
    tensor(0.2500)
    """
    members = functional.one_hot(labels, logits.shape[1]).to(logits)
    counts = members.sum(dim=0)
    ways = len(counts.nonzero())
    if ways < 2:
        return 0 * logits.sum()
    halves = half_margins(logits, labels)
    if form == "log":
        margins = pair_margins(halves, labels)
        weights = (members / counts.clamp(min=1)).sum(dim=1)
        different = labels.unsqueeze(1) != labels
        losses = weights.unsqueeze(1) * weights * different * functional.softplus(-margins)
        return losses.sum() / (ways * (ways - 1))
    # The mean of (u - v - 1)^2 over all pairs is (E u - E v - 1)^2 + Var u + Var v.
    means = (members.T @ halves) / counts.clamp(min=1).unsqueeze(1)
    variances = (members.T @ (halves - means[labels]).square()) / counts.clamp(min=1).unsqueeze(1)
    present = counts > 0
    pairs = present.unsqueeze(1) & present & ~torch.eye(len(counts), dtype=torch.bool, device=logits.device)
    losses = (means + means.T - 1).square() + variances + variances.T
    return losses[pairs].mean()


def pointwise_squared_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The control of (S): each half margin is pulled to 1/2 by itself, where (S) pulls sums of two to 1; a scalar."""
    others = 1 - functional.one_hot(labels, logits.shape[1]).to(logits)
    return (others * (half_margins(logits, labels) - 0.5).square()).sum() / others.sum()


def half_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(z_y - z_k) / 2 for every class k: logits (N, K) to (N, K)."""
    return (logits.gather(1, labels.unsqueeze(1)) - logits) / 2


def pair_margins(halves: Tensor, labels: Tensor) -> Tensor:
    """The margins m of all pairs of points, (N, N), from their half margins (N, K); zero for points of one class."""
    across = halves[:, labels]
    return across + across.T


def settle(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Bring a direction to its final form: weights with mean zero over the classes, scores of unit deviation, offsets.

    The scale changes no decision. It matters to attacks on the cross-entropy, which (L) would starve of gradients by
    letting scores grow without end.

    Args:
        head: the last layer, changed in place.
        features: what it is given for the training images, (N, d).
        labels: int64 (N,).
    """
    with torch.no_grad():
        weight = head.weight.double().cpu()
        weight -= weight.mean(dim=0)
        scores = features.double() @ weight.T
        scale = deviation(scores)
        head.weight.copy_(weight / scale)
        head.bias.copy_(offsets(scores / scale, labels))


class Centred(nn.Module):
    """A linear layer on features less their mean: in train mode that of the mini-batch, else a running one.

    Args:
        layer: the linear layer, kept as it is.
    """

    centre: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("centre", torch.zeros_like(layer.weight[0]))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, d) to logits (N, K)."""
        mean = self.centre
        if self.training:
            mean = features.mean(dim=0)
            self.centre.lerp_(mean.detach(), 0.1)
        logits: Tensor = self.layer(features - mean)
        return logits


class _Offsets:
    """Offsets from some of the training images after every epoch, so that the validation figures mean something."""

    def __init__(self, model: nn.Module, head: nn.Linear, split: Split, count: int = 2000) -> None:
        self._model, self._head = model, head
        self._images, self._labels = split.images[:count], split.labels[:count]

    def epoch_end(self, epoch: int) -> Mapping[str, float]:
        del epoch
        with torch.no_grad():
            features = penultimate_features(self._model, self._images)
            self._head.bias.copy_(offsets(features @ self._head.weight.T.cpu(), self._labels))
        return {}

    def state(self) -> Mapping[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        del state


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    model.set_submodule(next(name for name, module in model.named_modules() if module is old), new)


def _fold(model: nn.Module, head: nn.Linear, split: Split) -> None:
    """Give the centred layer the mean of all training features, and make it a plain layer with another bias."""
    wrapper = next(module for module in model.modules() if isinstance(module, Centred))
    with torch.no_grad():
        seen = penultimate_features(model, split.images).double().mean(dim=0).to(wrapper.centre)
        head.bias.sub_(head.weight @ (wrapper.centre + seen))
    _replace(model, wrapper, head)
