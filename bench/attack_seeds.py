"""How much a robust accuracy moves with the seed of the attacks: the attacks again, with other seeds, on a subset.

Auto-attack's issue 54 asks for it: a board's number comes from one seed, and nobody knows its spread. The verdicts are
those of the protocol's seed alone. An example that another seed breaks is truly broken, so its image is kept: it can be
entered as a challenge like anybody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from robustboard.attacks.keyed import derive_seed
from robustboard.bench.answers import Floats
from robustboard.bench.cascade import attack
from robustboard.bench.examiner import Examiner
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.session import Session
from robustboard.bench.verdicts import COMPLETE, Flags, Verdicts
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import GateError
from robustboard.leaderboard.record import AttackSpread

SUBSET: Final = 100
"""At most this many examples, so that a few seeds cost less than the evaluation itself."""


@dataclass(frozen=True)
class SeedStudy:
    """What other attack seeds found.

    Attributes:
        spread: the robust accuracies on the subset.
        breaks: row -> the image (C, H, W) that broke an example which the protocol left undecided.
    """

    spread: AttackSpread
    breaks: Mapping[int, Floats]


def study_attack_seeds(
    session: Session,
    track: Track,
    examples: Examples,
    outcomes: pd.DataFrame,
    *,
    seeds: int,
    progress: Progress | None = None,
) -> SeedStudy | None:
    """Run the board's attacks with other seeds on at most `SUBSET` examples, drawn by content hash from all.

    Every value is of these attacks alone. What only complete verification broke therefore counts as held under the
    protocol's seed too. A record of the reference engine is compared with the board's own attacks as well.

    Args:
        session: the model.
        track: the protocol, whose attack seeds are raised by 1, 2, ..., `seeds`.
        examples: the track's examples, in its order.
        outcomes: what the evaluation found, rows in the same order.
        seeds: how many other seeds; with 0 there is nothing to study.
        progress: told of every stage.

    Raises:
        GateError: if another seed breaks a certified example; nothing may be published.
    """
    if seeds == 0:
        return None
    subset = _subset(examples)
    clean, certified = outcomes["clean"].to_numpy(bool) & subset, outcomes["certified"].to_numpy(bool)
    held_first = outcomes["verdict"].isin(["certified", "undecided"]).to_numpy(bool) & subset
    # Other seeds run no complete verification, so its breaks would look like an effect of the seed.
    survived = held_first | ((outcomes["broken_by"] == COMPLETE).fillna(value=False).to_numpy(bool) & subset)
    held, breaks = [int(survived.sum())], dict[int, Floats]()
    for seed in range(1, seeds + 1):
        found = _attacked(session, _reseeded(track, seed), examples, clean, certified, progress or NoProgress())
        held.append(int((clean & ~found.broken).sum()))
        for row, image in found.adversarial.items():
            if held_first[row]:
                breaks.setdefault(row, image)
    spread = AttackSpread.tally(held, n=int(subset.sum()), seeds=range(seeds + 1), would_break=len(breaks))
    return SeedStudy(spread, breaks)


def _subset(examples: Examples) -> Flags:
    drawn = sorted(range(len(examples)), key=lambda row: derive_seed("attack-seeds", examples.hashes[row]))
    chosen = np.zeros(len(examples), dtype=bool)
    chosen[drawn[:SUBSET]] = True
    return chosen


def _reseeded(track: Track, seed: int) -> Track:
    attacks = track.attacks
    pgd = attacks.pgd.model_copy(update={"seed": attacks.pgd.seed + seed})
    autoattack = attacks.autoattack.model_copy(update={"seed": attacks.autoattack.seed + seed})
    return track.model_copy(update={"attacks": attacks.model_copy(update={"pgd": pgd, "autoattack": autoattack})})


def _attacked(
    session: Session, track: Track, examples: Examples, clean: Flags, certified: Flags, progress: Progress
) -> Verdicts:
    """The attacks on what is clean; as in the cascade, they pass over what is certified."""
    examiner = Examiner(session, track, examples, progress)
    verdicts = Verdicts(examples.hashes, examples.labels)
    verdicts.clean = clean
    verdicts.certified_by = ["certified" if flag else None for flag in certified & clean]
    attack(examiner, verdicts)
    if contradictions := verdicts.contradictions():
        rows = np.array([one.row for one in contradictions])
        raise GateError(
            f"Gate: with another attack seed {contradictions[0].broken_by} breaks {examiner.names(rows)}, certified "
            "before; this is a bug in a bound, an attack or the model wrapper, so nothing is published."
        )
    return verdicts
