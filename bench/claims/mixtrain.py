"""What is claimed of MixTrain (Wang et al. 2018, arXiv 1811.02625) and of its attack (arXiv 1906.02282), measured.

Of both papers the abstracts and the authors' libraries were at hand; table values are a third party's transcription
(the SoK certified-robustness board) or from memory, as each says.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustboard.attacks.pgd import pgd
from robustboard.bench.claims.claim import Measurement, PaperClaim, PaperNumber, Verdict, from_metric, number, share
from robustboard.bench.claims.interval_gain import interval_gain
from robustboard.bench.claims.laboratory import Laboratory, Trained
from robustboard.bench.claims.training_cost import step_costs, times_to_equal
from robustboard.defenses.adapter import Split
from robustboard.defenses.verifier import Verifier
from robustboard.errors import GateError

ABSTRACT = "abstract of arXiv 1811.02625 v2"
BOARD = "transcribed by the SoK certified-robustness board"
IMAGENET = 0.194


def verified_accuracy(
    lab: Laboratory, track: str, *, images: int = 500, judged: int | None = None, **overrides: Any
) -> dict[str, Measurement]:
    """The paper's three figures on the same test images, and the protocol's verdicts on the same network.

    Args:
        lab: where the network comes from.
        track: of MNIST.
        images: how many test images the paper's figures are taken on.
        judged: how many examples the protocol judges; None is the track's number.
        **overrides: hyper-parameters.

    Raises:
        GateError: if an image is verified and misclassified within the ball.
    """
    trained = lab.network("mixtrain", track, **overrides)
    split = Split(trained.test.images[:images], trained.test.labels[:images])
    lab.progress.begin("symbolic bounds", len(split))
    verified = Verifier(trained.model, trained.data, trained.threat, bound="sym").verified(
        split, on_examples=lab.progress.advance
    )
    correct, surviving = _correct(trained, split.images, split), _correct(trained, _madry(trained, split, lab), split)
    if bool((verified & ~surviving).any()):
        raise GateError(f"On {track} an image is both verified and broken, so a bound or an attack is wrong.")
    record = lab.record("mixtrain", track, n=judged, **overrides)
    return {
        "accuracy": share("test accuracy", correct),
        "verified": share("verified by symbolic linear intervals", verified),
        "surviving": share("correct under PGD on cross-entropy, 40 steps of 0.01", surviving),
        "certified": from_metric("certified accuracy", record, "certified"),
        "robust": from_metric("robust accuracy", record, "robust"),
    }


def judge_verified_accuracy(found: Mapping[str, Measurement], *, target: float) -> Verdict:
    """The rule of the claims on verified accuracy."""
    return "reproduced" if found["verified"].high >= target else "not reproduced"


def costs(lab: Laboratory) -> dict[str, Measurement]:
    """Steps on MNIST, and whole trainings on digits."""
    return {**step_costs(lab), **times_to_equal(lab)}


def judge_cost_of_verified_training(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on verified training: fifteen times, for a step and to equal verified accuracy."""
    if found["symbolic"].value < 15:
        return "not reproduced"
    return "reproduced" if found["full over mixtrain"].value >= 15 else "not transferred"


def judge_cost_of_adversarial_training(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on adversarial training."""
    return "reproduced" if found["pgd-40"].value >= 3 else "not reproduced"


def judge_interval_gain(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on the interval attack."""
    if found["gain"].value < 0.38:
        return "not reproduced"
    names = [key.removesuffix(" interval") for key in found if key.endswith(" interval")]
    beaten = all(found[f"{name} protocol"].value >= found[f"{name} interval"].value for name in names)
    return "broken under the protocol" if beaten else "reproduced"


def published_on_imagenet(lab: Laboratory) -> dict[str, Measurement]:
    """Nothing is run: the claim is about what the paper's table says."""
    del lab
    return {"published": number("verified accuracy on ImageNet-200, as published", IMAGENET, 1, unit="share")}


def judge_published(found: Mapping[str, Measurement]) -> Verdict:
    """The rule of the claim on ImageNet-200."""
    return "refuted by the paper" if found["published"].value < 0.952 else "reproduced"


def _madry(trained: Trained, split: Split, lab: Laboratory) -> Tensor:
    """PGD as the authors run it on MNIST: 40 steps of 0.01 on the cross-entropy."""
    return pgd(
        trained.model,
        split.images.to(lab.device),
        split.labels.to(lab.device),
        threat=trained.threat,
        keys=trained.keys[: len(split)],
        seed=lab.seed,
        steps=40,
        restarts=1,
        step_size=0.01,
        losses=("ce",),
    )


def _correct(trained: Trained, images: Tensor, split: Split) -> Tensor:
    device = next(trained.model.parameters()).device
    with torch.no_grad():
        correct: Tensor = trained.model(images.to(device)).argmax(dim=1).cpu() == split.labels
    return correct


_SHORT = "The authors' later code trains for sixty epochs on a GPU; here it is six, as one processor core allows."

CLAIMS: tuple[PaperClaim, ...] = (
    PaperClaim(
        id="mixtrain-verified-mnist-0.1",
        defense="mixtrain",
        statement="MixTrain reaches a verified robust accuracy of up to 95.2 % (MNIST, L-inf eps 0.1).",
        paper=(
            PaperNumber("verified robust accuracy, up to", 0.952, f"{ABSTRACT}; data set and eps inferred"),
            PaperNumber("verified robust accuracy, small network, eps 0.1", 0.971, BOARD),
        ),
        data="MNIST and the paper's small network, as mnist-linf@1; the paper's figures on its first 500 test images.",
        rule="Reproduced if the 95 % interval of verified accuracy by symbolic intervals reaches 95.2 %; else not.",
        measure=partial(verified_accuracy, track="mnist-linf@1"),
        judge=partial(judge_verified_accuracy, target=0.952),
        note=f"{_SHORT} The abstract's 95.2 % and the board's 97.1 % are not reconciled by any source at hand.",
    ),
    PaperClaim(
        id="mixtrain-verified-mnist-0.3",
        defense="mixtrain",
        statement="On MNIST at L-inf eps 0.3, MixTrain's small network is verified on 60.1 % of the test images.",
        paper=(PaperNumber("verified robust accuracy, small network, eps 0.3", 0.601, BOARD),),
        data="MNIST and the paper's small network, as mnist-linf-0.3@1; the paper's figures on its first 500 images.",
        rule="Reproduced if the 95 % interval of verified accuracy by symbolic intervals reaches 60.1 %; else not.",
        measure=partial(verified_accuracy, track="mnist-linf-0.3@1"),
        judge=partial(judge_verified_accuracy, target=0.601),
        note=_SHORT,
    ),
    PaperClaim(
        id="mixtrain-cost-of-verified-training",
        defense="mixtrain",
        statement="MixTrain takes 15 times less training time than the best verified training.",
        paper=(
            PaperNumber("training time of verified training over MixTrain's", 15.0, ABSTRACT),
            PaperNumber("the same in the first version", 5.0, "abstract of arXiv 1811.02625 v1"),
        ),
        data="Cost of a step: MNIST at eps 0.3, small network. Time to equal verified accuracy: digits with a "
        "perceptron, which is not the paper's data; there the shortest of several trainings with bounds at every point "
        "that proves as many test images.",
        rule="Reproduced if training with symbolic bounds at every point takes at least 15 times as long as MixTrain, "
        "for one step on MNIST and to equal verified accuracy on digits; not transferred if only the step does; else "
        "not reproduced.",
        measure=costs,
        judge=judge_cost_of_verified_training,
        note="The step on MNIST is timed at ten points and multiplied: a whole one is twelve times as much work and "
        "needs gigabytes. CROWN-IBP (2020) is later than the paper and a control.",
    ),
    PaperClaim(
        id="mixtrain-cost-of-adversarial-training",
        defense="mixtrain",
        statement="MixTrain takes 3 times less training time than adversarial training.",
        paper=(
            PaperNumber("training time of adversarial training over MixTrain's", 3.0, ABSTRACT),
            PaperNumber("the same in the first version", 14.0, "abstract of arXiv 1811.02625 v1"),
        ),
        data="Cost of a step: MNIST at eps 0.3, small network; adversarial training with the 40 steps of Madry et al., "
        "which the authors' attack code names.",
        rule="Reproduced if a step of adversarial training with 40 gradients takes at least 3 times as long as a step "
        "of MixTrain; else not.",
        measure=step_costs,
        judge=judge_cost_of_adversarial_training,
        note="For equally many steps. With 7 gradients, as in this board's own adversarial training, see the control.",
    ),
    PaperClaim(
        id="mixtrain-interval-attack",
        defense="mixtrain",
        statement="The interval attack finds on average 47 % relatively more violations than PGD on adversarially "
        "trained networks.",
        paper=(
            PaperNumber("relative gain over PGD, mean of three networks", 0.47, "abstract of arXiv 1906.02282"),
            PaperNumber("the smallest of the three", 0.38, "from memory"),
            PaperNumber("784-512-512-10 on MNIST at 0.3, PGD and interval attack", "39.2 % and 56.2 %", "from memory"),
        ),
        data="MNIST at eps 0.3: the paper's perceptron of two hidden layers and the small network, trained with 7 "
        "steps of PGD here and not by Madry et al.; 250 correctly classified test images of each.",
        rule="Reproduced if the mean relative gain is at least 38 % (the smallest of the paper's networks) at an equal "
        "number of gradients on the cross-entropy; broken under the protocol if, besides, the protocol's PGD breaks at "
        "least as many images of every network; not reproduced if the gain is smaller.",
        measure=interval_gain,
        judge=judge_interval_gain,
        note="PGD has a random start for each ascent of the interval attack, so both take equally many gradients; the "
        "interval attack's bounds come on top. The paper's code has 50 restarts, here are three.",
    ),
    PaperClaim(
        id="mixtrain-imagenet-200",
        defense="mixtrain",
        statement="MixTrain reaches 95.2 % verified robust accuracy on ImageNet-200.",
        paper=(
            PaperNumber("what a machine-made summary says", 0.952, "a Japanese review of the abstract"),
            PaperNumber("verified robust accuracy, up to, no data set named", 0.952, ABSTRACT),
            PaperNumber("ImageNet-200 (Tiny ImageNet), eps 1.785/255", IMAGENET, BOARD),
        ),
        data="None: the claim is compared with the published table.",
        rule="Refuted by the paper if the published verified accuracy on ImageNet-200 is below 95.2 %.",
        measure=published_on_imagenet,
        judge=judge_published,
        note="The abstract gives its best figure and lists the data sets in one sentence; the summary joined the two. "
        "95.2 % fits MNIST at eps 0.1 alone.",
    ),
)
