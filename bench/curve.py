"""The sandwich over a grid of radii, for much less than a run at each.

A smaller ball lies inside a larger one. So an example that is broken at one eps is broken at every larger one, by the
same image; one that is certified at one eps is certified at every smaller one. The grid is halved again and again, and
at each radius only the examples that nothing implies yet are judged, by the stages of the evaluation. FAB-T and Square,
which take most of the passes, pass over an example that they failed to break in a larger ball, where they had
every image that they could have found here; PGD, APGD-CE and APGD-T try every ball. Bounds pass over an example that
they failed to certify in a smaller ball. Neither rule can break or certify what is not; at worst an example stays
undecided that a run at that radius by itself would have decided.

An example whose certified radius reaches its broken one is a contradiction, and the crossed audit looks for them at the
radii where the verdicts change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import torch

from robustboard.attacks.keyed import derive_seed
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.answers import Floats
from robustboard.bench.cascade import THOROUGH, settle
from robustboard.bench.crossed_audit import Audit, crossed_audit
from robustboard.bench.datasets import data_folders, load_dataset
from robustboard.bench.entrants import find_entrant
from robustboard.bench.environment import threads_for
from robustboard.bench.examiner import Examiner
from robustboard.bench.process import WorkerProcess
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select
from robustboard.bench.remote import LOAD_SECONDS
from robustboard.bench.session import Session
from robustboard.bench.verdicts import Flags, Verdicts
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import GateError, TrackError
from robustboard.leaderboard.curve import Curve, Reach

_DEFAULT_GRID: Final = tuple(Fraction(quarter, 4) for quarter in range(1, 9))
"""Of the track's own eps."""


@dataclass(frozen=True)
class Request:
    """What to trace; the fields are those of `score.Request`.

    Attributes:
        grid: radii as text, such as `("1/20", "1/10")`; empty for quarters of the track's own up to twice it.
    """

    defense: str
    track: str | Path
    grid: tuple[str, ...] = ()
    n: int | None = None
    seed: int = 0
    overrides: dict[str, object] = field(default_factory=dict)
    device: str = "cpu"
    threads: int | None = None
    runs: Path = Path("runs")
    data_dirs: tuple[Path, ...] = ()
    download: bool = False
    load_seconds: float = LOAD_SECONDS


@dataclass
class Traced:
    """What is known of each example over a grid of k radii.

    Attributes:
        clean: (N,), whether it is classified correctly.
        certified: (N,), the place of the largest radius at which it is certified; -1 for none.
        broken: (N,), the place of the smallest radius at which it is broken; k for none.
        margins: (N,), the certified margin at the largest certified radius.
        survived: (N,), the place of the largest radius at which every attack ran and failed; -1 for none.
        unproven: (N,), the place of the smallest radius at which bounds ran and failed; k for none.
        judged: how many (example, radius) pairs were judged.
        attacked: on how many of them FAB-T or Square ran.
        audit: the crossings.
        bound_methods: those that could bound anything.
        notes: what limits a result.
    """

    clean: Flags
    certified: np.ndarray[tuple[int], np.dtype[np.int64]]
    broken: np.ndarray[tuple[int], np.dtype[np.int64]]
    margins: np.ndarray[tuple[int], np.dtype[np.float64]]
    certified_by: list[str | None]
    broken_by: list[str | None]
    survived: np.ndarray[tuple[int], np.dtype[np.int64]]
    unproven: np.ndarray[tuple[int], np.dtype[np.int64]]
    judged: int = 0
    attacked: int = 0
    audit: Audit = field(default_factory=Audit)
    bound_methods: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def verdict(self, place: int) -> list[str]:
        """The verdict of each example at one radius of the grid."""
        settled = np.select(
            [~self.clean, self.broken <= place, self.certified >= place],
            ["misclassified", "broken", "certified"],
            "undecided",
        )
        verdicts: list[str] = settled.tolist()
        return verdicts


def run_curve(request: Request, progress: Progress | None = None) -> Curve:
    """Train or load a defense once, at the track's own eps, and trace its sandwich over the grid.

    Raises:
        GateError: if an example is certified at an eps and broken at no larger a one.
        RobustBoardError: one sentence for whatever cannot be used.
    """
    watched = progress or NoProgress()
    watched.begin("data", 1)
    track = load_track(request.track)
    track = track if request.n is None else track.limited(request.n)
    grid = parse_grid(request.grid, track)
    dataset = load_dataset(track.dataset, data_dirs=data_folders(request.data_dirs), download=request.download)
    track, examples = resolve(track, dataset), select(track, dataset)
    entrant = find_entrant(request.defense, request.overrides, track, dataset, seed=request.seed)
    # The run directory of `score`, so that whichever comes second finds the finished training.
    folder = request.runs / track.id / entrant.info.name / entrant.key
    watched.begin("the model's process", 1)
    threads = request.threads or threads_for(examples.images[0].size)
    with WorkerProcess(device=request.device, threads=threads, load_seconds=request.load_seconds) as worker:
        brought = entrant.enter(worker, folder, watched)
        traced = trace(worker, track, examples, grid, progress=watched)
    return Curve(
        track={"id": track.id, "hash": track.hash, "norm": track.threat.norm, "eps": track.threat.text},
        defense={
            "name": entrant.info.name,
            "title": entrant.info.title,
            "checkpoint_sha256": brought.checkpoint_sha256,
        },
        grid=[(threat.text, float(threat.eps)) for threat in grid],
        reaches=_reaches(traced, examples, len(grid)),
        work={
            "judged": traced.judged,
            "judged_without_reuse": int(traced.clean.sum()) * len(grid),
            "attacked": traced.attacked,
            # A run at one radius shows every attack at least what it leaves undecided.
            "attacked_without_reuse": sum(traced.verdict(place).count("undecided") for place in range(len(grid))),
        },
        audit={
            "broken_bounded": traced.audit.broken_bounded,
            "certified_attacked": traced.audit.certified_attacked,
        },
        seeds={
            **entrant.seeds,
            "pgd": track.attacks.pgd.seed,
            "autoattack": track.attacks.autoattack.seed,
        },
        bound_methods=traced.bound_methods,
        notes=traced.notes,
    )


def parse_grid(texts: Sequence[str], track: Track) -> list[ThreatModel]:
    """The radii of a grid, ascending.

    Raises:
        TrackError: if one is no radius, or stands there twice.
    """
    threat = track.threat
    if not texts:
        fitting = [threat.eps * share for share in _DEFAULT_GRID if threat.norm != "linf" or threat.eps * share <= 1]
        return [ThreatModel(threat.norm, eps) for eps in fitting]
    found = sorted((ThreatModel.parse(threat.norm, text) for text in texts), key=lambda one: one.eps)
    for one, other in itertools.pairwise(found):
        if one.eps == other.eps:
            raise TrackError(f"The grid names the radius {one.text} twice.")
    return found


def trace(
    session: Session,
    track: Track,
    examples: Examples,
    grid: Sequence[ThreatModel],
    *,
    progress: Progress | None = None,
) -> Traced:
    """Judge the session's model at every radius of the grid, ascending, reusing what one says of another.

    Raises:
        GateError: if an example is certified at an eps and broken at no larger a one.
        ModelError: if the model breaks the classifier contract.
    """
    named = [_Named(progress or NoProgress(), threat.text) for threat in grid]
    examiners = [
        Examiner(session, track.model_copy(update={"threat": threat}), examples, bar)
        for threat, bar in zip(grid, named, strict=True)
    ]
    traced = _start(examiners[0], len(grid))
    for examiner in examiners:
        examiner.bound_methods = examiners[0].bound_methods
    judged = np.zeros((len(examples), len(grid)), dtype=bool)
    for place in bisection_order(len(grid)):
        wanted = traced.clean & (traced.certified < place) & (traced.broken > place) & ~judged[:, place]
        verdicts = Verdicts(examples.hashes, examples.labels)
        verdicts.clean = wanted
        if wanted.any():
            hopeless = traced.unproven < place
            settle(examiners[place], verdicts, unbounded=hopeless, spared=traced.survived > place)
            traced.unproven[verdicts.open & ~hopeless] = place
        judged[:, place] |= wanted
        _enter(traced, verdicts, place, grid, examiners[place].images)
        _gate(traced, examiners[place], grid)
    traced.judged = int(judged.sum())
    _audit(traced, examiners, grid)
    notes = [note for examiner in examiners for note in examiner.notes]
    traced.notes = tuple(dict.fromkeys(notes))
    bounding = dict.fromkeys(examiners[0].bound_methods, False)
    for examiner in examiners:
        bounding |= {method: bounding[method] or could for method, could in examiner.bounding.items()}
    traced.bound_methods = tuple(method for method, could in bounding.items() if could)
    return traced


def bisection_order(count: int) -> Iterator[int]:
    """The places 0..count-1, the middle first, then the middles of the halves, and so on.

    >>> list(bisection_order(7))
    [3, 1, 5, 0, 2, 4, 6]
    """
    pending = [(0, count)]
    while pending:
        begin, end = pending.pop(0)
        if begin < end:
            middle = (begin + end) // 2
            yield middle
            pending += [(begin, middle), (middle + 1, end)]


def _start(examiner: Examiner, count: int) -> Traced:
    """The classifier contract and the clean pass, which no radius changes."""
    n = len(examiner.labels)
    examiner.check()
    clean = np.zeros(n, dtype=bool)
    shards = [shard for shard, _ in examiner.shards(np.ones(n, dtype=bool))]
    batches = (examiner.images[shard] for shard in shards)
    for shard, predicted in zip(shards, examiner.predict_each("clean", batches), strict=True):
        clean[shard] = predicted == examiner.labels[shard]
    return Traced(
        clean,
        np.full(n, -1, dtype=np.int64),
        np.full(n, count, dtype=np.int64),
        np.full(n, np.nan),
        [None] * n,
        [None] * n,
        np.full(n, -1, dtype=np.int64),
        np.full(n, count, dtype=np.int64),
    )


def _enter(traced: Traced, verdicts: Verdicts, place: int, grid: Sequence[ThreatModel], images: Floats) -> None:
    ran = pd.concat([verdicts.survived[stage] for stage in THOROUGH], axis=1).notna().any(axis=1).to_numpy()
    traced.attacked += int(ran.sum())
    traced.survived[ran & verdicts.open & (traced.survived < place)] = place
    for row in np.flatnonzero(verdicts.certified):
        if place > traced.certified[row]:
            traced.certified[row], traced.margins[row] = place, verdicts.margins[row]
            traced.certified_by[row] = verdicts.certified_by[row]
    for row in np.flatnonzero(verdicts.broken):
        # An image that lies deeper in its ball breaks the example at smaller radii too.
        found, clean = torch.from_numpy(verdicts.adversarial[int(row)])[None], torch.from_numpy(images[row])[None]
        deepest = next(step for step, threat in enumerate(grid) if bool(threat.contains(found, clean)))
        if deepest < traced.broken[row]:
            traced.broken[row], traced.broken_by[row] = deepest, verdicts.broken_by[row]


def _gate(traced: Traced, examiner: Examiner, grid: Sequence[ThreatModel]) -> None:
    rows = np.flatnonzero(traced.certified >= traced.broken)
    if len(rows):
        row = rows[0]
        raise GateError(
            f"Gate: {examiner.names(rows)} {'are' if len(rows) > 1 else 'is'} certified at eps "
            f"{grid[traced.certified[row]].text} by {traced.certified_by[row]} and broken at "
            f"{grid[traced.broken[row]].text} by {traced.broken_by[row]}; this is a bug in a bound, an attack or the "
            "model wrapper, so nothing is published."
        )


def _audit(traced: Traced, examiners: Sequence[Examiner], grid: Sequence[ThreatModel]) -> None:
    """Bound what is broken where it is first broken, and attack a sample of what is certified where it is last so."""
    sampled = _sample(traced, examiners[0])
    for place, examiner in enumerate(examiners):
        verdicts = Verdicts(examiner.examples.hashes, examiner.examples.labels)
        verdicts.clean = traced.clean
        verdicts.broken_by = [
            name if here else None for name, here in zip(traced.broken_by, traced.broken == place, strict=True)
        ]
        here = sampled & (traced.certified == place)
        verdicts.certified_by = [name if one else None for name, one in zip(traced.certified_by, here, strict=True)]
        verdicts.margins = np.where(here, traced.margins, np.nan)
        if not (verdicts.broken.any() or here.any()):
            continue
        audit = crossed_audit(examiner, verdicts, all_attacked=False)
        traced.audit.broken_bounded += audit.broken_bounded
        traced.audit.certified_attacked += audit.certified_attacked
        if audit.contradictions:
            one = audit.contradictions[0]
            rows = np.array(sorted({found.row for found in audit.contradictions}))
            raise GateError(
                f"Gate: at eps {grid[place].text} {examiner.names(rows)} {'are' if len(rows) > 1 else 'is'} both "
                f"certified and broken (by {one.certified_by} and {one.broken_by}); this is a bug in a bound, an "
                "attack or the model wrapper, so nothing is published."
            )


def _sample(traced: Traced, examiner: Examiner) -> Flags:
    """The certified examples to attack, as many over the whole curve as the track wants in one run."""
    settings = examiner.track.audit
    certified = np.flatnonzero(traced.certified >= 0)
    by_margin = certified[np.argsort(traced.margins[certified], kind="stable")]
    near, rest = by_margin[: settings.smallest_margins], by_margin[settings.smallest_margins :]
    drawn = sorted(rest, key=lambda row: derive_seed("audit", examiner.examples.hashes[row]))
    chosen = np.zeros(len(traced.clean), dtype=bool)
    chosen[near] = True
    chosen[drawn[: settings.certified_sample]] = True
    return chosen


def _reaches(traced: Traced, examples: Examples, count: int) -> list[Reach]:
    return [
        Reach(
            examples.hashes[row],
            int(examples.labels[row]),
            bool(traced.clean[row]),
            int(traced.certified[row]) if traced.certified[row] >= 0 else None,
            int(traced.broken[row]) if traced.broken[row] < count else None,
        )
        for row in range(len(examples))
    ]


class _Named:
    """Passes progress on with the radius before each stage's name."""

    def __init__(self, inner: Progress, eps: str) -> None:
        self._inner, self._eps = inner, eps

    def begin(self, stage: str, total: int) -> None:
        self._inner.begin(f"eps {self._eps}: {stage}", total)

    def advance(self, steps: int = 1) -> None:
        self._inner.advance(steps)

    def note(self, **values: float) -> None:
        self._inner.note(**values)
