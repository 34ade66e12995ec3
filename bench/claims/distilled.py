"""What is measured of networks that were distilled at a temperature T, and of the same networks without it.

The paper's measure is targeted JSMA: 100 test images, each into its nine wrong classes, with at most 112 features
changed; an attempt succeeds when the student at T = 1 predicts the target. Every function takes its sizes as
arguments, so that a test can be small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustboard.attacks.jsma import Forward, JsmaResult, jsma
from robustboard.attacks.pgd import pgd
from robustboard.bench.claims.claim import (
    Measurement,
    Under,
    from_metric,
    mean,
    number,
    paired_difference,
    share,
)
from robustboard.bench.claims.laboratory import Laboratory, Trained
from robustboard.bench.claims.saturation import log10_softmax_gradients

MNIST = "mnist-linf@1"
TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0)
HOTTEST = 100.0
PAIRS = 56
"""Steps of two features: 112 of MNIST's 784, 14.5 % rounded down; from memory the paper allows as many on CIFAR-10."""

Networks = Mapping[str, Mapping[str, object]]


def undefended(lab: Laboratory, track: str, **overrides: Any) -> Trained:
    """The same architecture and epochs without distillation."""
    return lab.network("standard", track, **overrides)


def distilled(lab: Laboratory, track: str, temperature: float, **overrides: Any) -> Trained:
    """A student; the one of the highest temperature is the board's row, so that both share one training."""
    hot: dict[str, Any] = {} if temperature == HOTTEST else {"temperature": temperature}
    return lab.network("distillation", track, **hot, **overrides)


def attempts(
    lab: Laboratory,
    trained: Trained,
    what: str,
    *,
    images: int,
    forward: Forward = "softmax",
    temperature: float = 1.0,
) -> JsmaResult:
    """JSMA on the track's first images, each into its wrong classes: K - 1 rows an image, in order, on the CPU."""
    classes = trained.data.classes
    labels = trained.test.labels[:images]
    targets = torch.tensor([k for label in labels.tolist() for k in range(classes) if k != label])
    rows = trained.test.images[:images].repeat_interleave(classes - 1, dim=0)
    lab.progress.begin(f"JSMA, {what}", len(labels))
    parts = []
    # A part is some hundreds of attempts: enough for a batch, and often enough to see progress.
    for chosen in torch.split(torch.arange(len(rows)), 50 * (classes - 1)):
        parts.append(
            jsma(
                trained.model,
                rows[chosen].to(lab.device),
                targets[chosen].to(lab.device),
                forward=forward,
                temperature=temperature,
                pairs=PAIRS,
            )
        )
        lab.progress.advance(len(chosen) // (classes - 1))
    return JsmaResult(
        torch.cat([part.images for part in parts]).cpu(),
        torch.cat([part.success for part in parts]).cpu(),
        torch.cat([part.changed for part in parts]).cpu(),
    )


def success(
    lab: Laboratory,
    trained: Trained,
    what: str,
    *,
    images: int,
    forward: Forward = "softmax",
    temperature: float = 1.0,
    under: Under = "paper",
) -> Measurement:
    """The share of JSMA's attempts that reach their target."""
    found = attempts(lab, trained, what, images=images, forward=forward, temperature=temperature)
    return share(f"JSMA success, {what}", found.success, under=under)


def protocol(lab: Laboratory, track: str) -> dict[str, Measurement]:
    """Robust accuracy under the whole protocol, with and without distillation at T = 100, and the gain in points."""
    plain, student = lab.record("standard", track), lab.record("distillation", track)
    kept = [record.outcomes["verdict"].isin(["certified", "undecided"]) for record in (student, plain)]
    return {
        "robust without": from_metric("robust accuracy, undefended", plain, "robust"),
        "robust with": from_metric("robust accuracy, distilled at T = 100", student, "robust"),
        "gain": paired_difference("robust accuracy that distillation adds", *kept, under="protocol"),
    }


def jsma_at_the_ends(
    lab: Laboratory, *, track: str, networks: Networks, images: int = 100, with_protocol: bool = True
) -> dict[str, Measurement]:
    """JSMA with and without distillation at T = 100, on z / T and on the logits, for each network; and the protocol.

    Args:
        lab: where to measure.
        track: whose data and radius.
        networks: overrides by what to call a network; without overrides it is the board's own.
        images: how many of the track's first images are attacked.
        with_protocol: whether to add the protocol's numbers.
    """
    found: dict[str, Measurement] = {}
    for name, overrides in networks.items():
        plain = undefended(lab, track, **overrides)
        measure = partial(success, lab, distilled(lab, track, HOTTEST, **overrides), images=images)
        found[f"{name}: without"] = success(lab, plain, f"{name}, undefended", images=images)
        found[f"{name}: with"] = measure(f"{name}, distilled at T = 100")
        found[f"{name}: divided"] = measure(f"{name}, distilled, z / T", temperature=HOTTEST, under="control")
        found[f"{name}: logits"] = measure(f"{name}, distilled, logits", forward="logits", under="control")
    return found | (protocol(lab, track) if with_protocol else {})


def over_temperatures(
    lab: Laboratory,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    track: str = MNIST,
    images: int = 100,
    examples: int = 500,
) -> dict[str, Measurement]:
    """For each temperature JSMA's success, and the accuracy that is left by PGD as the protocol runs it."""
    found: dict[str, Measurement] = {}
    for temperature in (None, *temperatures):
        name = "undefended" if temperature is None else f"T = {temperature:g}"
        trained = undefended(lab, track) if temperature is None else distilled(lab, track, temperature)
        found[f"jsma, {name}"] = success(lab, trained, name, images=images)
        kept = _survives(lab, trained, name, examples=examples)
        found[f"pgd, {name}"] = share(f"accuracy under the protocol's PGD, {name}", kept, under="protocol")
    return found


def gradient_sizes(
    lab: Laboratory, *, temperatures: Sequence[float] = TEMPERATURES, track: str = MNIST, examples: int = 1000
) -> dict[str, Measurement]:
    """The softmax's derivative by temperature: median over test images, and the share below 1e-30; z / T besides."""
    found: dict[str, Measurement] = {}
    for temperature in (None, *temperatures):
        name = "undefended" if temperature is None else f"T = {temperature:g}"
        trained = undefended(lab, track) if temperature is None else distilled(lab, track, temperature)
        images = trained.test.images[:examples].to(lab.device)
        lab.progress.begin(f"gradients, {name}", 1)
        sizes = log10_softmax_gradients(trained.model, images)
        what = f"log10 of mean |dF/dx|, median over test images, {name}"
        found[f"median, {name}"] = number(what, float(sizes.median()), len(sizes))
        found[f"below, {name}"] = share(f"test images with mean |dF/dx| below 1e-30, {name}", sizes < -30)
        if temperature is not None:
            divided = log10_softmax_gradients(trained.model, images, temperature=temperature)
            what = f"log10 of mean |dF/dx| with z / T, median over test images, {name}"
            found[f"divided, {name}"] = number(what, float(divided.median()), len(divided), under="control")
        lab.progress.advance()
    return found


def features_needed(lab: Laboratory, *, track: str = MNIST, images: int = 100) -> dict[str, Measurement]:
    """How many features JSMA must change, the least over an image's targets, on average over images.

    An image whose every attempt fails counts with the whole budget, 112 features; one that is misclassified as it
    stands counts with none.
    """
    plain, student = undefended(lab, track), distilled(lab, track, HOTTEST)
    rows = {
        "without": least_features(attempts(lab, plain, "undefended", images=images), plain.data.classes),
        "with": least_features(attempts(lab, student, "distilled", images=images), student.data.classes),
        "divided": least_features(
            attempts(lab, student, "distilled, z / T", images=images, temperature=HOTTEST), student.data.classes
        ),
    }
    return {
        "without": mean("features that must change, undefended", rows["without"], unit="count"),
        "with": mean("features that must change, distilled at T = 100", rows["with"], unit="count"),
        "divided": mean("features that must change, distilled, z / T", rows["divided"], unit="count", under="control"),
    }


def least_features(found: JsmaResult, classes: int) -> Tensor:
    """For each image the fewest features of a successful attempt, 2 `PAIRS` where there is none; int64 (N,)."""
    counted = found.changed.masked_fill(~found.success, 2 * PAIRS).view(-1, classes - 1)
    return counted.amin(dim=1)


def clean_accuracy(
    lab: Laboratory, *, temperatures: Sequence[float] = TEMPERATURES, track: str = MNIST
) -> dict[str, Measurement]:
    """The clean accuracy that distillation adds at each temperature, in points, on the track's examples."""
    plain = undefended(lab, track)
    right = _right(lab, plain)
    found = {"undefended": share("clean accuracy, undefended", right)}
    for temperature in temperatures:
        kept = _right(lab, distilled(lab, track, temperature))
        found[f"T = {temperature:g}"] = paired_difference(f"clean accuracy added at T = {temperature:g}", kept, right)
    return found


def _right(lab: Laboratory, trained: Trained, images: Tensor | None = None) -> Tensor:
    """Which of the track's examples, or of the images that stand for its first ones, are classified correctly."""
    images = trained.test.images if images is None else images
    with torch.no_grad():
        found = [trained.model(part.to(lab.device)).argmax(dim=1).cpu() for part in torch.split(images, 500)]
    return torch.cat(found) == trained.test.labels[: len(images)]


def _survives(lab: Laboratory, trained: Trained, what: str, *, examples: int) -> Tensor:
    """Which of the track's first examples stay correct under the protocol's PGD, on the CPU."""
    images, labels = trained.test.images[:examples].to(lab.device), trained.test.labels[:examples].to(lab.device)
    settings = trained.track.attacks.pgd
    lab.progress.begin(f"PGD, {what}", 1)
    found = pgd(
        trained.model,
        images,
        labels,
        threat=trained.threat,
        keys=trained.keys[:examples],
        seed=settings.seed,
        steps=settings.steps,
        restarts=settings.restarts,
        step_size=float(settings.step) * trained.threat.radius,
        losses=settings.losses_for(trained.data.classes),
    )
    lab.progress.advance()
    return _right(lab, trained, found)
