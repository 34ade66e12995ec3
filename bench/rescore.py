"""The second pass: every stored adversarial example is read from its file and judged once more.

A break counts while a run is under way because the tensor in memory was misclassified. What others will check is the
file. So the file is read as if a stranger had written it: the examples must be exactly those that the outcome table
calls broken, each image allowed to the last bit, and each misclassified in a pass of its own over the canonical batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from robustboard.bench.examiner import Examiner
from robustboard.bench.perturbed_file import read_perturbed
from robustboard.bench.protocol import Examples, Track
from robustboard.bench.session import Session
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import ChallengeError, GateError
from robustboard.leaderboard.outcomes import verdicts


def rescore(
    session: Session,
    track: Track,
    examples: Examples,
    outcomes: pd.DataFrame,
    stored: Path,
    *,
    progress: Progress | None = None,
) -> int:
    """Judge the stored adversarial examples again, and return how many there are.

    Args:
        session: the model.
        track: the protocol.
        examples: the track's examples, in its order.
        outcomes: what the evaluation found, rows in the same order.
        stored: the npz file of the images that broke examples.
        progress: told of the stage.

    Raises:
        GateError: if the file and the table disagree in any way; nothing may be published.
    """
    examiner = Examiner(session, track, examples, progress or NoProgress())
    try:
        found = read_perturbed(stored, examples, track.threat)
    except ChallengeError as error:
        raise GateError(
            f"Gate: the stored adversarial examples cannot be checked again, so nothing is published: {error}"
        ) from error
    broken = np.flatnonzero((verdicts(outcomes) == "broken").to_numpy(bool))
    if not np.array_equal(found.rows, broken):
        different = np.setxor1d(found.rows, broken)
        raise GateError(
            f"Gate: the stored adversarial examples and the outcome table differ on {examiner.names(different)}; this "
            "is a bug, so nothing is published."
        )
    examiner.progress.begin("second pass", len(broken))
    images = examiner.images.copy()
    images[found.rows] = found.images
    wanted = np.zeros(len(images), dtype=bool)
    wanted[broken] = True
    for shard, rows in examiner.shards(wanted):
        right = examiner.predict("second pass", images[shard])[np.searchsorted(shard, rows)] == examiner.labels[rows]
        if right.any():
            raise GateError(
                f"Gate: in the second pass over the stored adversarial images {examiner.names(rows[right])} "
                f"{'are' if right.sum() > 1 else 'is'} classified correctly; the model or the machine does not repeat "
                "itself, so nothing is published."
            )
        examiner.progress.advance(len(rows))
    return len(broken)
