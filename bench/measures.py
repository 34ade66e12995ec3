"""The measurements behind the diagnostics, as the model's process runs them: tensors in, plain numbers and flags out.

A measure never judges. Its budget is a number of steps or queries, declared here and versioned with the thresholds in
`bench/diagnostics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from robustboard.attacks import attack_comparisons, autoattack, gradient_checks
from robustboard.attacks.binarization import binarization_test
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.channel import Array
from robustboard.defenses.contract import logit_change, require_form

SEED = 0
LOSS_STEPS = 20
UNBOUNDED_STEPS = 40
SQUARE_QUERIES = 1000
MORE_STEPS, MORE_RESTARTS = 100, 3
BINARY_STEPS, BINARY_RESTARTS = 40, 5

_MORE_SEED = 1
"""Not the protocol's: the same random starts would find the same again."""


@dataclass(frozen=True)
class Subject:
    """What a measure looks at.

    Attributes:
        model: in eval mode.
        images: (N, C, H, W), all classified correctly.
        labels: int64 (N,).
        keys: a content hash an example.
        threat: the track's ball.
        classes: K.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    keys: Sequence[str]
    threat: ThreatModel
    classes: int


@dataclass(frozen=True)
class Measured:
    """Numbers by what they are, and arrays: flags (N,) and perturbed images (N, C, H, W)."""

    values: Mapping[str, float]
    arrays: Mapping[str, Array]


def measure(name: str, subject: Subject) -> Measured:
    """One measurement by its name in `MEASURES`."""
    return MEASURES[name](subject)


def _gradients(subject: Subject) -> Measured:
    model, images, labels = subject.model, subject.images, subject.labels
    health = gradient_checks.gradient_health(model, images, labels)
    faces = gradient_checks.face_gradients(model, images, labels)
    scale = gradient_checks.logit_scale(model, images)
    steepest, random = gradient_checks.finite_differences(model, images, labels, keys=subject.keys, seed=SEED)
    return Measured(
        {
            "zero margin": health.zero_margin,
            "zero ce": health.zero_ce,
            "not finite": health.not_finite,
            "faces alive": faces.alive,
            "faces dead": faces.dead,
            "mean largest logit": scale.mean_largest,
            "median gap": scale.median_gap,
            "certain": scale.certain,
        },
        {"steepest": _array(steepest), "random": _array(random)},
    )


def _autograd_mode(subject: Subject) -> Measured:
    """The largest change of a logit under autograd, as a share of the largest logit, over all the examples."""
    with torch.inference_mode():
        plain = subject.model(subject.images).clone()
    with torch.enable_grad():
        traced = subject.model(subject.images.clone().requires_grad_()).detach()
    require_form(traced, len(plain), subject.classes)
    return Measured({"change": logit_change(traced, plain, plain.abs().amax().clamp(min=1.0))}, {})


def _losses(subject: Subject) -> Measured:
    threat = subject.threat
    survived = attack_comparisons.compare_losses(
        subject.model,
        subject.images,
        subject.labels,
        threat=threat,
        keys=subject.keys,
        seed=SEED,
        steps=LOSS_STEPS,
        step_size=threat.radius / 8,
    )
    one = attack_comparisons.single_step(subject.model, subject.images, subject.labels, threat=threat)
    return Measured({**{loss: int(left.sum()) for loss, left in survived.items()}, "single step": int(one.sum())}, {})


def _unbounded(subject: Subject) -> Measured:
    left = attack_comparisons.unbounded(
        subject.model,
        subject.images,
        subject.labels,
        threat=subject.threat,
        keys=subject.keys,
        seed=SEED,
        steps=UNBOUNDED_STEPS,
    )
    return Measured({"survived": int(left.sum())}, {})


def _square(subject: Subject) -> Measured:
    result = autoattack.run_stage(
        subject.model,
        subject.images,
        subject.labels,
        threat=subject.threat,
        stage="square",
        seed=SEED,
        batch_size=len(subject.images),
        classes=subject.classes,
        queries=SQUARE_QUERIES,
    )
    return Measured({}, {"adversarial": _array(result.adversarial)})


def _more_work(subject: Subject) -> Measured:
    found = pgd(
        subject.model,
        subject.images,
        subject.labels,
        threat=subject.threat,
        keys=subject.keys,
        seed=_MORE_SEED,
        steps=MORE_STEPS,
        restarts=MORE_RESTARTS,
        step_size=subject.threat.radius / 20,
        losses=("margin",),
    )
    return Measured({}, {"adversarial": _array(found)})


def _binarization(subject: Subject) -> Measured:
    test = binarization_test(
        subject.model,
        subject.images,
        threat=subject.threat,
        keys=subject.keys,
        seed=SEED,
        steps=BINARY_STEPS,
        restarts=BINARY_RESTARTS,
        step_size=subject.threat.radius / 10,
    )
    return Measured(
        {
            "built": int(test.built.sum()),
            "found": int((test.built & test.found).sum()),
            "random": int((test.built & test.random).sum()),
        },
        {},
    )


MEASURES: Mapping[str, Callable[[Subject], Measured]] = MappingProxyType(
    {
        "autograd mode": _autograd_mode,
        "gradients": _gradients,
        "losses": _losses,
        "unbounded": _unbounded,
        "square": _square,
        "more work": _more_work,
        "binarization": _binarization,
    }
)


def _array(tensor: Tensor) -> Array:
    array: Array = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return array
