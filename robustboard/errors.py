"""Every error a user can meet: one sentence that says what was given, what is allowed and what to do next.

The command line prints the sentence and leaves with `exit_code`: 1 for a finding (a broken gate, a regression) and 2
for misuse. Nothing here imports anything, so every package may import it.
"""

from __future__ import annotations


class RobustBoardError(Exception):
    """The base of all errors that are ours; its text is one complete sentence."""

    exit_code: int = 2


class DataError(RobustBoardError):
    """A data set is missing, or its content is not what a track needs."""


class TrackError(RobustBoardError):
    """A track is unknown, or its TOML does not describe one."""


class SweepError(RobustBoardError):
    """A sweep.toml does not describe a sweep, or some of a sweep's cells failed."""


class DefenseError(RobustBoardError):
    """A defense is unknown, mis-configured, or does not suit the track."""


class SubmissionError(RobustBoardError):
    """A defense.toml, or a file that it names, cannot be used."""


class ModelError(RobustBoardError):
    """A model breaks the classifier contract (shape, logits, NaN, determinism), or its own code raises."""


class WorkerError(RobustBoardError):
    """The process that runs the model's code died, hung or talked nonsense."""


class LostWorkerError(WorkerError):
    """The model's process is gone, or was ended because it fell silent; another one can be asked in its place.

    Attributes:
        how: what became of it, in none of its own words, such as `ended by SIGKILL during attack`.
        silent: whether it fell silent.
    """

    def __init__(self, sentence: str, *, how: str = "lost", silent: bool = False) -> None:
        super().__init__(sentence)
        self.how, self.silent = how, silent


class ClusterError(RobustBoardError):
    """A Ray cluster cannot be used: it is not there, is too small, or has other software."""


class NoRoomError(ClusterError):
    """No node of a Ray cluster has room for a worker."""


class BoundsError(RobustBoardError):
    """Verified bounds cannot be computed here; the reason goes into the record."""


class RecordError(RobustBoardError):
    """A record, or its outcome table, does not follow the schema."""


class ChallengeError(RobustBoardError):
    """Somebody's adversarial examples cannot be used: not such a file, or not allowed perturbations."""


class TrackingError(RobustBoardError):
    """The MLflow store cannot be used."""


class StoreAwayError(TrackingError):
    """The MLflow store does not answer now, and may later."""


class OutputError(RobustBoardError):
    """A result cannot be written where it was asked for."""


class FindingError(RobustBoardError):
    """What was measured again differs from what is published."""

    exit_code = 1


class GateError(RobustBoardError):
    """An example is both certified and broken, or a stored break does not hold: a bug, so nothing is published."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    r"""The kind and first line of somebody else's error, to end a sentence with; no full stop.

    >>> first_line(ValueError("no luck.\nat all"))
    'ValueError: no luck'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200].rstrip('. ')}" if lines else type(error).__name__
