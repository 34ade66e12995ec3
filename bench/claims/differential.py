"""What is claimed of differential training (Nar et al. 2019, arXiv 1901.08360), measured.

Of the paper the abstract was at hand, and summaries of the rest. The network, the two classes, the optimiser and the
radii of its experiment are therefore partly reconstructed, and each claim says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from robustboard.attacks.keyed import content_hash
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.arrays import as_floats
from robustboard.bench.claims.claim import (
    Measurement,
    PaperClaim,
    PaperNumber,
    Under,
    Verdict,
    from_metric,
    mean,
    number,
    paired_difference,
    share,
)
from robustboard.bench.claims.laboratory import Laboratory, Trained
from robustboard.bench.claims.linear_margins import linear_margins
from robustboard.defenses.adapter import Split
from robustboard.defenses.feature_rank import feature_rank, idle_share, last_layer, penultimate_features

PLANE_HORSE = "cifar10-q75-plane-horse-linf@1"
THREE_EIGHT = "mnist-3v8-linf@1"
EPOCHS: Mapping[str, int] = {PLANE_HORSE: 50, THREE_EIGHT: 15}
RADII: Mapping[str, tuple[str, ...]] = {PLANE_HORSE: ("2/255", "4/255", "8/255"), THREE_EIGHT: ("1/20", "1/10", "1/5")}
FORMS = ("log", "squared")
CONTROLS = ("centred-cross-entropy", "pointwise-squared")
PAPER = "arXiv 1901.08360"


def network(lab: Laboratory, track: str, loss: str) -> Trained:
    """LeNet, trained on a binary track without augmentation; the loss alone tells the networks of a track apart."""
    return lab.network("differential", track, **_settings(track, loss))


def _settings(track: str, loss: str) -> dict[str, Any]:
    return {"architecture": "lenet", "augment": False, "epochs": EPOCHS[track], "loss": loss}


def attack_success(
    lab: Laboratory, model: nn.Module, split: Split, radii: Sequence[str], *, steps: int, restarts: int, what: str
) -> list[Tensor]:
    """For each radius, which of the correctly classified images PGD on the raw margin breaks, booleans (N,).

    The radii rise, and what is broken at one is broken at the next.
    """
    with torch.no_grad():
        right = model(split.images.to(lab.device)).argmax(dim=1).cpu() == split.labels
    images, labels = split.images[right].to(lab.device), split.labels[right].to(lab.device)
    keys = [content_hash(image.numpy()) for image in split.images[right]]
    broken, found = torch.zeros(len(images), dtype=torch.bool), []
    lab.progress.begin(f"PGD, {what}", len(radii))
    for eps in radii:
        threat, left = ThreatModel("linf", Fraction(eps)), (~broken).nonzero().flatten()
        points = pgd(
            model,
            images[left],
            labels[left],
            threat=threat,
            keys=[keys[place] for place in left.tolist()],
            seed=lab.seed,
            steps=steps,
            restarts=restarts,
            step_size=threat.radius / 10,
            losses=("margin",),
        )
        with torch.no_grad():
            broken[left] = (model(points).argmax(dim=1) != labels[left]).cpu()
        found.append(broken.clone())
        lab.progress.advance()
    return found


def attack_rates(
    lab: Laboratory, track: str, *, images: int = 150, steps: int = 100, restarts: int = 5, judged: int | None = 150
) -> dict[str, Measurement]:
    """PGD's success on training and test images for every loss, and the protocol's where the verdict needs it.

    Args:
        lab: where networks come from.
        track: a binary track.
        images: how many images of each part are attacked; of the controls only test images are.
        steps: of PGD.
        restarts: of PGD.
        judged: how many examples the protocol judges; None is the track's number.
    """
    found: dict[str, Measurement] = {}
    for loss in ("cross-entropy", *FORMS, *CONTROLS):
        trained = network(lab, track, loss)
        under: Under = "control" if loss in CONTROLS else "paper"
        parts = {"test": trained.test} if loss in CONTROLS else {"train": trained.data.train, "test": trained.test}
        for part, split in parts.items():
            some = Split(split.images[:images], split.labels[:images])
            flags = attack_success(
                lab, trained.model, some, RADII[track], steps=steps, restarts=restarts, what=f"{loss}, {part} images"
            )
            for eps, broken in zip(RADII[track], flags, strict=True):
                found[f"{loss} {part} {eps}"] = share(
                    f"PGD success on {part} images at {eps}, {loss}", broken, under=under
                )
    for loss in ("cross-entropy", *FORMS):
        record = lab.record("differential", track, n=judged, **_settings(track, loss))
        for metric in ("clean", "pgd", "robust"):
            found[f"{loss} {metric}"] = from_metric(f"{metric} accuracy, {loss}", record, metric)
    return found


def judge_attack_rates(found: Mapping[str, Measurement], *, eps: str, otherwise: Verdict) -> Verdict:
    """The rule of the claims on attacks: success at most half of cross-entropy's, under PGD and under the protocol."""

    def protocol_success(loss: str) -> float:
        return 1 - found[f"{loss} robust"].value / found[f"{loss} clean"].value

    good = [
        form
        for form in FORMS
        if all(
            found[f"{form} {part} {eps}"].value <= found[f"cross-entropy {part} {eps}"].value / 2
            for part in ("train", "test")
        )
    ]
    if not good:
        return otherwise
    holds = any(protocol_success(form) <= protocol_success("cross-entropy") / 2 for form in good)
    return "reproduced" if holds else "broken under the protocol"


def _attack_rule(eps: str, otherwise: Verdict) -> str:
    return (
        f"At {eps}, the track's radius, PGD's success must be at most half of what it is against cross-entropy, on "
        f"training and on test images, for one of the forms (L) and (S); else: {otherwise}. The same must hold of "
        "such a form's success under all attacks of the protocol, 1 - robust / clean; else: broken under the protocol."
    )


def accuracies(lab: Laboratory) -> dict[str, Measurement]:
    """Clean accuracy on the whole test part, and how it differs from cross-entropy's on the same images."""
    whole = lab.dataset(PLANE_HORSE).test
    images, labels = torch.from_numpy(as_floats(whole.images)), torch.from_numpy(whole.labels)
    found: dict[str, Measurement] = {}
    right: dict[str, Tensor] = {}
    for loss in ("cross-entropy", *FORMS):
        model = network(lab, PLANE_HORSE, loss).model
        with torch.no_grad():
            right[loss] = model(images.to(lab.device)).argmax(dim=1).cpu() == labels
        found[loss] = share(f"clean accuracy, {loss}", right[loss])
    for form in FORMS:
        found[f"{form} gain"] = paired_difference(f"{form} less cross-entropy", right[form], right["cross-entropy"])
    return found


def judge_accuracies(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on clean accuracy."""
    return "reproduced" if max(found[f"{form} gain"].value for form in FORMS) >= -2 else "not reproduced"


def ranks(lab: Laboratory) -> dict[str, Measurement]:
    """How many of the 84 dimensions the penultimate features of the training images use."""
    found: dict[str, Measurement] = {}
    for loss in ("cross-entropy", *FORMS):
        trained = network(lab, PLANE_HORSE, loss)
        features = penultimate_features(trained.model, trained.data.train.images)
        rank, n = feature_rank(features), len(features)
        under: Under = "paper" if loss == "cross-entropy" else "control"
        distance = rank.offset / float(features.square().sum(dim=1).mean())
        for key, what, value in (
            ("k_95", "components that hold 95 % of the variance", rank.k_95),
            ("k_99", "components that hold 99 % of the variance", rank.k_99),
        ):
            found[f"{loss} {key}"] = number(f"{what}, {loss}", value, n, unit="count", under=under)
        found[f"{loss} stable rank"] = number(f"stable rank, {loss}", rank.stable_rank, n, under=under)
        found[f"{loss} offset"] = number(
            f"sum of Delta_k^2 over the mean squared length, {loss}", distance, n, under=under
        )
        rows = last_layer(trained.model).weight
        idle = idle_share(rows[1] - rows[0], features)
        found[f"{loss} idle"] = number(
            f"squared weight outside the components for 99 %, {loss}", idle, n, unit="share", under=under
        )
    return found


def judge_ranks(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on ranks."""
    return "reproduced" if found["cross-entropy k_99"].value <= 21 else "not reproduced"


def theorems(lab: Laboratory, *, sets: int = 5, steps: int = 4000) -> dict[str, Measurement]:
    """Margins of linear classifiers on several data sets, relative to what theory says of them."""
    lab.progress.begin("linear classifiers", sets)
    margins = []
    for place in range(sets):
        margins.append(linear_margins(lab.seed + place, steps=steps))
        lab.progress.advance()
    reached = min(each.differential / each.largest for each in margins)
    above = max(each.cross_entropy / each.bound for each in margins)
    return {
        "differential": number("least margin, differential training, over the largest", reached, sets, unit="ratio"),
        "bound": number("greatest margin, cross-entropy, over its bound", above, sets, unit="ratio"),
        "cross-entropy": mean(
            "margin, cross-entropy, over the largest",
            [each.cross_entropy / each.largest for each in margins],
            unit="ratio",
        ),
    }


def judge_theorems(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on linear classifiers."""
    holds = found["differential"].value >= 0.99 and found["bound"].value <= 1.01
    return "reproduced" if holds else "not reproduced"


_RECONSTRUCTED = (
    "LeNet-5 with an 84-dimensional penultimate layer and the two classes are from memory; optimiser (Adam, one "
    "cycle), epochs (50, on MNIST 15), radii and PGD's settings (margin, 100 steps of eps / 10, 5 restarts) are ours."
)

CLAIMS: tuple[PaperClaim, ...] = (
    PaperClaim(
        id="differential-linear-margin",
        defense="differential",
        statement="On separable data, descent on the differential loss finds the largest margin, while on the "
        "cross-entropy it ends below a bound that falls as the data move away from the origin.",
        paper=(
            PaperNumber("margin of differential training over the largest", 1.0, "abstract; theorem 2 from memory"),
            PaperNumber(
                "margin of cross-entropy, at most",
                "1 / sqrt(1 / gamma^2 + B^2 sum_k Delta_k^2)",
                "theorem 1, from memory",
            ),
        ),
        data="Ours: 60 points of two classes in a plane one unit off the origin in each of 8 more directions; 5 draws.",
        rule="The least ratio of differential training's margin to the largest must be at least 0.99, and the greatest "
        "ratio of cross-entropy's margin to its bound at most 1.01; else: not reproduced.",
        measure=theorems,
        judge=judge_theorems,
        note="The bound is one of the offset that is penalised like a weight: features less their mean escape it.",
    ),
    PaperClaim(
        id="differential-pgd-cifar10",
        defense="differential",
        statement="Differential training radically reduces the ratio of training and test images for which PGD finds "
        "an adversarial example.",
        paper=(
            PaperNumber("ratio of images with an adversarial example", "radically reduced", f"{PAPER}, abstract"),
            PaperNumber("the same", "almost zero", "a machine-made summary of the paper; its abstract does not say so"),
        ),
        data="Airplanes and horses of CIFAR-10 at JPEG quality 75 (9000 training images); the first 150 images of each "
        "part, and the first 150 of the track under the protocol.",
        rule=_attack_rule("8/255", "not reproduced"),
        measure=lambda lab: attack_rates(lab, PLANE_HORSE),
        judge=lambda found: judge_attack_rates(found, eps="8/255", otherwise="not reproduced"),
        note=f"{_RECONSTRUCTED} The paper's form of the loss for nonlinear networks was not at hand, so both are "
        "measured, and the better one counts. The control pointwise-squared is (S) without differences.",
    ),
    PaperClaim(
        id="differential-pgd-mnist-3v8",
        defense="differential",
        statement="What differential training does to PGD's success on CIFAR-10 it does on other binary image tasks.",
        paper=(
            PaperNumber(
                "ratio of images with an adversarial example", "radically reduced", f"{PAPER}, abstract, CIFAR-10"
            ),
        ),
        data="Threes and eights of MNIST, which the paper does not use; the first 150 images of each part, and "
        "the first 150 of the track under the protocol.",
        rule=_attack_rule("1/10", "not transferred"),
        measure=lambda lab: attack_rates(lab, THREE_EIGHT),
        judge=lambda found: judge_attack_rates(found, eps="1/10", otherwise="not transferred"),
        note=_RECONSTRUCTED,
    ),
    PaperClaim(
        id="differential-clean-accuracy",
        defense="differential",
        statement="Differential training costs no clean accuracy.",
        paper=(PaperNumber("loss of clean accuracy", "none", "a summary of the paper; no number at hand"),),
        data="All 2000 test airplanes and horses of CIFAR-10 at JPEG quality 75.",
        rule="One of the forms (L) and (S) must be at most 2 points below cross-entropy; else: not reproduced.",
        measure=accuracies,
        judge=judge_accuracies,
        note=_RECONSTRUCTED,
    ),
    PaperClaim(
        id="differential-low-rank-features",
        defense="differential",
        statement="The penultimate features of a network that is trained with cross-entropy have a low rank.",
        paper=(
            PaperNumber("components of 84 that hold almost all of the variance", "about 20", f"{PAPER}, from memory"),
        ),
        data="The 9000 training airplanes and horses of CIFAR-10 at JPEG quality 75.",
        rule="21 of the 84 components must hold 99 % of the variance under cross-entropy; else: not reproduced.",
        measure=ranks,
        judge=judge_ranks,
        note=_RECONSTRUCTED,
    ),
)
