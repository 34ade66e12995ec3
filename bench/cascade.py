"""The cascade: a first look, bounds on what it leaves, attacks on what is still open, and the crossed audit.

Every skip rests on a broken example or on a certificate: what is broken needs no bound, what is certified no attack,
and a class that is proven out of reach no targeted attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from robustboard.attacks import autoattack
from robustboard.attacks.complete import verify
from robustboard.attacks.engine_warnings import read_warnings
from robustboard.attacks.kernels import ensembles
from robustboard.bench.crossed_audit import Audit, crossed_audit
from robustboard.bench.diagnose import breaks_contract
from robustboard.bench.examiner import REFERENCE_FORWARDS, Examiner
from robustboard.bench.verdicts import COMPLETE, Flags, Verdicts

Engine = Literal["cascade", "reference"]

THOROUGH = ("fab_t", "square")
"""The last two: most of the passes, few of the breaks. FAB seeks the nearest image, whatever the radius."""


@dataclass(frozen=True)
class Judged:
    """What `judge` leaves beside the verdicts.

    Attributes:
        audit: the crossed audit, whose contradictions nobody has looked at yet.
        verified: the methods of complete verification that could run.
        complete: its budget, 0 where it was left out.
    """

    audit: Audit
    verified: tuple[str, ...]
    complete: int


def judge(examiner: Examiner, verdicts: Verdicts, *, engine: Engine = "cascade", complete: int = 0) -> Judged:
    """The verdicts alone: the contract, the attacks, the bounds and the crossed audit; see `evaluate`.

    Args:
        examiner: puts the questions.
        verdicts: fresh ones, to be filled.
        engine: as for `evaluate`.
        complete: as for `evaluate`.
    """
    examiner.progress.begin("contract", 1)
    examiner.check()
    if breaks_contract(examiner):
        examiner.bound_methods, complete = (), 0
        examiner.notes.append("Bounds were not run: what the model answers is not a function of the image alone.")
    elif not examiner.bound_methods:
        examiner.notes.append("This track tries no bounds, so what it calls robust has only withstood attacks.")
    _clean(examiner, verdicts)
    examiner.progress.begin("reference checks", 1)
    examiner.reference_checks()
    _first_look(examiner, verdicts, verdicts.clean)
    _bounds(examiner, verdicts)
    if engine == "reference":
        _autoattack(examiner, verdicts)
    else:
        _attacks(examiner, verdicts)
    verified = _complete(examiner, verdicts, complete)
    audit = crossed_audit(examiner, verdicts, all_attacked=engine == "reference", complete=bool(verified))
    return Judged(audit, verified, complete)


def _clean(examiner: Examiner, verdicts: Verdicts) -> None:
    everything = np.ones(len(examiner.labels), dtype=bool)
    examiner.progress.begin("clean", len(everything))
    shards = [shard for shard, _ in examiner.shards(everything)]
    batches = (examiner.images[shard] for shard in shards)
    for shard, predicted in zip(shards, examiner.predict_each("clean", batches), strict=True):
        verdicts.clean[shard] = predicted == examiner.labels[shard]
        examiner.progress.advance(len(shard))


def _first_look(examiner: Examiner, verdicts: Verdicts, wanted: Flags) -> None:
    """One of PGD's runs: the cheapest attack takes what is easy, and bounds get the rest."""
    _pgd(examiner, verdicts, wanted, _first_run(examiner))


def _first_run(examiner: Examiner) -> range:
    """The first with the margin loss, which large logits do not blind as they do cross-entropy."""
    pgd = examiner.track.attacks.pgd
    losses = pgd.losses_for(examiner.examples.classes)
    first = pgd.restarts * losses.index("margin") if "margin" in losses else 0
    return range(first, first + 1)


def _other_runs(examiner: Examiner) -> list[int]:
    pgd = examiner.track.attacks.pgd
    every = range(pgd.restarts * len(pgd.losses_for(examiner.examples.classes)))
    return [run for run in every if run not in _first_run(examiner)]


def _pgd(examiner: Examiner, verdicts: Verdicts, wanted: Flags, runs: Sequence[int]) -> None:
    if not runs:
        return
    examiner.progress.begin("PGD", int(wanted.sum()) * len(runs) * examiner.track.attacks.pgd.steps)
    rows = np.flatnonzero(wanted)
    found = examiner.pgd("pgd", rows, runs=runs)
    verdicts.attacked("pgd", rows, examiner.confirm("pgd", "PGD", rows, found), found)


def _bounds(examiner: Examiner, verdicts: Verdicts) -> None:
    for method in examiner.bound_methods:
        examiner.progress.begin(f"bounds: {method}", int(verdicts.open.sum()))
        rows = np.flatnonzero(verdicts.open)
        if len(rows):
            proofs = examiner.certify("bounds", [method], rows)[method]
            verdicts.bounded(method, rows, proofs.certified, proofs.margins)
            verdicts.exclude(rows, proofs.excluded)


def _attacks(examiner: Examiner, verdicts: Verdicts, *, spared: Flags | None = None) -> None:
    """What is left of PGD and then the board's own attacks, each on what is still open."""
    _pgd(examiner, verdicts, verdicts.open, _other_runs(examiner))
    for attack in ensembles.STAGES[examiner.track.attacks.ensemble]:
        wanted = verdicts.open & ~spared if spared is not None and attack in THOROUGH else verdicts.open
        before = verdicts.open.mean()
        examiner.progress.begin(attack, int(wanted.sum()) * ensembles.FORWARDS[attack])
        targets = None if verdicts.excluded is None else ~verdicts.excluded
        rows = np.flatnonzero(wanted)
        verdicts.attacked(attack, rows, *examiner.attack(attack, attack, rows, targets=targets))
        if attack == "square":
            _heed_square(examiner, float(before), float(verdicts.open.mean()))


def _autoattack(examiner: Examiner, verdicts: Verdicts) -> None:
    """AutoAttack itself, on every correctly classified example."""
    _pgd(examiner, verdicts, verdicts.open, _other_runs(examiner))
    attacks = autoattack.applicable(examiner.examples.classes)
    alive = verdicts.clean.copy()
    for attack in attacks:
        before = alive.mean()
        examiner.progress.begin(f"AutoAttack: {attack}", int(alive.sum()) * REFERENCE_FORWARDS[attack])
        rows, broken, found = examiner.autoattack("autoattack", attack, alive)
        verdicts.attacked(attack, rows, broken, found)
        alive[rows[broken]] = False
        if attack == "square":
            _heed_square(examiner, float(before), float(alive.mean()))
    # With fewer than four classes the reference code cannot run APGD-T, so what ran is not AutoAttack.
    if attacks == autoattack.STAGES:
        correct = np.flatnonzero(verdicts.clean)
        verdicts.autoattack.iloc[correct] = alive[correct]


def _heed_square(examiner: Examiner, before: float, after: float) -> None:
    """Keep the reference engine's word on an attack without gradients that gains something."""
    examiner.warnings += read_warnings("square", autoattack.square_gain(before=before, after=after))


def _complete(examiner: Examiner, verdicts: Verdicts, nodes: int) -> tuple[str, ...]:
    """Prove or break what is still open; returns the methods that could."""
    wanted = verdicts.open if nodes else np.zeros(len(examiner.labels), dtype=bool)
    if not wanted.any():
        return ()
    examiner.progress.begin("complete verification", int(wanted.sum()) * nodes)
    for _, rows in examiner.shards(wanted):
        answer = examiner.complete(COMPLETE, rows, nodes)
        if answer is None:
            return ()  # of this network nothing can be known, which the first question finds out
        broken = examiner.confirm(COMPLETE, "complete verification", rows, answer.found)
        verdicts.attacked(COMPLETE, rows, broken, answer.found)
        for method in verify.METHODS:
            proved = np.array([name == method for name in answer.methods], dtype=bool)
            verdicts.bounded(method, rows, proved, answer.margins)
    return tuple(name for name in verify.METHODS if name == verify.BRANCHING or name in verdicts.certified_by)


def attack(examiner: Examiner, verdicts: Verdicts) -> None:
    """The attacks alone, in the cascade's order, on what is clean and not certified."""
    _first_look(examiner, verdicts, verdicts.open)
    _attacks(examiner, verdicts)


def settle(examiner: Examiner, verdicts: Verdicts, *, unbounded: Flags, spared: Flags) -> None:
    """The cascade from PGD to the last attack on what is clean, for a caller with radii of its own choice.

    Args:
        examiner: puts the questions.
        verdicts: its `clean` says which examples are judged.
        unbounded: (N,), the examples that bounds pass over.
        spared: (N,), the examples that the attacks of `THOROUGH` pass over.
    """
    judged = verdicts.clean
    _first_look(examiner, verdicts, verdicts.clean)
    # Bounds take what is open, and what is not clean is not open.
    verdicts.clean = judged & ~unbounded
    _bounds(examiner, verdicts)
    verdicts.clean = judged
    _attacks(examiner, verdicts, spared=spared)
