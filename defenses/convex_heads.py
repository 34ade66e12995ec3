"""The four ways in which convex adversarial training reaches a two-layer network, behind one signature.

| activation | `program`: the global optimum, small problems       | `scalable`: mini-batches, any size             |
|------------|------------------------------------------------------|------------------------------------------------|
| polynomial | the semidefinite program (`convex_programs`)         | its factored form (`burer_monteiro`)           |
| relu       | the cone program (`convex_relu_program`)             | constraints as penalties (`convex_relu`)       |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import generator
from robustboard.attacks.quadratic import QuadraticNetwork
from robustboard.attacks.threat import Norm, ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Progress, TrainingData
from robustboard.defenses.batches import Batch
from robustboard.defenses.burer_monteiro import UnitNeurons, hinge_loss, squared_loss
from robustboard.defenses.convex_features import FeatureMap, fitted
from robustboard.defenses.convex_relu import GatedNetwork, drawn_gates, robust_loss
from robustboard.defenses.fingerprint import fingerprint
from robustboard.defenses.training import Recipe, train
from robustboard.defenses.worst_margins import Comparisons, one_against_rest, pairs_of

if TYPE_CHECKING:
    from robustboard.defenses.convex_programs import Floats, Solver

Activation = Literal["polynomial", "relu"]
Form = Literal["program", "scalable"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a two-layer network is trained for, and how; `convex.ConvexHyper` describes the choices.

    `radius` is in units of the inputs, as are all its lengths but `feature_norm`.
    """

    multi_class: Literal["pairwise", "one-vs-all"]
    loss: Literal["hinge", "squared"]
    ball: Norm
    radius: float
    beta: float
    width: int
    penalty: float
    components: int | None
    feature_norm: float | None
    robust_examples: int | None
    solver: Solver
    recipe: Recipe


@dataclass(frozen=True)
class Training:
    """The circumstances of one training: the arguments of `Defense.fit`, and the name of the checkpoint."""

    data: TrainingData
    threat: ThreatModel
    seed: int
    device: torch.device
    progress: Progress
    checkpoints: CheckpointStore
    name: str


def train_head(activation: Activation, form: Form, head: Head, training: Training) -> nn.Sequential:
    """A two-layer network on the inputs of `training.data`, in eval mode on its device: `nn.Flatten`, then its layers.

    Raises:
        DefenseError: if a program has no accurate optimum, or a training fails.
    """
    features = fitted(training.data.train.images, norm=head.feature_norm, components=head.components)
    network = _FORMS[activation, form](features, head, training)
    return network.to(training.device).eval()


def _polynomial_program(features: FeatureMap, head: Head, training: Training) -> nn.Sequential:
    # Seconds of imports that only the small problems need.
    from robustboard.defenses.convex_programs import Ball, solve
    from robustboard.defenses.neural_decomposition import quadratic_network

    data = training.data
    robust = None if head.robust_examples is None else range(min(head.robust_examples, len(data.train)))

    def solved(x: Floats) -> tuple[Floats, Floats]:
        found = solve(
            x,
            data.train.labels.numpy(),
            classes=data.classes,
            beta=head.beta,
            ball=Ball(head.ball, head.radius / float(features.scale)),
            multi_class=head.multi_class,
            loss=head.loss,
            robust=robust,
            solver=head.solver,
        )
        return found.positive, found.negative

    positive, negative = _once(solved, features, head, training)
    small = quadratic_network(positive.numpy(), negative.numpy())
    directions, offsets = features.double().folded(small.directions.detach())
    a, b, c = small.coefficients.tolist()
    network = QuadraticNetwork(
        directions.float(), small.outputs.detach().float(), offsets=offsets.float(), coefficients=(a, b, c)
    )
    return nn.Sequential(nn.Flatten(), network)


def _polynomial_scalable(features: FeatureMap, head: Head, training: Training) -> nn.Sequential:
    data, radius = training.data, head.radius / float(features.scale)
    draws = generator(training.seed, "initial weights")
    model = UnitNeurons(features, width=head.width, classes=data.classes, draws=draws).to(training.device)

    def loss(batch: Batch) -> Tensor:
        comparisons = _comparisons(batch.labels, data.classes, head, model.outputs)
        if head.loss == "squared":
            worst = squared_loss(model, batch.images, comparisons, radius=radius)
        else:
            pairwise = head.multi_class == "pairwise"
            worst = hinge_loss(model, batch.images, comparisons, radius=radius, worst_only=pairwise)
        return worst + head.beta * model.size()

    _trained(model, loss, head, training)
    return nn.Sequential(nn.Flatten(), model.deployed())


def _relu_program(features: FeatureMap, head: Head, training: Training) -> nn.Sequential:
    from robustboard.defenses.convex_programs import Ball
    from robustboard.defenses.convex_relu_program import solve_gated

    data = training.data
    gates = _gates(features, head, training).double()

    def solved(x: Floats) -> tuple[Floats, Floats]:
        found = solve_gated(
            x,
            data.train.labels.numpy(),
            gates.numpy(),
            classes=data.classes,
            beta=head.beta,
            ball=Ball(head.ball, head.radius / float(features.scale)),
            multi_class=head.multi_class,
            loss=head.loss,
            solver=head.solver,
        )
        return found.positive, found.negative

    positive, negative = _once(solved, features, head, training)
    model = GatedNetwork(features.double(), gates, classes=data.classes)
    with torch.no_grad():
        model.positive.copy_(positive)
        model.negative.copy_(negative)
    return model.deployed().float()


def _relu_scalable(features: FeatureMap, head: Head, training: Training) -> nn.Sequential:
    data, radius = training.data, head.radius / float(features.scale)
    model = GatedNetwork(features, _gates(features, head, training), classes=data.classes).to(training.device)

    def loss(batch: Batch) -> Tensor:
        x = model.features(batch.images)
        comparisons = _comparisons(batch.labels, data.classes, head, x)
        worst = robust_loss(model, x, comparisons, norm=head.ball, radius=radius, squared=head.loss == "squared")
        violation = model.violation(x, norm=head.ball, radius=radius)
        return worst + head.beta * model.size() + head.penalty * violation

    _trained(model, loss, head, training)
    return model.deployed()


_FORMS: Mapping[tuple[Activation, Form], Callable[[FeatureMap, Head, Training], nn.Sequential]] = MappingProxyType(
    {
        ("polynomial", "program"): _polynomial_program,
        ("polynomial", "scalable"): _polynomial_scalable,
        ("relu", "program"): _relu_program,
        ("relu", "scalable"): _relu_scalable,
    }
)


def _comparisons(labels: Tensor, classes: int, head: Head, like: Tensor) -> Comparisons:
    return (pairs_of if head.multi_class == "pairwise" else one_against_rest)(labels, classes, like)


def _gates(features: FeatureMap, head: Head, training: Training) -> Tensor:
    return drawn_gates(features(training.data.train.images), head.width, generator(training.seed, "gates"))


def _trained(model: nn.Module, loss: Callable[[Batch], Tensor], head: Head, training: Training) -> None:
    train(
        model,
        loss,
        training.data,
        head.recipe,
        threat=training.threat,
        name=training.name,
        seed=training.seed,
        device=training.device,
        progress=training.progress,
        checkpoints=training.checkpoints,
    )


def _once(
    solved: Callable[[Floats], tuple[Floats, Floats]], features: FeatureMap, head: Head, training: Training
) -> tuple[Tensor, Tensor]:
    """The two parts of a program's solution, kept in the checkpoints: a program is solved once."""
    data = training.data
    x = features.double()(data.train.images.double())
    identity = fingerprint((training.name, head, training.seed, data.classes), (x, data.train.labels))
    training.progress.begin(f"solve {training.name}", 1)
    state = training.checkpoints.load(training.name)
    if state is None or state.get("identity") != identity:
        positive, negative = solved(x.numpy())
        state = {
            "identity": identity,
            "positive": torch.from_numpy(positive),
            "negative": torch.from_numpy(negative),
        }
        training.checkpoints.save(training.name, state)
    training.progress.advance()
    return state["positive"], state["negative"]
