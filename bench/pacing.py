"""What the questions of an evaluation cost with one model: timed on two small numbers of its examples.

The examples are drawn by content hash. One run of PGD and the bounds on them also say how many examples each stage of
the evaluation will have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from robustboard.attacks.keyed import derive_seed
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.channel import Array
from robustboard.bench.corrupted import Pictures
from robustboard.bench.diagnose import breaks_contract
from robustboard.bench.examiner import Examiner
from robustboard.bench.forecast import Measured, Pace, Shares, share
from robustboard.bench.operations import Reply
from robustboard.bench.protocol import Examples, Track, as_floats
from robustboard.bench.session import Session
from robustboard.bench.verdicts import Flags, Rows
from robustboard.defenses.adapter import NoProgress
from robustboard.leaderboard.statistics import wilson

_LOOKED_AT: Final = (8, 32, 96)
_BOUNDED: Final = (2, 8, 24, 64)
_CORRUPTED: Final = (2, 16, 64)
_LONG_SECONDS: Final = 0.8
"""The numbers of examples that something is timed on: a larger one only after a shorter time than this."""

_BUDGETS: Final = (1, 32, 1024)
_VERIFIED: Final = 2
"""Complete verification is timed on two examples, with budgets of sub-domains that grow while time is left."""

_POINT: Final = 1000
"""Within a thousandth of the radius next to nothing breaks, so that every gradient step is made."""

_STAGE: Final = "estimate"

T = TypeVar("T")


def clocked(work: Callable[[], T]) -> tuple[float, T]:
    """How many seconds some work took, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def paced(work: Callable[[Rows], T], rows: Rows, sizes: Sequence[int]) -> tuple[Pace, int, T]:
    """The pace of work on examples, on how many it was timed last, and what that gave.

    Args:
        work: does something with some of `rows`.
        rows: at least one example.
        sizes: how many to take, rising.
    """
    few, last = rows[: sizes[0]], clocked(partial(work, rows[: sizes[0]]))
    # What else the machine does can only lengthen a time.
    short, count = min(last[0], clocked(partial(work, few))[0]), len(few)
    for size in sizes[1:]:
        if last[0] > _LONG_SECONDS or count == len(rows):
            break
        count = len(rows[:size])
        last = clocked(partial(work, rows[:count]))
    return Pace.fitted((len(few), short), (count, last[0])), count, last[1]


class Sample:
    """Examples of a track, and what is measured on them; ask in the order of the methods.

    Args:
        session: the model.
        track: the protocol.
        examples: all of the track's.
        pictures: gives the corrupted images.
        complete: the budget of complete verification, 0 if it is left out.
    """

    def __init__(
        self, session: Session, track: Track, examples: Examples, pictures: Pictures, *, complete: int
    ) -> None:
        self._session = _Counted(session)
        self._track, self._examples, self._pictures, self._complete = track, examples, pictures, complete
        self._examiner = Examiner(self._session, track, examples, NoProgress())
        hashes = examples.hashes
        drawn = sorted(range(len(hashes)), key=lambda row: derive_seed("estimate", hashes[row]))
        self._rows = np.array(drawn[: _LOOKED_AT[-1]], dtype=np.int64)
        self._correct: Flags = np.zeros(0, dtype=bool)
        self._standing: Flags = np.zeros(0, dtype=bool)
        self._bounded: list[tuple[int, int]] = []
        self._excluded: Flags = np.zeros((len(examples), examples.classes), dtype=bool)
        self._targets = 1.0

    def contract(self) -> None:
        """Measure the contract, as a score does first; for a model that breaks it no bounds are run."""
        self._examiner.check()
        if breaks_contract(self._examiner):
            self._examiner.bound_methods = ()

    def reference_checks(self) -> None:
        """The reference engine's own checks, as a score makes them."""
        self._examiner.reference_checks()

    def measure(self) -> tuple[float, Measured]:
        """Seconds that the first bounds take more than later ones, and the paces."""
        predict, step = self._passes()
        correct = self._rows[self._correct]
        standing = correct[self._first_look(correct)]
        # Without a survivor, bounds cost what they cost on any others.
        set_up, bounds, left = self._bounds(standing if len(standing) else self._rows)
        self._targets = float((~self._excluded[left]).sum(axis=1).mean() - 1) / max(1, self._examples.classes - 1)
        settle, settled = self._settle(left) if self._complete else (Pace(0.0, 0.0), 0.0)
        return set_up, Measured(predict, step, self._corrupt(), bounds, settle, settled)

    def shares(self, *, stands_in: bool) -> tuple[Shares, Shares, Shares]:
        """The least, the likeliest and the largest shares of examples that attacks will have.

        Args:
            stands_in: whether the model is not the one that will be scored, so that the sample says little.
        """
        n = len(self._examples)
        correct = share(int(self._correct.sum()), len(self._correct), n)
        stood, looked = int(self._standing.sum()), len(self._standing)
        held = share(stood, looked, n)
        low, high = (held, held) if looked >= n else wilson(stood, looked)
        # Bounds on what PGD has broken say nothing of what it has not.
        bounded = self._bounded if stood else [(seen, seen) for _, seen in self._bounded]
        likeliest = _cumulated([share(left, seen, n) for left, seen in bounded])
        least = _cumulated([left / seen if seen >= n else wilson(left, seen)[0] for left, seen in bounded])
        most = _cumulated([left / seen if seen >= n else wilson(left, seen)[1] for left, seen in bounded])
        if stands_in:
            low, high, most = held / 2, 1.0, tuple(1.0 for _ in most)
        return (
            Shares(correct, low, least, self._targets),
            Shares(correct, held, likeliest, self._targets),
            Shares(correct, high, most, self._targets),
        )

    def _passes(self) -> tuple[Pace, Pace]:
        """The paces of a forward pass and of a gradient step."""
        examiner = self._examiner
        predict, _, predicted = paced(
            lambda rows: examiner.predict(_STAGE, examiner.images[rows]), self._rows, _LOOKED_AT
        )
        self._rows = self._rows[: len(predicted)]
        # What the model says is taken for the truth, and the ball for a point, so that no example leaves early.
        still = Examiner(self._session, self._track, self._examples, NoProgress())
        still.labels = examiner.labels.copy()
        still.labels[self._rows] = predicted
        still.threat = ThreatModel(examiner.threat.norm, examiner.threat.eps / _POINT)
        run, count, _ = paced(lambda rows: still.pgd(_STAGE, rows, runs=range(1)), self._rows, _LOOKED_AT)
        self._rows = self._rows[: max(count, _LOOKED_AT[1])]
        self._correct = still.labels[self._rows] == examiner.labels[self._rows]
        steps = self._track.attacks.pgd.steps
        return predict, Pace(run.call / steps, run.example / steps)

    def _first_look(self, rows: Rows) -> Flags:
        """Which of the correctly classified examples one run of PGD leaves standing."""
        if len(rows):
            pgd = self._track.attacks.pgd
            losses = pgd.losses_for(self._examples.classes)
            run = pgd.restarts * losses.index("margin") if "margin" in losses else 0
            found = self._examiner.pgd(_STAGE, rows, runs=[run])
            self._standing = self._examiner.predict(_STAGE, found) == self._examiner.labels[rows]
        return self._standing

    def _bounds(self, rows: Rows) -> tuple[float, dict[str, Pace], Rows]:
        """What the first call costs more than later ones, each method's pace, and examples that are left open."""
        set_up, paces = 0.0, dict[str, Pace]()
        for method in self._examiner.bound_methods:
            certify = partial(self._examiner.certify, _STAGE, [method])
            first, _ = clocked(partial(certify, rows[:1]))
            paces[method], count, found = paced(certify, rows, _BOUNDED)
            proofs = found[method]
            set_up += max(0.0, first - paces[method].seconds(1))
            self._bounded.append((count - int(proofs.certified.sum()), count))
            self._excluded[rows[:count]] |= proofs.excluded
            # As in an evaluation, what is certified goes no further: what is left may be harder.
            left = rows[:count][~proofs.certified]
            rows = left if len(left) else rows
        return set_up, paces, rows

    def _corrupt(self) -> Pace:
        """The pace of making examples under all corruptions and severities, and of judging them."""

        def judged(rows: Rows) -> None:
            for name, severity in self._track.corruptions.conditions:
                self._examiner.predict(_STAGE, as_floats(self._pictures(name, severity, rows)))

        return paced(judged, self._rows, _CORRUPTED)[0]

    def _settle(self, rows: Rows) -> tuple[Pace, float]:
        """Seconds of complete verification for an example and a sub-domain, and the share that needs few of them."""
        rows = rows[:_VERIFIED]
        begun: tuple[int, float] | None = None
        pace, settled = Pace(0.0, 0.0), 0.0
        for budget in _BUDGETS:
            self._session.told = 0
            seconds, answer = clocked(partial(self._examiner.complete, _STAGE, rows, min(budget, self._complete)))
            if answer is None:
                return Pace(seconds, 0.0), 1.0
            proved = np.array([method is not None for method in answer.methods])
            broken = self._examiner.predict(_STAGE, answer.found) != self._examiner.labels[rows]
            settled = float((proved | broken).mean())
            nodes = self._session.told
            begun = begun or (nodes, seconds)
            each = max(0.0, seconds - begun[1]) / (nodes - begun[0]) if nodes > begun[0] else seconds / max(1, nodes)
            pace = Pace(begun[1] / len(rows), each)
            if seconds > _LONG_SECONDS or settled == 1:
                break
        return pace, settled


def _cumulated(left: Sequence[float]) -> tuple[float, ...]:
    """What several methods leave of everything, from the share that each leaves of what reaches it."""
    return tuple(float(product) for product in np.cumprod(left))


class _Counted:
    """A session that counts the signs of life of its calls: sub-domains, in complete verification."""

    jobs = 1

    def __init__(self, inner: Session) -> None:
        self._inner = inner
        self.told = 0

    def call(
        self,
        operation: str,
        params: Mapping[str, Any],
        arrays: Mapping[str, Array],
        *,
        on_forwards: Callable[[int], None] | None = None,
    ) -> Reply:
        """Ask, and count."""
        del on_forwards
        return self._inner.call(operation, params, arrays, on_forwards=self._count)

    def _count(self, steps: int) -> None:
        self.told += steps

    def close(self) -> None:
        """The inner session is another's to close."""
