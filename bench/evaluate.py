"""The evaluation: the cascade's verdicts, the diagnostics, the gate, and the corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from robustboard.attacks.engine_warnings import EngineWarning, merged
from robustboard.bench.answers import Floats, StageCost
from robustboard.bench.cascade import Engine, judge
from robustboard.bench.corrupted import Pictures, attack_corrupted, judge_corrupted, made, require_possible
from robustboard.bench.crossed_audit import Audit
from robustboard.bench.diagnose import diagnose
from robustboard.bench.examiner import Examiner
from robustboard.bench.official import OfficialFiles
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.session import Session
from robustboard.bench.surrogates import Surrogates
from robustboard.bench.verdicts import Verdicts
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import GateError
from robustboard.leaderboard.findings import Diagnosis


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
        engine: `"cascade"` attacks what nothing has settled with the board's own attacks, the track's ensemble of them;
            `"reference"` runs AutoAttack itself on every correctly classified example, which costs more and yields the
            metric `autoattack`.
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
    judged = judge(examiner, verdicts, engine=engine, complete=complete)
    audit = judged.audit
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
        (*(method for method in examiner.bound_methods if examiner.bounding.get(method, True)), *judged.verified),
        dict(examiner.costs),
        tuple(examiner.notes),
        tuple(merged(examiner.warnings)),
        diagnosed.diagnosis,
        {"complete_nodes": judged.complete} if judged.complete else {},
    )


def _gate(examiner: Examiner, verdicts: Verdicts, audit: Audit) -> None:
    found = [*verdicts.contradictions(), *audit.contradictions]
    if found:
        rows = np.array(sorted({one.row for one in found}))
        raise GateError(
            f"Gate: {examiner.names(rows)} {'are' if len(rows) > 1 else 'is'} both certified and broken (by "
            f"{found[0].certified_by} and {found[0].broken_by}); this is a bug in a bound, an attack or the model "
            "wrapper, so nothing is published."
        )
