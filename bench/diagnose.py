"""Putting the diagnostics to a model: which examples are looked at, what is measured, and what follows for the gate.

The examples are the correctly classified ones of the smallest keyed hash, whatever the attacks made of them, so that
nothing has thinned them. An adversarial image that a diagnostic finds is confirmed like any other; on a certified
example it is a contradiction, and nothing is published. It changes no verdict: the protocol of a track is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from robustboard.attacks import keyed
from robustboard.attacks.attack_comparisons import RESCALED
from robustboard.bench import measures
from robustboard.bench.answers import Floats
from robustboard.bench.asking import interrupts_end
from robustboard.bench.diagnostics import BY_NAME, EXAMPLES, TABLE, Evidence, judge_all
from robustboard.bench.examiner import Examiner
from robustboard.bench.operations import Reply
from robustboard.bench.surrogates import Surrogates, transferred
from robustboard.bench.verdicts import Contradiction, Flags, Rows, Verdicts
from robustboard.errors import ModelError
from robustboard.leaderboard.findings import Diagnosis, Finding

_STAGE = "diagnostics"
_CONTRACT = ("randomness", "batch-dependence", "autograd-mode", "missing-gradients")
_GRADIENT_ATTACKS = ("pgd", "apgd_ce", "apgd_t", "fab_t", "fast")
_FAR = 0.5
"""A departure of slopes from which on they differ."""
_FARTHEST = 2.0
"""The largest departure, of slopes that are opposite."""


@dataclass(frozen=True)
class Diagnosed:
    """What the diagnostics made of a model: the diagnosis, and certified examples that one of them broke."""

    diagnosis: Diagnosis
    contradictions: tuple[Contradiction, ...]


def breaks_contract(examiner: Examiner) -> bool:
    """Whether the contract's own measurements, made before any attack, already say that the model is invalid."""
    evidence = _contract(examiner)
    return any(BY_NAME[name].judge(evidence[name]).verdict == "invalid" for name in _CONTRACT)


def diagnose(examiner: Examiner, verdicts: Verdicts, surrogates: Surrogates | None) -> Diagnosed:
    """Measure and judge everything in the table; after all attacks, whose verdicts are compared with.

    Args:
        examiner: puts the questions; `check` was asked before.
        verdicts: what the evaluation settled.
        surrogates: trains the track's surrogates; None where it has no training images.

    Raises:
        GateError: if an attack of a diagnostic left the ball.
    """
    run = _Run(examiner, verdicts, surrogates)
    examiner.progress.begin("diagnostics", len(TABLE))
    run.everything()
    return Diagnosed(judge_all(run.evidence, examples=len(run.rows)), tuple(run.contradictions))


def chosen_rows(examiner: Examiner, verdicts: Verdicts) -> Rows:
    """The examples that are looked at, in the track's order."""
    hashes = examiner.examples.hashes
    correct = sorted(np.flatnonzero(verdicts.clean), key=lambda row: keyed.derive_seed("diagnostics", hashes[row]))
    return np.sort(np.array(correct[:EXAMPLES], dtype=np.int64))


def _contract(examiner: Examiner) -> dict[str, Evidence]:
    found = examiner.behaviour
    n = int(found.get("n", 0))
    return {
        "randomness": {"n": n, "change": float(found["repeat_change"])},
        "batch-dependence": {"n": n, "change": float(found["batch_change"])},
        "autograd-mode": {"n": n, "change": float(found["autograd_change"])},
        "missing-gradients": {"n": n, "gradient": str(found["gradient"])},
    }


def _departures(found: Reply, name: str, n: int) -> npt.NDArray[np.float64]:
    """Departures of slopes, (N,); one that is no number is as large as can be."""
    told = found.array(name, np.floating, (n,)).astype(np.float64)
    return np.clip(np.nan_to_num(told, nan=_FARTHEST), 0, _FARTHEST)


@dataclass
class _Run:
    examiner: Examiner
    verdicts: Verdicts
    surrogates: Surrogates | None
    rows: Rows = field(init=False)
    evidence: dict[str, Evidence | Finding] = field(default_factory=dict)
    contradictions: list[Contradiction] = field(default_factory=list)
    _answers: Iterator[tuple[str, Reply | ModelError]] = field(default_factory=lambda: iter(()))

    def __post_init__(self) -> None:
        self.rows = chosen_rows(self.examiner, self.verdicts)

    def everything(self) -> None:
        """Fill in the evidence of every diagnostic."""
        self.evidence.update(_contract(self.examiner))
        if self._random():
            # What is drawn at random differs in every comparison: the other rules of the contract cannot be judged.
            reason = "The model answers at random, so this cannot be told from chance."
            for name in ("batch-dependence", "autograd-mode"):
                self.evidence[name] = BY_NAME[name].not_run(reason)
        questions = self._questions()
        with closing(self.examiner.measures(_STAGE, questions)) as found, interrupts_end(self.examiner.session):
            self._answers = zip((name for name, _ in questions), found, strict=True)
            for names, measurement in (
                (("autograd-mode",), self._autograd_mode),
                (
                    ("zero-gradients", "pixels-at-the-faces", "finite-differences", "saturated-softmax"),
                    self._gradients,
                ),
                (("loss-gap", "single-step"), self._losses),
                (("black-box",), self._black_box),
                (("transfer",), self._transfer),
                (("unbounded",), self._unbounded),
                (("more-work",), self._more_work),
                (("binarization",), self._binarization),
            ):
                self._attempt(names, measurement)
                self.examiner.progress.advance(len(names))

    def _questions(self) -> list[tuple[str, Rows]]:
        """What is measured, in the order in which it is needed; all can be asked side by side."""
        if not len(self.rows):
            return []
        named = [("gradients", self.rows), ("losses", self.rows), ("square", self.rows), ("unbounded", self.rows)]
        if not self._random():
            named.insert(0, ("autograd mode", self.rows))
        if len(self._undecided()):
            named.append(("more work", self._undecided()))
        return [*named, ("binarization", self.rows)]

    def _undecided(self) -> Rows:
        return self.rows[self.verdicts.open[self.rows]]

    def _random(self) -> bool:
        return float(self.examiner.behaviour["repeat_change"]) > 0

    def _attempt(self, names: tuple[str, ...], measurement: Callable[[], None]) -> None:
        if not len(self.rows):
            for name in names:
                self.evidence.setdefault(name, BY_NAME[name].not_run("No example is classified correctly."))
            return
        try:
            measurement()
        except ModelError as error:
            for name in names:
                self.evidence[name] = BY_NAME[name].failed(str(error))

    def _autograd_mode(self) -> None:
        if not self._random():
            change = self._measure("autograd mode").number("change", least=0)
            before = float(self.examiner.behaviour["autograd_change"])
            self.evidence["autograd-mode"] = {"n": len(self.rows), "change": max(change, before)}

    def _gradients(self) -> None:
        found, n = self._measure("gradients"), len(self.rows)
        steepest, random = (_departures(found, name, n) for name in ("steepest", "random"))

        def share(name: str) -> int:
            return round(n * found.number(name, least=0, most=1))

        contract = _contract(self.examiner)["missing-gradients"]
        self.evidence["missing-gradients"] = {**contract, "not finite": share("not finite")}
        differ = (steepest > _FAR) | (random > _FAR)
        self.evidence["zero-gradients"] = {"n": n, "zero margin": share("zero margin")}
        alive = found.count("faces alive", self.examiner.images[self.rows].size)
        faces: Evidence = {"alive": alive, "dead": found.count("faces dead", alive)}
        self.evidence["pixels-at-the-faces"] = (
            faces
            if alive
            else BY_NAME["pixels-at-the-faces"].not_run("No pixel at exactly 0 or 1 has a gradient next to it.")
        )
        self.evidence["finite-differences"] = {
            "n": n,
            "differ": int(differ.sum()),
            "median departure along the gradient": float(np.median(steepest)),
            "median departure along random signs": float(np.median(random)),
        }
        self.evidence["saturated-softmax"] = {
            "n": n,
            "mean largest logit": found.number("mean largest logit", least=0),
            "median gap": found.number("median gap", least=0),
            "certain": share("certain"),
            "zero ce": share("zero ce"),
        }

    def _losses(self) -> None:
        found, n = self._measure("losses"), len(self.rows)
        # With few classes there is no difference-of-logits ratio.
        told = [name for name in ("ce", "margin", "dlr", RESCALED) if name in found.values or name in ("ce", "margin")]
        left = {name: found.count(name, n) for name in told}
        self.evidence["loss-gap"] = {"n": n, **left}
        self.evidence["single-step"] = {
            "n": n,
            "single step": found.count("single step", n),
            "many steps": left["margin"],
        }

    def _black_box(self) -> None:
        found = self._images("square", self.rows)
        broken = self._confirmed("Square Attack", self.rows, found)
        self.evidence["black-box"] = {
            "n": len(self.rows),
            "queries": measures.SQUARE_QUERIES,
            "square": int(broken.sum()),
            "square only": int((broken & ~self._broken_by_gradients()).sum()),
        }

    def _transfer(self) -> None:
        surrogates = self.surrogates() if self.surrogates is not None else ()
        if not surrogates:
            reason = "There are no training images that a surrogate could be trained on."
            self.evidence["transfer"] = BY_NAME["transfer"].not_run(reason)
            return
        examiner, rows = self.examiner, self.rows
        images, labels = torch.from_numpy(examiner.images[rows]), torch.from_numpy(examiner.labels[rows])
        broken = np.zeros(len(rows), dtype=bool)
        weights: dict[str, str] = {}
        for surrogate in surrogates:
            found = transferred(surrogate, images, labels, threat=examiner.threat, keys=self._keys(rows)).numpy()
            broken |= self._confirmed(f"transfer from {surrogate.name}", rows, found)
            weights[f"weights of {surrogate.name}"] = surrogate.sha256
        self.evidence["transfer"] = {
            "n": len(rows),
            "transfer": int(broken.sum()),
            "transfer only": int((broken & ~self._broken_by_gradients()).sum()),
            **weights,
        }

    def _unbounded(self) -> None:
        left = self._measure("unbounded").count("survived", len(self.rows))
        self.evidence["unbounded"] = {"n": len(self.rows), "survived": left}

    def _more_work(self) -> None:
        undecided = self._undecided()
        broken = 0
        if len(undecided):
            found = self._images("more work", undecided)
            broken = int(self._confirmed("PGD with more work", undecided, found).sum())
        self.evidence["more-work"] = {"n": len(self.rows), "undecided": len(undecided), "broken": broken}

    def _binarization(self) -> None:
        found, n = self._measure("binarization"), len(self.rows)
        tasks = found.count("built", n)
        self.evidence["binarization"] = (
            {"n": n, "tasks": tasks, "found": found.count("found", tasks), "random": found.count("random", tasks)}
            if tasks
            else BY_NAME["binarization"].not_run(
                "No readout of the logits separates the ball's surface from its inside."
            )
        )

    def _measure(self, name: str) -> Reply:
        """The answer to a question; those before it that nobody needed are passed over.

        Raises:
            ModelError: if the model did not bear it.
        """
        found = next(answer for asked, answer in self._answers if asked == name)
        if isinstance(found, ModelError):
            raise found
        return found

    def _images(self, name: str, rows: Rows) -> Floats:
        return self.examiner.perturbed(self._measure(name), rows)

    def _keys(self, rows: Rows) -> list[str]:
        return [self.examiner.examples.hashes[row] for row in rows]

    def _broken_by_gradients(self) -> Flags:
        return np.array([self.verdicts.broken_by[row] in _GRADIENT_ATTACKS for row in self.rows], dtype=bool)

    def _confirmed(self, attack: str, rows: Rows, found: Floats) -> Flags:
        """Which images break their example in the canonical pass; a certified one among them is a contradiction."""
        broken = self.examiner.confirm(_STAGE, attack, rows, found)
        for row in rows[broken]:
            proof = self.verdicts.certified_by[row]
            if proof is not None:
                self.contradictions.append(Contradiction(int(row), proof, attack))
        return broken
