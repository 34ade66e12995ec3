"""The crossed audit: broken examples are bounded and certified ones attacked, though the cascade had settled both.

The cascade never bounds what it has broken and never attacks what it has certified, so a wrong bound or attack could
not show. Here both are tried against each other: every broken example is bounded, and of the certified ones those with
the smallest margins and a sample keyed by their content are attacked with all of AutoAttack. No contradiction in n
checks leaves at most 3/n of such checks wrong, with 95 % confidence (the rule of three).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robustboard.attacks import autoattack, keyed
from robustboard.bench.examiner import REFERENCE_FORWARDS, Examiner
from robustboard.bench.verdicts import Contradiction, Flags, Verdicts


@dataclass
class Audit:
    """What the crossed audit did.

    Attributes:
        broken_bounded: broken examples that at least one bound method could bound.
        certified_attacked: certified examples on which every attack was tried.
        contradictions: what it found; a publishable record has none.
    """

    broken_bounded: int = 0
    certified_attacked: int = 0
    contradictions: list[Contradiction] = field(default_factory=list)


# Complete verification that is right proves nothing of a broken example whatever its budget; this finds one that errs
# in its bounds, its reading of the network or its first splits.
_COMPLETE_NODES = 64


def crossed_audit(examiner: Examiner, verdicts: Verdicts, *, all_attacked: bool, complete: bool = False) -> Audit:
    """Try every bound on what is broken, and AutoAttack on a part of what is certified.

    Args:
        examiner: puts the questions.
        verdicts: what the evaluation settled.
        all_attacked: whether AutoAttack ran on the certified examples already, so that none is left to attack.
        complete: whether complete verification is tried on the broken examples too, within a small budget.
    """
    audit = Audit()
    _bound_the_broken(examiner, verdicts, audit)
    if complete:
        _verify_the_broken(examiner, verdicts, audit)
    if all_attacked:
        audit.certified_attacked = int(verdicts.certified.sum())
    else:
        _attack_the_certified(examiner, verdicts, audit)
    return audit


def _bound_the_broken(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    methods = examiner.bound_methods
    bounded = np.zeros(len(verdicts.labels), dtype=bool)
    examiner.progress.begin("audit: bounds", int(verdicts.broken.sum()) * len(methods))
    for method in methods:
        for _, rows in examiner.shards(verdicts.broken):
            certified, margins = examiner.certify("audit", method, rows)
            bounded[rows] |= np.isfinite(margins).any(axis=1)
            for row in rows[certified]:
                audit.contradictions.append(Contradiction(int(row), method, verdicts.broken_by[row] or ""))
            examiner.progress.advance(len(rows))
    audit.broken_bounded = int(bounded.sum())


def _verify_the_broken(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    examiner.progress.begin("audit: complete verification", int(verdicts.broken.sum()) * _COMPLETE_NODES)
    for _, rows in examiner.shards(verdicts.broken):
        answer = examiner.complete("audit", rows, _COMPLETE_NODES)
        if answer is None:
            return
        for row, method in zip(rows, answer.methods, strict=True):
            if method is not None:
                audit.contradictions.append(Contradiction(int(row), method, verdicts.broken_by[row] or ""))


def _attack_the_certified(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    alive = _sample(examiner, verdicts)
    audit.certified_attacked = int(alive.sum())
    attacks = autoattack.applicable(examiner.examples.classes)
    for attack in attacks:
        examiner.progress.begin(f"audit: {attack}", int(alive.sum()) * REFERENCE_FORWARDS[attack])
        for rows, broken, _ in examiner.autoattack("audit", attack, alive.copy()):
            for row in rows[broken]:
                audit.contradictions.append(Contradiction(int(row), verdicts.certified_by[row] or "", attack))
            alive[rows[broken]] = False


def _sample(examiner: Examiner, verdicts: Verdicts) -> Flags:
    """The certified examples to attack: the smallest margins, and a keyed sample of the rest."""
    settings = examiner.track.audit
    certified = np.flatnonzero(verdicts.certified)
    by_margin = certified[np.argsort(verdicts.margins[certified], kind="stable")]
    near, rest = by_margin[: settings.smallest_margins], by_margin[settings.smallest_margins :]
    drawn = sorted(rest, key=lambda row: keyed.derive_seed("audit", examiner.examples.hashes[row]))
    chosen = np.zeros(len(verdicts.labels), dtype=bool)
    chosen[near] = True
    chosen[drawn[: settings.certified_sample]] = True
    return chosen
