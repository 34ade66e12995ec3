"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690), stage by stage, through its authors' code (`pyautoattack`).

This is the reference engine: each stage runs what `AutoAttack(version="standard", seed=seed)` runs, with the same
hyper-parameters, seeds and batches, so that a cascade of the four stages over what survives gives the verdicts of
`run_standard_evaluation`. Around it stands what that code leaves to its caller: results are projected into the ball and
checked, the caller's random state and parameter gradients are left alone, and its warnings become data.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from robustboard.attacks import global_draws
from robustboard.attacks.guards import NO_GRADIENT, require_eval, require_finite, require_shape
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import ModelError, TrackError

STAGES = ("apgd_ce", "apgd_t", "fab_t", "square")
_THEIR_NORMS: Mapping[str, str] = MappingProxyType({"linf": "Linf", "l2": "L2"})
_TARGETS = 9
_LEAST_CLASSES: Mapping[str, int] = MappingProxyType({"apgd_t": 4})


@dataclass(frozen=True)
class StageResult:
    """What one stage found.

    Attributes:
        adversarial: (N, C, H, W): the misclassified image where the stage found one, the clean image elsewhere; all
            satisfy `threat.contains`.
        warnings: what the engine warned of, a sentence each.
    """

    adversarial: Tensor
    warnings: tuple[str, ...]


def applicable(classes: int) -> tuple[str, ...]:
    """The stages that are defined for so many classes: the targeted DLR loss of `apgd_t` needs four.

    >>> applicable(2)
    ('apgd_ce', 'fab_t', 'square')
    """
    return tuple(stage for stage in STAGES if classes >= _LEAST_CLASSES.get(stage, 2))


def run_stage(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: ThreatModel,
    stage: str,
    seed: int,
    batch_size: int,
    classes: int,
    queries: int | None = None,
) -> StageResult:
    """Run one stage of the standard version on images that are still classified correctly.

    The engine draws by batch and reseeds for each, so verdicts belong to the order and `batch_size` as given. With
    fewer than ten classes the targeted stages try all K - 1 targets.

    Args:
        model: in eval mode; float32 images (N, C, H, W) in [0, 1] to logits (N, K).
        images: the clean images, on the model's device.
        labels: int64 (N,).
        threat: the ball.
        stage: one of `applicable(classes)`.
        seed: of the engine's random draws.
        batch_size: images attacked together.
        classes: K.
        queries: for Square, fewer than the standard version's 5000, its schedule drawn together accordingly. What
            runs then is Square Attack, and no stage of AutoAttack.

    Raises:
        TrackError: for a stage that is unknown or that these classes or images do not admit.
        ModelError: if the model is in training mode, or its logits are not finite, not of shape (N, K), or give no
            gradient to the input.
    """
    require_eval(model)
    _require_stage(stage, threat, images, classes)
    guarded = _Guarded(model, classes)
    with _isolated(model), _heard() as heard:
        attack = _stage(
            guarded, threat=threat, stage=stage, seed=seed, classes=classes, device=images.device, queries=queries
        )
        found = [
            attack(images[first : first + batch_size].clone(), labels[first : first + batch_size].clone())
            for first in range(0, len(images), batch_size)
        ]
    adversarial = threat.project(torch.cat(found) if found else images.clone(), images)
    # Where the model's gradient is not a number the engine can return images that are not either: no break at all.
    allowed = threat.contains(adversarial, images).view(-1, *[1] * (images.dim() - 1))
    return StageResult(torch.where(allowed, adversarial, images), heard.sentences())


def reference_checks(
    model: nn.Module, images: Tensor, labels: Tensor, *, classes: int, batch_size: int
) -> tuple[str, ...]:
    """The checks that the standard version makes of a model on its first batch, as sentences; none when all is well.

    They look for randomness, for probabilities instead of logits, and for gradients used inside the forward pass.

    Raises:
        ModelError: if the model is in training mode, or its logits are not finite.
    """
    require_eval(model)
    if not len(images):
        return ()
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    first, own = images[:batch_size], labels[:batch_size]
    guarded = _Guarded(model, classes)
    with _isolated(model), _heard() as heard:
        checks.check_randomized(guarded, first, own, bs=batch_size, logger=logger)
        checks.check_range_output(guarded, first, logger=logger)
        # Their call counters are never reset, so that one suspect would taint every later model.
        checks.funcs.update(dict.fromkeys(checks.funcs, 0))
        tracer = sys.gettrace()
        try:
            checks.check_dynamic(guarded, first, False, logger=logger)
        finally:
            sys.settrace(tracer)
        names = [stage.replace("_", "-") for stage in applicable(classes)]
        targets = min(_TARGETS, classes - 1)
        checks.check_n_classes(classes, names, targets, targets, logger=logger)
    return heard.sentences()


def square_gain(*, before: float, after: float) -> tuple[str, ...]:
    """The engine's last check: a sentence if Square, which uses no gradients, lowers the robust accuracy noticeably.

    Args:
        before: the robust accuracy of the other stages together, in [0, 1].
        after: the robust accuracy with Square.

    >>> square_gain(before=0.5, after=0.499)
    ()
    """
    from pyautoattack import checks

    with _heard() as heard:
        accuracies = {"clean": 1.0, "others": before, "square": after}
        checks.check_square_sr(accuracies, logger=logging.getLogger("auto-attack"))
    return heard.sentences()


def _require_stage(stage: str, threat: ThreatModel, images: Tensor, classes: int) -> None:
    if stage not in STAGES:
        raise TrackError(f"The AutoAttack stage {stage!r} is unknown; choose from {', '.join(STAGES)}.")
    if classes < (least := _LEAST_CLASSES.get(stage, 2)):
        raise TrackError(f"The AutoAttack stage {stage} needs at least {least} classes, not {classes}; leave it out.")
    if stage == "square" and threat.norm == "l2" and min(images.shape[-2:]) < 5:
        size = " x ".join(str(side) for side in images.shape[-2:])
        raise TrackError(f"Square Attack in L2 needs images of at least 5 x 5 pixels, not {size}; leave it out.")


def _stage(
    model: _Guarded,
    *,
    threat: ThreatModel,
    stage: str,
    seed: int,
    classes: int,
    device: torch.device,
    queries: int | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of a batch that `run_standard_evaluation` would call for this stage."""
    from pyautoattack import AutoAttack

    engine = AutoAttack(
        model, norm=_THEIR_NORMS[threat.norm], eps=threat.radius, seed=seed, version="standard", device=device
    )
    engine.apgd_targeted.n_target_classes = engine.fab.n_target_classes = min(_TARGETS, classes - 1)
    engine.apgd.loss = "ce"
    engine.fab.targeted = True
    if queries is not None:
        engine.square.n_queries, engine.square.rescale_schedule = queries, True
    attacks: dict[str, Any] = {
        "apgd_ce": engine.apgd,
        "apgd_t": engine.apgd_targeted,
        "fab_t": engine.fab,
        "square": engine.square,
    }
    perturb: Callable[[Tensor, Tensor], Tensor] = attacks[stage].perturb
    return perturb


class _Guarded:
    """The model as a function whose logits are checked.

    Only finite images count: FAB's own arithmetic can divide zero by zero and then feeds the model NaN pixels.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        self._model, self._classes = model, classes

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self._model(images)
        require_shape(logits, len(images), self._classes)
        if images.requires_grad and not logits.requires_grad:
            raise ModelError(NO_GRADIENT)
        if not bool(logits.isfinite().all()):
            require_finite(logits[images.isfinite().flatten(1).all(dim=1)], "logits")
        return logits


@contextmanager
def _isolated(model: nn.Module) -> Iterator[None]:
    """No graphs, no parameter gradients, and torch's global generators as they were before.

    The engine seeds the global generators, and its FAB calls `backward`, which would fill every parameter's gradient.
    """
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with global_draws.preserved(devices), torch.no_grad():
        try:
            for parameter in thawed:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in thawed:
                parameter.requires_grad_(True)


class _Heard(logging.Handler):
    """Keeps the engine's warnings: the first of each kind, with how often it came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kinds: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"\s*See \S+ for details\.$", "", record.getMessage()).strip()
        sentence = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!")) else ".")
        # "3 points" in one batch and "4 points" in the next are one kind of warning.
        self._kinds.setdefault(re.sub(r"\d+", "#", sentence), []).append(sentence)

    def sentences(self) -> tuple[str, ...]:
        return tuple(
            said[0] if len(said) == 1 else f"{said[0]} (Said {len(said)} times, here the first.)"
            for said in self._kinds.values()
        )


@contextmanager
def _heard() -> Iterator[_Heard]:
    """Collect what the engine's logger says meanwhile, instead of printing it."""
    logger = logging.getLogger("auto-attack")
    handler, level, propagate, disabled = _Heard(), logger.level, logger.propagate, logger.disabled
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = logger.disabled = False
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
