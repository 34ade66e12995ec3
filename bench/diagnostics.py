"""The diagnostics of masked gradients: what each looks for, its threshold, and how its evidence is judged.

An attack that fails because it was blinded looks like a defense that holds. Each diagnostic here is a sign of that,
from Athalye et al. 2018 (arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705) and Zimmermann et al. 2022. All
thresholds stand in this one table, which is frozen: another threshold, or another budget, is another `VERSION`.

**What a verdict does.** A record's status answers one question: can its robust accuracy be believed?

- `invalid`: the model breaks the contract under which a verdict means anything. It is no function of one image, answers
  attacks otherwise than everybody else, or hands them no gradient at all. Bounds are not run for such a model.
- `suspicious`: it keeps the contract, but the evidence says that the protocol's own attacks may have been blinded, so
  that its robust accuracy may be too high.
- A *flag* is a suspicious finding that leaves the status alone. It is reserved for masks to which the protocol's
  attacks are immune by construction: the size of the logits blinds cross-entropy and nothing else, and the margin,
  the difference-of-logits ratio, FAB and Square do not see it. Were they blinded too, one that decides would speak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from robustboard.attacks.attack_comparisons import RESCALED
from robustboard.bench import measures
from robustboard.leaderboard.findings import Diagnosis, Finding

VERSION: Final = 2

EXAMPLES: Final = 64
"""How many correctly classified examples are looked at: those of the smallest keyed hash."""

FEWEST: Final = 3
"""A share is not judged on fewer examples than these: one example in ten is chance."""

Evidence = Mapping[str, int | float | str]


@dataclass(frozen=True)
class Diagnostic:
    """One sign of masked gradients.

    Attributes:
        name: what it is called.
        looks_for: in plain words.
        threshold: when it speaks, in words.
        limit: the number in it.
        verdict: what it says when it speaks.
        decides: whether that sets the record's status, or only flags.
        speaks: whether the evidence passes the limit.
        fact: what was found, as the beginning of a sentence.
        means: how that sentence goes on where the diagnostic speaks.
    """

    name: str
    looks_for: str
    threshold: str
    limit: float
    verdict: Literal["suspicious", "invalid"]
    decides: bool
    speaks: Callable[[Evidence, float], bool]
    fact: Callable[[Evidence], str]
    means: str

    def judge(self, evidence: Evidence) -> Finding:
        """The finding that evidence amounts to."""
        speaks = self.speaks(evidence, self.limit)
        sentence = f"{self.fact(evidence)}{f'; {self.means}' if speaks else ''}."
        return self._finding(self.verdict if speaks else "ok", sentence, evidence)

    def not_run(self, reason: str) -> Finding:
        """The finding where the diagnostic could not be applied; `reason` is a sentence."""
        return self._finding("not run", reason, {})

    def failed(self, reason: str) -> Finding:
        """The finding where the model did not bear the measurement, which the protocol's own attacks did not meet."""
        return self._finding("suspicious", f"This could not be measured: {reason}", {})

    def _finding(
        self, verdict: Literal["ok", "suspicious", "invalid", "not run"], sentence: str, evidence: Evidence
    ) -> Finding:
        return Finding(
            name=self.name,
            looks_for=self.looks_for,
            threshold=self.threshold,
            verdict=verdict,
            decides=self.decides,
            sentence=sentence,
            evidence=dict(evidence),
        )


def judge_all(evidence: Mapping[str, Evidence | Finding], *, examples: int) -> Diagnosis:
    """The diagnosis: evidence by diagnostic, or the finding itself where there is no evidence to judge."""
    findings = []
    for diagnostic in TABLE:
        known = evidence[diagnostic.name]
        findings.append(known if isinstance(known, Finding) else diagnostic.judge(known))
    return Diagnosis(version=VERSION, examples=examples, findings=tuple(findings))


def _more(count: str, of: str = "n") -> Callable[[Evidence, float], bool]:
    """Whether a count is more than the limit's share, and of enough examples to say so."""

    def speaks(evidence: Evidence, limit: float) -> bool:
        found, examples = float(evidence[count]), float(evidence[of])
        return found >= FEWEST and found > limit * examples

    return speaks


def _above(number: str) -> Callable[[Evidence, float], bool]:
    return lambda evidence, limit: float(evidence[number]) > limit


def _saturated(evidence: Evidence, limit: float) -> bool:
    return _more("zero ce")(evidence, limit) or _more("certain")(evidence, 0.9)


def _lost(evidence: Evidence, limit: float) -> bool:
    """Whether cross-entropy leaves more standing than the best loss whose gradients no scale can drown."""
    others = [int(evidence[name]) for name in ("margin", "dlr", RESCALED) if name in evidence]
    excess = {"excess": int(evidence["ce"]) - min(others), "n": evidence["n"]}
    return _more("excess")(excess, limit)


def _losses_fact(evidence: Evidence) -> str:
    left = ", ".join(f"{evidence[name]} with {name}" for name in ("ce", "margin", "dlr", RESCALED) if name in evidence)
    return f"Of {evidence['n']} examples PGD of {measures.LOSS_STEPS} steps leaves {left}"


TABLE: Final[tuple[Diagnostic, ...]] = (
    Diagnostic(
        name="randomness",
        looks_for="A model that answers the same image differently each time, so that an attack chases noise.",
        threshold="Invalid if any logit changes at all between equal calls.",
        limit=0.0,
        verdict="invalid",
        decides=True,
        speaks=_above("change"),
        fact=lambda e: f"Between equal calls on {e['n']} images the logits move by {e['change']:.2g} of their size",
        means="the model draws at random when it is asked, so no verdict on it can be repeated",
    ),
    Diagnostic(
        name="batch-dependence",
        looks_for="A model whose answer on an image depends on which other images are in the batch.",
        threshold="Invalid if a logit changes by more than 0.001 of the logits' scale.",
        limit=1e-3,
        verdict="invalid",
        decides=True,
        speaks=_above("change"),
        fact=lambda e: f"Alone and in a batch, the logits of {e['n']} images differ by {e['change']:.2g} of their size",
        means="the model judges batches rather than images",
    ),
    Diagnostic(
        name="autograd-mode",
        looks_for="A model that notices when gradients are recorded, takes it for an attack, and answers differently.",
        threshold="Invalid if a logit changes by more than 0.001 of the logits' scale.",
        limit=1e-3,
        verdict="invalid",
        decides=True,
        speaks=_above("change"),
        fact=lambda e: (
            f"With and without autograd the logits of {e['n']} images differ by {e['change']:.2g} of their size"
        ),
        means="attacks are shown another model than everybody else",
    ),
    Diagnostic(
        name="missing-gradients",
        looks_for="A model that lets no gradient reach its input, or gradients that are no finite numbers.",
        threshold="Invalid if the gradient of the logits is missing or not finite on any image.",
        limit=0.0,
        verdict="invalid",
        decides=True,
        speaks=lambda e, limit: e["gradient"] != "present" or int(e.get("not finite", 0)) > limit,
        fact=lambda e: (
            f"On {e['n']} images the gradient of the logits with respect to the input is {e['gradient']}; that of a "
            f"loss is not finite for {e.get('not finite', 0)} of the examples looked at"
        ),
        means="gradient attacks were given zeros instead and could not work",
    ),
    Diagnostic(
        name="zero-gradients",
        looks_for="Input gradients that are exactly zero everywhere, so that a gradient attack stands still.",
        threshold="Suspicious if the margin's gradient is exactly zero for more than 5 % of the examples.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=_more("zero margin"),
        fact=lambda e: f"The gradient of the margin is exactly zero for {e['zero margin']} of {e['n']} examples",
        means="gradient attacks stand still there",
    ),
    Diagnostic(
        name="pixels-at-the-faces",
        looks_for="A clamp inside the model that takes the gradient from pixels at exactly 0 or 1.",
        threshold="Suspicious if over half of the pixels at 0 or 1 that have a gradient next to it have none there.",
        limit=0.5,
        verdict="suspicious",
        decides=True,
        speaks=_more("dead", "alive"),
        fact=lambda e: (
            f"Of {e['alive']} pixels at exactly 0 or 1 that have a gradient a millionth inside, {e['dead']} have none "
            "at the face itself"
        ),
        means="an attack never moves those pixels off black and white",
    ),
    Diagnostic(
        name="finite-differences",
        looks_for="A backward pass that is not the derivative of the forward pass.",
        threshold=(
            "Suspicious if autograd's slope and the measured one differ by more than half of the larger for more than "
            "25 % of the examples."
        ),
        limit=0.25,
        verdict="suspicious",
        decides=True,
        speaks=_more("differ"),
        fact=lambda e: (
            f"Autograd's slope departs by more than half from the measured one for {e['differ']} of {e['n']} examples"
        ),
        means="what gradient attacks follow is not the model's own slope",
    ),
    Diagnostic(
        name="saturated-softmax",
        looks_for="Logits so large that the softmax rounds to zeros and ones, and cross-entropy's gradient to zero.",
        threshold=(
            "Flagged if cross-entropy's gradient is exactly zero, and the margin's is not, for more than 5 % of the "
            "examples, or the softmax is exactly 1 for more than 90 %."
        ),
        limit=0.05,
        verdict="suspicious",
        decides=False,
        speaks=_saturated,
        fact=lambda e: (
            f"The largest logit is {e['mean largest logit']:,.1f} on average and leads by {e['median gap']:,.1f} "
            f"(median); the softmax is exactly 1 for {e['certain']} of {e['n']} examples and the gradient of "
            f"cross-entropy alone exactly zero for {e['zero ce']}"
        ),
        means="attacks on cross-entropy see nothing, while the protocol's other losses do not depend on the scale",
    ),
    Diagnostic(
        name="loss-gap",
        looks_for="Cross-entropy failing where margin, DLR or rescaled logits succeed: robustness of one loss only.",
        threshold="Flagged if cross-entropy leaves over 10 % more examples standing than the best of the others.",
        limit=0.1,
        verdict="suspicious",
        decides=False,
        speaks=_lost,
        fact=_losses_fact,
        means="what cross-entropy alone would report as robust is not",
    ),
    Diagnostic(
        name="single-step",
        looks_for="One large step that does better than many small ones, which a true gradient does not allow.",
        threshold="Suspicious if one step leaves over 5 % fewer of the examples standing than many steps.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=lambda e, limit: _more("fewer")(
            {"fewer": int(e["many steps"]) - int(e["single step"]), "n": e["n"]}, limit
        ),
        fact=lambda e: (
            f"Of {e['n']} examples one step leaves {e['single step']} standing, {measures.LOSS_STEPS} steps "
            f"{e['many steps']}"
        ),
        means="the iterative attack was led astray",
    ),
    Diagnostic(
        name="black-box",
        looks_for="Square Attack, which uses no gradient, breaking what no gradient attack of the protocol could.",
        threshold="Suspicious if that is so for more than 5 % of the examples, none of which was taken out before.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=_more("square only"),
        fact=lambda e: (
            f"Square Attack of {e['queries']} queries breaks {e['square']} of {e['n']} examples, {e['square only']} of "
            "which no gradient attack of the protocol broke"
        ),
        means="an attack without gradients does better than those with",
    ),
    Diagnostic(
        name="transfer",
        looks_for="Images that break other networks breaking this one where no attack on itself could.",
        threshold="Suspicious if that is so for more than 5 % of the examples.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=_more("transfer only"),
        fact=lambda e: (
            f"PGD images of other networks break {e['transfer']} of {e['n']} examples, {e['transfer only']} of which "
            "no gradient attack of the protocol broke"
        ),
        means="attacks on other networks do better than those on the model itself",
    ),
    Diagnostic(
        name="unbounded",
        looks_for="Examples that survive even when an attack may make any image of them.",
        threshold="Suspicious if more than 5 % of the examples survive.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=_more("survived"),
        fact=lambda e: (
            f"With no limit on the perturbation, {measures.UNBOUNDED_STEPS} steps leave {e['survived']} of {e['n']} "
            "examples standing"
        ),
        means="nothing can truly withstand that, so the attack was blinded",
    ),
    Diagnostic(
        name="more-work",
        looks_for="More steps and restarts breaking what the whole protocol left standing.",
        threshold="Suspicious if that is so for more than 5 % of the examples.",
        limit=0.05,
        verdict="suspicious",
        decides=True,
        speaks=_more("broken"),
        fact=lambda e: (
            f"PGD of {measures.MORE_STEPS} steps and {measures.MORE_RESTARTS} restarts breaks {e['broken']} of the "
            f"{e['undecided']} examples that the protocol neither broke nor certified, of {e['n']} looked at"
        ),
        means="the protocol's budget was not enough",
    ),
    Diagnostic(
        name="binarization",
        looks_for=(
            "Whether an attack could have worked: it must find an adversarial example that is there by construction "
            "(the active test of Zimmermann et al. 2022)."
        ),
        threshold=(
            "Suspicious if it fails on over 10 % of the tasks; not judged where random points solve more than half."
        ),
        limit=0.1,
        verdict="suspicious",
        decides=True,
        speaks=lambda e, limit: (
            2 * int(e["random"]) <= int(e["tasks"])
            and _more("failed")({"failed": int(e["tasks"]) - int(e["found"]), "n": e["tasks"]}, limit)
        ),
        fact=lambda e: (
            f"The attack solves {e['found']} of {e['tasks']} tasks that have a solution by construction, random points "
            f"solve {e['random']}"
        ),
        means="that it fails on the real task therefore says little",
    ),
)

BY_NAME: Final[Mapping[str, Diagnostic]] = {diagnostic.name: diagnostic for diagnostic in TABLE}
