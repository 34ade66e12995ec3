"""The evaluation: clean, PGD, bounds on survivors, AutoAttack on the undecided, the crossed audit, corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from robustboard.attacks import autoattack
from robustboard.attacks.complete import verify
from robustboard.attacks.engine_warnings import EngineWarning, merged, read_warnings
from robustboard.bench.corrupted import Pictures, attack_corrupted, judge_corrupted, made, require_possible
from robustboard.bench.crossed_audit import Audit, crossed_audit
from robustboard.bench.diagnose import breaks_contract, diagnose
from robustboard.bench.examiner import REFERENCE_FORWARDS, Examiner, Floats, StageCost
from robustboard.bench.official import OfficialFiles
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.session import Session
from robustboard.bench.surrogates import Surrogates
from robustboard.bench.verdicts import COMPLETE, Flags, Verdicts
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import GateError
from robustboard.leaderboard.findings import Diagnosis

Engine = Literal["cascade", "reference"]

THOROUGH = ("fab_t", "square")
"""AutoAttack's last two: most of its passes, few of its breaks. FAB seeks the nearest image, whatever the radius."""


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found.

    Attributes:
        outcomes: the outcome table.
        adversarial: row -> the stored image (C, H, W) that broke it.
        audit: the crossed audit's counts.
        bound_methods: the bound methods that could run on this network: the track's in its order, then the board's own
            certificates.
        costs: stage -> cost.
        notes: what limits a stage's result, such as bounds that cannot run on this network.
        warnings: of the reference engine's own checks.
        diagnosis: what the diagnostics of masked gradients found.
        effort: the budgets of this run that are no part of the track, by name.
    """

    outcomes: pd.DataFrame
    adversarial: Mapping[int, Floats]
    audit: Audit
    bound_methods: tuple[str, ...]
    costs: Mapping[str, StageCost]
    notes: Sequence[str]
    warnings: Sequence[EngineWarning]
    diagnosis: Diagnosis
    effort: Mapping[str, int] = field(default_factory=dict)


def evaluate(
    session: Session,
    track: Track,
    examples: Examples,
    *,
    engine: Engine = "cascade",
    complete: int = 0,
    surrogates: Surrogates | None = None,
    progress: Progress | None = None,
    pictures: Pictures | None = None,
) -> Evaluation:
    """Judge the session's model on the track's examples.

    Args:
        session: the model.
        track: the protocol.
        examples: the track's examples, in its order.
        engine: `"cascade"` attacks with AutoAttack what nothing has settled; `"reference"` runs it on every correctly
            classified example, which costs more and yields the metric `autoattack`.
        complete: complete verification's budget for each example that is open after all attacks, in sub-domains; 0
            leaves it out.
        surrogates: trains the networks that the transfer diagnostic attacks; None where there is no training data.
        progress: told of every stage.
        pictures: the corrupted images, where the track's set is read from official files; None makes them.

    Raises:
        DataError: if the track's corruptions cannot be made, or do not suit its images.
        GateError: if an example is both certified and broken, or an attack left the ball; nothing may be published.
        ModelError: if the model's answers are none that a verdict can be formed of.
        WorkerError: if the model's process dies.
    """
    pictures = pictures or made(track, examples)
    require_possible(track, pictures)
    examiner = Examiner(session, track, examples, progress or NoProgress())
    verdicts = Verdicts(examples.hashes, examples.labels)
    examiner.progress.begin("contract", 1)
    examiner.check()
    if breaks_contract(examiner):
        examiner.bound_methods, complete = (), 0
        examiner.notes.append("Bounds were not run: what the model answers is not a function of the image alone.")
    _clean(examiner, verdicts)
    examiner.progress.begin("reference checks", 1)
    examiner.reference_checks()
    _pgd(examiner, verdicts)
    _bounds(examiner, verdicts)
    _autoattack(examiner, verdicts, engine)
    finished = _complete(examiner, verdicts, complete)
    audit = crossed_audit(examiner, verdicts, all_attacked=engine == "reference", complete=bool(finished))
    diagnosed = diagnose(examiner, verdicts, surrogates)
    audit.contradictions.extend(diagnosed.contradictions)
    _gate(examiner, verdicts, audit)
    judge_corrupted(examiner, verdicts, pictures)
    attack_corrupted(examiner, verdicts, pictures)
    if isinstance(pictures, OfficialFiles):
        examiner.notes.append(pictures.note)
    return Evaluation(
        verdicts.table(),
        verdicts.adversarial,
        audit,
        (*(method for method in examiner.bound_methods if examiner.bounding.get(method, True)), *finished),
        dict(examiner.costs),
        tuple(examiner.notes),
        tuple(merged(examiner.warnings)),
        diagnosed.diagnosis,
        {"complete_nodes": complete} if complete else {},
    )


def _clean(examiner: Examiner, verdicts: Verdicts) -> None:
    everything = np.ones(len(examiner.labels), dtype=bool)
    examiner.progress.begin("clean", len(everything))
    for shard, _ in examiner.shards(everything):
        verdicts.clean[shard] = examiner.predict("clean", examiner.images[shard]) == examiner.labels[shard]
        examiner.progress.advance(len(shard))


def _pgd(examiner: Examiner, verdicts: Verdicts) -> None:
    pgd = examiner.track.attacks.pgd
    runs = pgd.restarts * len(pgd.losses_for(examiner.examples.classes))
    examiner.progress.begin("PGD", int(verdicts.clean.sum()) * runs * pgd.steps)
    for shard, rows in examiner.shards(verdicts.clean):
        found = examiner.pgd("pgd", rows)
        verdicts.attacked("pgd", rows, examiner.confirm("pgd", "PGD", shard, rows, found), found)


def _bounds(examiner: Examiner, verdicts: Verdicts) -> None:
    for method in examiner.bound_methods:
        examiner.progress.begin(f"bounds: {method}", int(verdicts.open.sum()))
        for _, rows in examiner.shards(verdicts.open):
            certified, margins = examiner.certify("bounds", method, rows)
            verdicts.bounded(method, rows, certified, margins)
            examiner.progress.advance(len(rows))


def _autoattack(examiner: Examiner, verdicts: Verdicts, engine: Engine, *, spared: Flags | None = None) -> None:
    attacks = autoattack.applicable(examiner.examples.classes)
    alive = verdicts.open if engine == "cascade" else verdicts.clean.copy()
    for attack in attacks:
        before = alive.mean()
        shown = alive & ~spared if spared is not None and attack in THOROUGH else alive.copy()
        examiner.progress.begin(f"AutoAttack: {attack}", int(shown.sum()) * REFERENCE_FORWARDS[attack])
        for rows, broken, found in examiner.autoattack("autoattack", attack, shown):
            verdicts.attacked(attack, rows, broken, found)
            alive[rows[broken]] = False
        if attack == "square":
            said = autoattack.square_gain(before=float(before), after=float(alive.mean()))
            examiner.warnings += read_warnings(attack, said)
    # With fewer than four classes the reference code cannot run APGD-T, so what ran is not AutoAttack.
    if engine == "reference" and attacks == autoattack.STAGES:
        correct = np.flatnonzero(verdicts.clean)
        verdicts.autoattack.iloc[correct] = alive[correct]


def _complete(examiner: Examiner, verdicts: Verdicts, nodes: int) -> tuple[str, ...]:
    """Prove or break what is still open; returns the methods that could."""
    wanted = verdicts.open if nodes else np.zeros(len(examiner.labels), dtype=bool)
    if not wanted.any():
        return ()
    examiner.progress.begin("complete verification", int(wanted.sum()) * nodes)
    for shard, rows in examiner.shards(wanted):
        answer = examiner.complete(COMPLETE, rows, nodes)
        if answer is None:
            return ()  # of this network nothing can be known, which the first question finds out
        broken = examiner.confirm(COMPLETE, "complete verification", shard, rows, answer.found)
        verdicts.attacked(COMPLETE, rows, broken, answer.found)
        for method in verify.METHODS:
            proved = np.array([name == method for name in answer.methods], dtype=bool)
            verdicts.bounded(method, rows, proved, answer.margins)
    return tuple(name for name in verify.METHODS if name == verify.BRANCHING or name in verdicts.certified_by)


def _gate(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    found = [*verdicts.contradictions(), *audit.contradictions]
    if found:
        rows = np.array(sorted({one.row for one in found}))
        raise GateError(
            f"Gate: {examiner.names(rows)} {'are' if len(rows) > 1 else 'is'} both certified and broken (by "
            f"{found[0].certified_by} and {found[0].broken_by}); this is a bug in a bound, an attack or the model "
            "wrapper, so nothing is published."
        )


def attack(examiner: Examiner, verdicts: Verdicts) -> None:
    """The attacks alone, in the cascade's order: PGD on what is clean, AutoAttack on what is open then."""
    _pgd(examiner, verdicts)
    _autoattack(examiner, verdicts, "cascade")


def settle(examiner: Examiner, verdicts: Verdicts, *, unbounded: Flags, spared: Flags) -> None:
    """The cascade from PGD to AutoAttack on what is clean, for a caller with radii of its own choice.

    Args:
        examiner: puts the questions.
        verdicts: its `clean` says which examples are judged.
        unbounded: (N,), the examples that bounds pass over.
        spared: (N,), the examples that the attacks of `THOROUGH` pass over.
    """
    judged = verdicts.clean
    _pgd(examiner, verdicts)
    # Bounds take what is open, and what is not clean is not open.
    verdicts.clean = judged & ~unbounded
    _bounds(examiner, verdicts)
    verdicts.clean = judged
    _autoattack(examiner, verdicts, "cascade", spared=spared)
