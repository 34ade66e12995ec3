"""Several trainings of one defense that differ in their seed alone; see `training_spread` for what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from robustboard.bench.entrants import TrainedEntrant
from robustboard.bench.finished import finished
from robustboard.bench.request import Request, prepare
from robustboard.bench.score import score_defense
from robustboard.defenses.adapter import Progress
from robustboard.errors import DefenseError
from robustboard.leaderboard.record import Record
from robustboard.leaderboard.training_spread import TrainingSpread, training_spreads


def run_training_seeds(request: Request, seeds: Sequence[int], progress: Progress | None = None) -> TrainingSpread:
    """Score a built-in defense with every seed; a run that is finished under `request.runs` is read, not repeated.

    Args:
        request: what to score; its seed and run directory are not used.
        seeds: the training seeds.
        progress: told of every stage.

    Raises:
        RobustBoardError: one sentence, with the exit code of its class.
    """
    records = [_finished(one) or score_defense(one, progress).record for one in _requests(request, seeds)]
    spreads = training_spreads(records)
    if not spreads:
        raise DefenseError(f"No training of {request.defense} has a record that is ok, so there is no spread to tell.")
    (spread,) = spreads.values()
    return spread


def _requests(request: Request, seeds: Sequence[int]) -> list[Request]:
    return [replace(request, seed=seed, run_dir=None) for seed in seeds]


def _finished(request: Request) -> Record | None:
    """The record of this very run, if its run directory has one."""
    made = prepare(request)
    if not isinstance(made.entrant, TrainedEntrant):
        raise DefenseError("A submission is one trained network, so there are no training seeds to compare.")
    return finished(request, made)
