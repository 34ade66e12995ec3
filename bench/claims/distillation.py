"""What is claimed of defensive distillation (Papernot et al. 2016, arXiv 1511.04508), and of its break.

The papers' full text was not at hand: the end points of the table are quoted by an article, the abstract says two
numbers, and the rest is from memory. The article's other subject, adversarial examples of undefended networks, is in
`adversarial_examples`; its claims follow here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from robustboard.bench.claims import adversarial_examples, distilled
from robustboard.bench.claims.claim import Measurement, PaperClaim, PaperNumber, Verdict, mean, share
from robustboard.bench.claims.distilled import HOTTEST, MNIST
from robustboard.bench.claims.laboratory import Laboratory

CIFAR = "cifar10-q75-linf@1"
BOARD = "the board's network"
PAPER = "the paper's network"
PAPER_NETWORK: Mapping[str, object] = {"architecture": "papernot-mnist", "epochs": 3, "lr": 1e-3}
LEAST_GAIN = 5.0
"""Points of robust accuracy under the protocol from which a defense counts as one."""
ARTICLE = "quoted by an article on the paper"
MEMORY = "from memory"

Found = Mapping[str, Measurement]


def judge_ends(found: Found, *, at_least: float, at_most: float, otherwise: Verdict) -> Verdict:
    """Reproduced where every network's JSMA success falls from `at_least` to `at_most`; broken without a gain."""
    names = [key.removesuffix(": without") for key in found if key.endswith(": without")]
    for name in names:
        if found[f"{name}: without"].value < at_least or found[f"{name}: with"].value > at_most:
            return otherwise
    return _unless_gained(found["gain"].value)


def judge_temperatures(found: Found) -> Verdict:
    """Reproduced where success falls with T; broken where PGD leaves no more at T = 100 than at T = 1."""
    rates = {key: one.value for key, one in found.items() if key.startswith("jsma, T = ")}
    cool = [rate for key, rate in rates.items() if _temperature(key) <= 2]
    hot = [rate for key, rate in rates.items() if _temperature(key) >= 20]
    if min(cool) - max(hot) < 0.5:
        return "not reproduced"
    return _unless_gained(100 * (found["pgd, T = 100"].value - found["pgd, T = 1"].value))


def judge_gradients(found: Found) -> Verdict:
    """Reproduced where the median falls by 30 orders of magnitude; broken where z / T undoes nine tenths of that."""
    fall = found["median, undefended"].value - found["median, T = 100"].value
    if fall < 30:
        return "not reproduced"
    left = found["median, undefended"].value - found["divided, T = 100"].value
    return "reproduced" if left > 0.1 * fall else "broken under the protocol"


def judge_features(found: Found) -> Verdict:
    """Reproduced where the features grow fivefold; broken where z / T needs less than twice the undefended number."""
    plain = found["without"].value
    if found["with"].value < 5 * plain:
        return "not reproduced"
    return "reproduced" if found["divided"].value >= 2 * plain else "broken under the protocol"


def judge_accuracy(found: Found) -> Verdict:
    """Reproduced where no temperature costs more than 1.3 points."""
    changes = [one.value for key, one in found.items() if key.startswith("T = ")]
    return "reproduced" if min(changes) >= -1.3 else "not reproduced"


def judge_break(found: Found) -> Verdict:
    """Reproduced where JSMA on z / T succeeds in 90 % of its attempts and the protocol sees no gain."""
    broken = found["divided"].value >= 0.9 and found["gain"].value < LEAST_GAIN
    return "reproduced" if broken else "not reproduced"


def measure_break(lab: Laboratory, *, images: int = 100, with_protocol: bool = True) -> dict[str, Measurement]:
    """JSMA on z / T of a distilled network, how many features it changes, and the protocol's gain."""
    attacked = distilled.attempts(
        lab, distilled.distilled(lab, MNIST, HOTTEST), "distilled, z / T", images=images, temperature=HOTTEST
    )
    changed = attacked.changed[attacked.success]
    return {
        "divided": share("JSMA success, distilled at T = 100, z / T", attacked.success),
        "changed": mean("features changed by a successful attempt", changed, unit="count"),
        **(distilled.protocol(lab, MNIST) if with_protocol else {}),
    }


def _temperature(key: str) -> float:
    return float(key.rpartition(" ")[2])


def _unless_gained(points: float) -> Verdict:
    return "reproduced" if points >= LEAST_GAIN else "broken under the protocol"


_COUNTING = "100 test images, each into its nine wrong classes, at most 112 features (the counting is from memory)"
_IMAGES = (
    "The paper's are the first 100 test images; ours are the track's first 100, those of smallest content hash, so "
    "that every copy of the data gives the same."
)
_PROTOCOL = (
    "In that case broken under the protocol if distillation adds less than 5 points of robust accuracy, and otherwise "
    "reproduced."
)

CLAIMS = (
    PaperClaim(
        id="distillation-jsma-mnist",
        defense="distillation",
        statement="On MNIST, distillation at T = 100 lowers the success of targeted JSMA from 95.89 % to 0.45 %.",
        paper=(
            PaperNumber(f"JSMA success, undefended; {_COUNTING}", 0.9589, ARTICLE),
            PaperNumber("JSMA success, distilled at T = 100", 0.0045, ARTICLE),
        ),
        data=f"MNIST. {_IMAGES} The board's network in full; the paper's network with three epochs of Adam in place of "
        "fifty of SGD, and dropout after its first hidden layer alone.",
        rule="The paper's measure holds if, for both networks, at least 85 % of the attempts succeed without "
        f"distillation and at most 5 % with it; if not, not reproduced. {_PROTOCOL}",
        measure=partial(
            distilled.jsma_at_the_ends, track=MNIST, networks={BOARD: {}, PAPER: PAPER_NETWORK}, images=100
        ),
        judge=partial(judge_ends, at_least=0.85, at_most=0.05, otherwise="not reproduced"),
        note="The derivative is that of the softmax at T = 1, as in the paper. Dividing the logits by T first, or "
        "taking the derivative of the logits, is the control.",
    ),
    PaperClaim(
        id="distillation-jsma-cifar",
        defense="distillation",
        statement="On CIFAR-10, distillation at T = 100 lowers the success of targeted JSMA from 87.89 % to 5.11 %.",
        paper=(
            PaperNumber(f"JSMA success, undefended; {_COUNTING}", 0.8789, ARTICLE),
            PaperNumber("JSMA success, distilled at T = 100", 0.0511, ARTICLE),
        ),
        data="CIFAR-10 with every image re-encoded as JPEG of quality 75 (cifar10-q75), and cnn-small, a network of "
        f"two convolutions, in place of the paper's of four. {_IMAGES}",
        rule="The paper's measure holds if at least 75 % of the attempts succeed without distillation and at most 15 % "
        f"with it; if not, not transferred. {_PROTOCOL}",
        measure=partial(distilled.jsma_at_the_ends, track=CIFAR, networks={BOARD: {}}, images=100),
        judge=partial(judge_ends, at_least=0.75, at_most=0.15, otherwise="not transferred"),
    ),
    PaperClaim(
        id="distillation-temperature",
        defense="distillation",
        statement="The higher the temperature, the stronger the defense.",
        paper=(
            PaperNumber("the figure of success against T, in words", "the higher T, the stronger", ARTICLE),
            *(
                PaperNumber(f"JSMA success at T = {temperature}", rate, MEMORY)
                for temperature, rate in (
                    (1, 0.91),
                    (2, 0.8223),
                    (5, 0.2467),
                    (10, 0.0678),
                    (20, 0.0134),
                    (30, 0.0144),
                    (40, 0.0045),
                    (50, 0.0145),
                )
            ),
        ),
        data=f"MNIST, the board's network. {_IMAGES} PGD as the protocol runs it, on the first 500 examples.",
        rule="The paper's measure holds if JSMA's success at every T up to 2 exceeds that at every T from 20 on by "
        "half of all attempts; if not, not reproduced. In that case broken under the protocol if PGD leaves less than "
        "5 points more at T = 100 than at T = 1, and otherwise reproduced.",
        measure=distilled.over_temperatures,
        judge=judge_temperatures,
    ),
    PaperClaim(
        id="distillation-gradients",
        defense="distillation",
        statement="Distillation reduces the gradients that adversarial examples are made with by a factor of 10^30.",
        paper=(PaperNumber("reduction of the gradients, a factor", 1e30, "abstract"),),
        data="MNIST, the board's network, 1000 test images: the mean over features and classes of |dF/dx|, computed in "
        "logarithms, since it is smaller than float64 can hold. From memory, the paper's figure is on CIFAR-10.",
        rule="The paper's measure holds if the median over test images falls by at least 30 orders of magnitude from "
        "the undefended network to T = 100; if not, not reproduced. In that case broken under the protocol if dividing "
        "the logits by T undoes nine tenths of those orders, and otherwise reproduced.",
        measure=distilled.gradient_sizes,
        judge=judge_gradients,
        note="An attack may divide the logits by a constant, or follow them themselves; the protocol's margin and DLR "
        "losses do.",
    ),
    PaperClaim(
        id="distillation-features",
        defense="distillation",
        statement="Distillation raises the average minimum number of features to be modified by about 800 %.",
        paper=(
            PaperNumber("increase of the average minimum number of features", "about 800 %", "abstract"),
            PaperNumber("share of MNIST's features that must change, undefended", 0.0155, MEMORY),
            PaperNumber("share of MNIST's features that must change, distilled", 0.1408, MEMORY),
        ),
        data=f"MNIST, the board's network. {_IMAGES}",
        rule="The paper's measure holds if the number grows at least fivefold; if not, not reproduced. In that case "
        "broken under the protocol if with the logits divided by T less than twice the undefended number is enough, "
        "and otherwise reproduced.",
        measure=distilled.features_needed,
        judge=judge_features,
        note="That an image which no attempt moves counts with the whole budget of 112 is our reading: it is how 14.08 "
        "% comes about, which is 98.5 % of the budget's 14.29 %.",
    ),
    PaperClaim(
        id="distillation-accuracy",
        defense="distillation",
        statement="Distillation changes the accuracy by about 1.3 points at most, at every temperature.",
        paper=(PaperNumber("largest change of accuracy, points", 1.3, MEMORY),),
        data="MNIST, the board's network, the track's 1000 examples.",
        rule="Reproduced if no temperature costs more than 1.3 points of clean accuracy.",
        measure=distilled.clean_accuracy,
        judge=judge_accuracy,
    ),
    PaperClaim(
        id="distillation-break",
        defense="distillation",
        statement="A distilled network resists targeted attacks no better than an undefended one (Carlini and Wagner).",
        paper=(
            PaperNumber("success of JSMA on z / T, distilled MNIST network", 0.964, "arXiv 1607.04311, from memory"),
            PaperNumber("features that it changes on average", 36.4, "arXiv 1607.04311, from memory"),
            PaperNumber("success of attacks on the logits, all norms", 1.0, "arXiv 1608.04644, from memory"),
        ),
        data=f"MNIST, the board's network, T = 100. {_IMAGES}",
        rule="Reproduced if JSMA on the logits divided by T succeeds in at least 90 % of the attempts, and "
        "distillation adds less than 5 points of robust accuracy under the protocol.",
        measure=measure_break,
        judge=judge_break,
        note="They also report that JSMA on the logits themselves fails on distilled networks; see the control of "
        "distillation-jsma-mnist.",
    ),
    *adversarial_examples.CLAIMS,
)
