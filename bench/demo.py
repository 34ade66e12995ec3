"""The demo: every defense that suits the embedded digits, trained, judged and put on a board."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from robustboard.bench import mlflow_store, tracking
from robustboard.bench.datasets import load_dataset
from robustboard.bench.entrants import why_unsuited
from robustboard.bench.environment import cores
from robustboard.bench.progress import Bars
from robustboard.bench.protocol import load_track
from robustboard.bench.remote import Workers
from robustboard.bench.request import Request
from robustboard.bench.score import Scored, score_defense
from robustboard.defenses import registry
from robustboard.leaderboard.record import Record
from robustboard.leaderboard.site import build_site, check_target

TRACK = "digits-linf@1"
EXAMPLES = 150
"""Of the track's 360: all defenses are to be on the board within five minutes on two cores."""
NODES = 200_000
"""Of complete verification, for each example: enough that nothing stays undecided."""


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes:
        records: one for each defense, the most robust first.
        unsuited: (defense, reason) of those that the track does not suit.
        site: the page to open.
        mlflow_uri: the store.
    """

    records: tuple[Record, ...]
    unsuited: tuple[tuple[str, str], ...]
    site: Path
    mlflow_uri: str


def run_demo(*, runs: Path, out: Path, jobs: int | None, bars: Bars) -> Demo:
    """Score every built-in defense on the digits, several at a time with one thread each, and build the site.

    Args:
        runs: where run directories and the MLflow store go.
        out: where the site goes.
        jobs: defenses at a time; None is one a core.
        bars: shows what is under way.
    """
    track = load_track(TRACK)
    dataset = load_dataset(track.dataset)
    reasons = {name: why_unsuited(name, track, dataset) for name in registry.names()}
    suited = [name for name, reason in reasons.items() if reason is None]

    check_target(out)
    uri = mlflow_store.local_uri(runs)
    mlflow_store.check(uri)
    scored = _score_all(suited, runs=runs, jobs=jobs or cores(), bars=bars)
    for result in scored:
        tracking.log_record(result.record, result.folder, uri=uri, images=result.images, training=result.training)
    records = sorted((result.record for result in scored), key=lambda record: -record.metrics["robust"].value)
    site = build_site(records, out)
    unsuited = tuple((name, reason) for name, reason in reasons.items() if reason is not None)
    return Demo(tuple(records), unsuited, site, uri)


def _score_all(names: Sequence[str], *, runs: Path, jobs: int, bars: Bars) -> list[Scored]:
    """Score several defenses at a time; the first failure, or an interrupt, ends all of them at once."""
    workers = Workers()

    def one(name: str) -> Scored:
        bar = bars.job(name)
        try:
            return score_defense(
                Request(defense=name, track=TRACK, n=EXAMPLES, complete=NODES, threads=1, runs=runs),
                bar,
                workers=workers,
            )
        finally:
            bar.end()

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            workers.end()
            raise
    return [future.result() for future in futures]
