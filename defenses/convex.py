"""Convex adversarial training of two-layer polynomial and ReLU networks (Kuelbs et al. 2024, arXiv 2405.14033).

The training problem of a two-layer network with worst-case losses over a ball is a convex program: a semidefinite one
for polynomial activations (`convex_programs`), a cone program for ReLU with fixed gates (`convex_relu_program`). Each
has a form for any size of data: factored with exact worst cases (`burer_monteiro`), and with penalties
(`convex_relu`). `convex_heads` has all four. With `base`, the network stands on the features of a trained and frozen
one (`frozen_base`), as in the paper's CIFAR-10 experiment; otherwise on the pixels.

The card says `certified`: what is minimised is the exact worst case over a ball and not the outcome of an attack, and a
polynomial network on pixels comes with a bound that is exact for L2 and near it for L-inf.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from robustboard.attacks.threat import Norm, ThreatModel
from robustboard.defenses.adapter import CheckpointStore, Defense, DefenseCard, Progress, TrainingData
from robustboard.defenses.architectures import default_for
from robustboard.defenses.convex_features import linf_reach, typical_norm
from robustboard.defenses.convex_heads import Activation, Form, Head, Training, train_head
from robustboard.defenses.frozen_base import features_of, trunk_of
from robustboard.defenses.hyper import apply_overrides
from robustboard.defenses.training import Recipe
from robustboard.errors import DefenseError

TWO_LAYER = "two-layer"
_VARIANT = ("activation", "form", "ball", "components", "base")
# A full program has a matrix of size d + 1 for every example: seconds up to here, and d = 20 takes a minute already.
PROGRAM_DIMENSION, PROGRAM_EXAMPLES = 10, 100
# Pairs of classes have a curvature matrix each, and there are K (K - 1) / 2 of them.
PAIRWISE_CLASSES = 20
# Chosen for certified and clean accuracy at eps 1/10 on the validation splits of digits (0.37 to 1.2 were tried) and
# MNIST (0.48 to 0.77).
LINF_SHARE = 0.6
# Chosen among 0, 0.03, 0.1, 0.3 and 0.5 for accuracy under PGD on the validation split of digits.
FEATURE_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class ConvexHyper(Recipe):
    """Convex training's hyper-parameters.

    The fields of `Recipe` are those of the scalable forms; `architecture` is that of the base, where there is one.

    Attributes:
        activation: `polynomial` has the paper's theory and an exact certificate; `relu` is its second network.
        form: the convex `program` itself, solved to the global optimum, or the `scalable` form; `auto` takes the
            program for up to 100 examples with 10 features, above which it needs minutes.
        multi_class: `pairwise` asks the exact question, whether any other class can win, and is the default for up to
            20 classes; `one-vs-all` is that of the authors' code and has a problem a class, not a pair.
        loss: `hinge` as in the authors' code; `squared` is for targets 1 and -1, so it wants one-vs-all.
        ball: the norm of the ball that is trained against. `l2` for polynomial networks on any track, since there the
            worst case is exact; `linf` is exact for `relu`, a relaxation in the polynomial program, and has no scalable
            polynomial form.
        radius: of that ball, in pixel units; with a base, in units of the features' typical norm. By default the
            track's eps, but for an L2 ball on an L-inf track: 0.6 times eps |s|_1 / |s|_2 with the pixels' deviations
            s, the distance that L-inf perturbations go along s. The ball around all of them, eps sqrt(d), is far too
            large.
        beta: the weight of the sum of |alpha|; the programs are ill-conditioned much below 1e-3, which is their
            default.
        width: neurons m, or gates P for `relu`, of the scalable forms and the cone program. More is better and costs
            time, up to the ranks of an optimal Z and Z'.
        penalty: the weight rho of violated ReLU constraints in the scalable form. Held too strictly they cost more than
            they give: with 48 gates the validation split of digits at eps 1/10 has 93 % clean and 78 % under PGD at
            0.1, and 88 % and 69 % at the authors' 1.
        components: principal components to project on first; None keeps all coordinates. The default on a base is 64.
        feature_norm: the root mean square of the features' norm, 1 for the programs, which are conditioned best there.
            None makes each coordinate vary by about one, which weighs the quadratic terms more, and is better on
            images.
        robust_examples: how many training examples the polynomial program withstands the ball at, the others count as
            they are (the authors' `indices`); None means all.
        solver: `clarabel`, an interior-point method, or the authors' `scs`, first-order and several times slower here.
        base: a defense whose network is trained first and frozen, and whose last two linear layers are replaced; None
            trains on pixels, which alone can be certified.
        base_epochs: of the base's training; None leaves its default.
    """

    activation: Activation = "polynomial"
    form: Literal["auto", "program", "scalable"] = "auto"
    multi_class: Literal["pairwise", "one-vs-all"] = "pairwise"
    loss: Literal["hinge", "squared"] = "hinge"
    ball: Norm = "l2"
    radius: float
    beta: float = 1e-4
    width: int = 128
    penalty: float = 0.1
    components: int | None = None
    feature_norm: float | None = None
    robust_examples: int | None = None
    solver: Literal["clarabel", "scs"] = "clarabel"
    base: str | None = None
    base_epochs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius < 0 or self.beta < 0 or self.penalty < 0:
            raise ValueError(
                f"radius, beta and penalty must not be negative, not {self.radius:g}, {self.beta:g}, {self.penalty:g}"
            )
        if self.width < 1 or (self.components is not None and self.components < 1):
            raise ValueError(f"width and components must be at least 1, not {self.width} and {self.components}")
        if self.robust_examples is not None and self.robust_examples < 0:
            raise ValueError(f"robust_examples must not be negative, not {self.robust_examples}")
        if self.feature_norm is not None and self.feature_norm <= 0:
            raise ValueError(f"feature_norm must be positive or none, not {self.feature_norm:g}")
        if self.loss == "squared" and self.multi_class != "one-vs-all":
            raise ValueError("the squared loss is that of single outputs, so it goes with multi_class=one-vs-all")
        if self.ball == "linf" and self.components is not None:
            raise ValueError("principal components turn an L-inf ball into something else; use ball=l2")
        if self.augment:
            raise ValueError("worst cases are taken around the images themselves, so augment must be false")
        if self.base is None and self.architecture != TWO_LAYER:
            raise ValueError(f"the network on pixels is {TWO_LAYER}; an architecture is that of a base")

    def form_for(self, examples: int, dimension: int) -> Form:
        """The form in force for that many examples and coordinates; `auto` is decided here.

        Raises:
            DefenseError: if there is no such form.
        """
        kept = min(dimension, self.components or dimension)
        small = self.base is None and kept <= PROGRAM_DIMENSION and examples <= PROGRAM_EXAMPLES
        form: Form = ("program" if small else "scalable") if self.form == "auto" else self.form
        if form == "scalable" and self.activation == "polynomial" and self.ball == "linf":
            raise DefenseError(
                "convex: the scalable polynomial form knows the worst case of L2 balls only; use ball=l2."
            )
        return form


class ConvexTraining(Defense[ConvexHyper]):
    """Minimises the worst-case loss of a two-layer network over balls, as a convex program or in a scalable form."""

    card = DefenseCard(
        name="convex",
        title="Convex adversarial training",
        paper="https://arxiv.org/abs/2405.14033",
        authors=("Daniel Kuelbs", "Sanjay Lall", "Mert Pilanci"),
        year=2024,
        kind="certified",
        summary="A two-layer network is trained on exact worst-case losses over balls, a problem that is convex.",
        # The abstracts have no numbers, and the tables were not at hand: bench/claims has what they say in words.
        claims=(),
    )
    hyper_type = ConvexHyper

    def defaults(self, data: TrainingData, threat: ThreatModel) -> ConvexHyper:
        """What suits the data, the radius, and the variant that is asked for."""
        asked = {name: value for name, value in self.overrides.items() if name in _VARIANT}
        plain = ConvexHyper(architecture=TWO_LAYER, epochs=1, radius=0.0)
        variant = apply_overrides(plain, asked, owner=self.card.name)
        images = data.train.images
        examples, dimension = len(images), images[0].numel() if len(images) else 1
        program = variant.form_for(examples, dimension) == "program"
        components = 64 if variant.base is not None and "components" not in asked else variant.components
        ball = variant.ball
        if "ball" not in asked and components is None and (variant.activation == "relu" or program):
            ball = threat.norm
        relu, small = variant.activation == "relu", examples < 5000
        return dataclasses.replace(
            variant,
            architecture=TWO_LAYER if variant.base is None else default_for(data.image_shape),
            epochs=min(40, max(2, round((300_000 if relu else 800_000) / max(1, examples)))),
            batch_size=64 if small else 256,
            lr=5e-3 if relu else 2e-2,
            multi_class="pairwise" if data.classes <= PAIRWISE_CLASSES else "one-vs-all",
            ball=ball,
            radius=_radius(variant, ball, threat, data),
            beta=1e-3 if program else 1e-4,
            width=128 if not relu or dimension <= 256 else 64 if dimension <= 1024 else 32,
            components=components,
            feature_norm=1.0 if program else None,
        )

    def hyper(self, data: TrainingData, threat: ThreatModel) -> ConvexHyper:
        """The hyper-parameters in force; see `Defense.hyper`.

        Raises:
            DefenseError: also if they ask for a form that does not exist, or name no base.
        """
        hyper = super().hyper(data, threat)
        hyper.form_for(len(data.train), math.prod(data.image_shape))
        if hyper.base == self.card.name:
            raise DefenseError("convex: the base must be another defense than convex itself.")
        return hyper

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
        """Train the network on pixels, or on the features of a base that is trained first; see `Defense.fit`."""
        hyper = self.hyper(data, threat)
        if not len(data.train):
            raise DefenseError(f"convex cannot be trained on {data.name}: its training split is empty.")
        circumstances = Training(data, threat, seed, device, progress, checkpoints, self.card.name)
        form = hyper.form_for(len(data.train), math.prod(data.image_shape))
        if hyper.base is None:
            return train_head(hyper.activation, form, _head(hyper, hyper.radius), circumstances)
        base = _base(hyper).fit(data, threat, seed=seed, device=device, progress=progress, checkpoints=checkpoints)
        trunk = trunk_of(base)
        features = features_of(trunk, data, device=device)
        radius = hyper.radius * typical_norm(features.train.images)
        head = train_head(
            hyper.activation, form, _head(hyper, radius), dataclasses.replace(circumstances, data=features)
        )
        return nn.Sequential(*trunk, *head).eval()


def _radius(variant: ConvexHyper, ball: Norm, threat: ThreatModel, data: TrainingData) -> float:
    if variant.base is not None:
        return FEATURE_SHARE
    if ball == "l2" and threat.norm == "linf":
        return LINF_SHARE * threat.radius * linf_reach(data.train.images)
    return threat.radius


def _head(hyper: ConvexHyper, radius: float) -> Head:
    shared = {field.name: getattr(hyper, field.name) for field in dataclasses.fields(Head) if field.name != "recipe"}
    recipe = Recipe(**{field.name: getattr(hyper, field.name) for field in dataclasses.fields(Recipe)})
    return Head(**{**shared, "radius": radius}, recipe=recipe)


def _base(hyper: ConvexHyper) -> Defense[Any]:
    # The registry imports this module.
    from robustboard.defenses import registry

    settings: dict[str, object] = {"architecture": hyper.architecture}
    if hyper.base_epochs is not None:
        settings["epochs"] = hyper.base_epochs
    return registry.create(str(hyper.base), settings)
