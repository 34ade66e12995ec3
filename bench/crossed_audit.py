"""The crossed audit: broken examples are bounded and certified ones attacked, though the cascade had settled both.

The cascade never bounds what it has broken and never attacks what it has certified, so a wrong bound or attack could
not show. Here both are tried against each other. Of the broken examples a keyed sample is bounded by every method; of
the certified ones those with the smallest margins and a keyed sample are attacked by APGD, untargeted and towards the
likeliest class, though that is proven out of reach. FAB and Square are left out: they are most of the cascade's passes,
and a network of which anything is proven does not hide its gradients. No contradiction in n checks leaves at most 3/n
of such checks wrong, with 95 % confidence (the rule of three).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from robustboard.attacks import keyed
from robustboard.attacks.kernels import ensembles
from robustboard.bench.examiner import Examiner
from robustboard.bench.verdicts import Contradiction, Flags, Rows, Verdicts, flags
from robustboard.errors import GateError


@dataclass
class Audit:
    """What the crossed audit did.

    Attributes:
        broken_bounded: broken examples on which every bound method was tried, and at least one could bound.
        certified_attacked: certified examples that were attacked.
        contradictions: what it found; a publishable record has none.
    """

    broken_bounded: int = 0
    certified_attacked: int = 0
    contradictions: list[Contradiction] = field(default_factory=list)


# Bounds may cost more than the attack that broke an example, so of many only these are bounded by every method.
_LEAST_BOUNDED, _SHARE_BOUNDED = 5, 0.005
_ATTACKS, _TARGETS = ("apgd_ce", "apgd_t"), 1
# Complete verification that is right proves nothing of a broken example whatever its budget; this finds one that errs
# in its bounds, its reading of the network or its first splits.
_COMPLETE_NODES = 64


def crossed_audit(examiner: Examiner, verdicts: Verdicts, *, all_attacked: bool, complete: bool = False) -> Audit:
    """Try bounds on what is broken, and attacks on a part of what is certified.

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
    broken = np.flatnonzero(verdicts.broken)
    count = max(_LEAST_BOUNDED, math.ceil(_SHARE_BOUNDED * len(broken)))
    sample = np.array(sorted(_drawn(examiner, broken)[:count]), dtype=np.int64)
    bounded = np.zeros(len(sample), dtype=bool)
    examiner.progress.begin("audit: bounds", len(methods) * len(sample))
    answers = examiner.certify("audit", methods, sample) if len(sample) else {}
    for method, proofs in answers.items():
        if proofs.wrong and method in verdicts.certified_by:
            raise GateError(
                f"Gate: {method} bounds certified examples, and contradict the network's own logits on others; this is "
                "a bug of the bounds, so nothing is published."
            )
        bounded |= np.isfinite(proofs.margins).any(axis=1)
        for row in sample[proofs.certified]:
            audit.contradictions.append(Contradiction(int(row), method, verdicts.broken_by[row] or ""))
    audit.broken_bounded = int(bounded.sum())


def _verify_the_broken(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    # That so small a budget leaves a broken example open is no news, and nothing that the record should note.
    notes = list(examiner.notes)
    examiner.progress.begin("audit: complete verification", int(verdicts.broken.sum()) * _COMPLETE_NODES)
    for _, rows in examiner.shards(verdicts.broken):
        answer = examiner.complete("audit", rows, _COMPLETE_NODES)
        examiner.notes[:] = notes
        if answer is None:
            return
        for row, method in zip(rows, answer.methods, strict=True):
            if method is not None:
                audit.contradictions.append(Contradiction(int(row), method, verdicts.broken_by[row] or ""))


def _attack_the_certified(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    alive = _sample(examiner, verdicts)
    audit.certified_attacked = int(alive.sum())
    for attack in _ATTACKS:
        rows = np.flatnonzero(alive)
        examiner.progress.begin(f"audit: {attack}", len(rows) * ensembles.FORWARDS[attack])
        broken, _ = examiner.attack("audit", attack, rows, most=_TARGETS)
        for row in rows[broken]:
            audit.contradictions.append(Contradiction(int(row), verdicts.certified_by[row] or "", attack))
        alive[rows[broken]] = False


def _sample(examiner: Examiner, verdicts: Verdicts) -> Flags:
    """The certified examples to attack: the smallest margins, and a keyed sample of the rest."""
    settings = examiner.track.audit
    certified = np.flatnonzero(verdicts.certified)
    by_margin = certified[np.argsort(verdicts.margins[certified], kind="stable")]
    near, rest = by_margin[: settings.smallest_margins], by_margin[settings.smallest_margins :]
    drawn = _drawn(examiner, rest)[: settings.certified_sample]
    return flags([*near, *drawn], len(verdicts.labels))


def _drawn(examiner: Examiner, rows: Rows) -> list[np.int64]:
    """`rows` in an order that depends on the content of each alone."""
    return sorted(rows, key=lambda row: keyed.derive_seed("audit", examiner.examples.hashes[row]))
