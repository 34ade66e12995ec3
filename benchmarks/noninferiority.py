"""Whether the fast attack is as strong as the cascade's: paired by example, over networks, radii and attack seeds.

    python benchmarks/noninferiority.py --page docs/fast.md

The networks are the eight on the digits of tests/reference/test_parity.py, at two radii, and the two third-party ones,
whose files are sought in the folders of ROBUSTBOARD_DATA. The standard side is PGD and the four attacks as the cascade
runs them, without bounds. Takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from cases import DIGITS, DIGITS_RADII, Case, digits, reseeded, third_party
from rich.console import Console

from robustboard.attacks.counting import PassCounter
from robustboard.attacks.kernels.batches import examples_at_a_time
from robustboard.attacks.kernels.fast import fast
from robustboard.attacks.kernels.quick_gradients import quick_input_gradients
from robustboard.bench import cascade
from robustboard.bench.examiner import Examiner
from robustboard.bench.progress import Bars, JobBar
from robustboard.bench.session import LocalSession
from robustboard.bench.verdicts import Flags, Verdicts
from robustboard.errors import RobustBoardError
from robustboard.leaderboard.statistics import paired_difference

SEEDS = 3
MARGIN = 0.002
# A two-sided interval of this confidence has an upper limit that is one-sided at 95 %.
CONFIDENCE = 0.90
THIRD_PARTY = (("mnist", "3/10"), ("cifar", "2/255"))

HEAD = """# The fast attack beside the cascade's

This page is written by `python benchmarks/noninferiority.py --page docs/fast.md`. Each line is one network at one
radius, attacked with {seeds} seeds: how many examples survive PGD and the four attacks of the cascade (standard) and
the fast attack, of n examples for each seed, and how many only one of the two breaks. Passes are examples forward and
backward through the network, all seeds together; no bounds are run, one thread.

| network | eps | n | standard robust | fast robust | broken by standard alone | by fast alone | \
standard passes | fast passes | standard s | fast s |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Side:
    """What one of the two attacks left, (N,), and its cost."""

    robust: Flags
    forwards: int
    backwards: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both attacks on the same examples with the same seed."""

    standard: Side
    fast: Side


def standard_side(case: Case, clean: Flags, progress: JobBar) -> Side:
    """PGD and the cascade's four attacks."""
    examiner = Examiner(LocalSession(case.model, torch.device("cpu")), case.track, case.examples, progress)
    verdicts = Verdicts(case.examples.hashes, case.examples.labels)
    verdicts.clean = clean.copy()
    cascade.attack(examiner, verdicts)
    costs = examiner.costs.values()
    forwards, backwards = (sum(getattr(cost, way) or 0 for cost in costs) for way in ("forwards", "backwards"))
    return Side(verdicts.open, forwards, backwards, sum(cost.seconds for cost in costs))


def fast_side(case: Case, clean: Flags, seed: int) -> Side:
    """The fast attack on what is clean, as many examples at a time as in an evaluation."""
    images, labels = case.examples.tensor(), torch.from_numpy(case.examples.labels)
    found = images.clone()
    began = time.perf_counter()
    with PassCounter(case.model) as passes, quick_input_gradients(case.model):
        for rows in torch.from_numpy(np.flatnonzero(clean)).split(examples_at_a_time(case.model, images[:1])):
            keys = [case.examples.hashes[row] for row in rows.tolist()]
            found[rows] = fast(case.model, images[rows], labels[rows], threat=case.track.threat, keys=keys, seed=seed)
    seconds = time.perf_counter() - began
    if not case.track.threat.contains(found, images).all():
        raise RobustBoardError("The fast attack left the ball.")
    return Side(clean & correct(case, found), passes.forwards, passes.backwards, seconds)


def correct(case: Case, images: torch.Tensor) -> Flags:
    """Which images are classified correctly, (N,)."""
    with torch.no_grad():
        right: Flags = case.model(images).argmax(dim=1).numpy() == case.examples.labels
    return right


def cases() -> Iterator[tuple[str, str, Case]]:
    """Name, radius and network."""
    for data, eps in THIRD_PARTY:
        yield f"{data}_cnn_a_adv", eps, third_party(data, eps)
    for name in DIGITS:
        case = digits(name)
        for eps in DIGITS_RADII:
            yield f"{name}, digits", eps, case


def compare(case: Case, eps: str, seeds: int, progress: JobBar) -> list[Pair]:
    """One pair for each seed."""
    clean = correct(case, case.examples.tensor())
    pairs = []
    for seed in range(seeds):
        one = dataclasses.replace(case, track=reseeded(case.track, seed, eps))
        standard = standard_side(one, clean, progress)
        progress.begin(f"fast, seed {seed}", 1)
        pairs.append(Pair(standard, fast_side(one, clean, seed)))
    progress.end()
    return pairs


def line(name: str, eps: str, pairs: list[Pair]) -> str:
    """One row of the table."""
    standard, ours = [pair.standard for pair in pairs], [pair.fast for pair in pairs]
    count = len(pairs[0].fast.robust)
    robust = [", ".join(str(int(side.robust.sum())) for side in sides) for sides in (standard, ours)]
    only_standard, only_fast = discordant(pairs)
    passes = [f"{total(sides, 'forwards'):,.0f} + {total(sides, 'backwards'):,.0f}" for sides in (standard, ours)]
    seconds = [f"{total(sides, 'seconds'):.1f}" for sides in (standard, ours)]
    return (
        "| "
        + " | ".join([name, eps, str(count), *robust, str(only_standard), str(only_fast), *passes, *seconds])
        + " |"
    )


def discordant(pairs: list[Pair]) -> tuple[int, int]:
    """How many examples the standard attacks alone break, and the fast one alone."""
    only_standard = sum(int((pair.fast.robust & ~pair.standard.robust).sum()) for pair in pairs)
    only_fast = sum(int((pair.standard.robust & ~pair.fast.robust).sum()) for pair in pairs)
    return only_standard, only_fast


def total(sides: list[Side], what: str) -> float:
    """The sum of a cost."""
    return sum(getattr(side, what) for side in sides)


def upper_limit(pairs: list[Pair]) -> tuple[float, float]:
    """Robust accuracy of the fast attack less the standard one's, and its one-sided 95 % upper limit (Tango 1998)."""
    difference = paired_difference(
        np.concatenate([pair.fast.robust for pair in pairs]),
        np.concatenate([pair.standard.robust for pair in pairs]),
        confidence=CONFIDENCE,
    )
    return difference.value, difference.high


def conclusion(runs: list[list[Pair]]) -> str:
    """The pooled difference, its limit, and the cost.

    The runs of one example with several seeds agree more than independent examples would, so each seed is also pooled
    over the networks by itself, and the largest of those limits decides.
    """
    pooled = [pair for pairs in runs for pair in pairs]
    value, limit = upper_limit(pooled)
    alone = [upper_limit(list(one)) for one in zip(*runs, strict=True)]
    worst = max(high for _, high in alone)
    only_standard, only_fast = discordant(pooled)
    survivors = sum(int(pair.fast.robust.sum()) for pair in pooled)
    ours = [pair.fast for pair in pooled]
    verdict = "below" if worst < MARGIN else "NOT below"
    return (
        f"Pooled over {sum(len(pair.fast.robust) for pair in pooled)} pairs: broken by the standard attacks alone "
        f"{only_standard}, by the fast one alone {only_fast}; fast robust accuracy less standard {100 * value:+.3f} "
        f"points, one-sided 95 % upper limit {100 * limit:.3f}. Each seed alone: "
        + ", ".join(f"{100 * one:+.3f} (limit {100 * high:.3f})" for one, high in alone)
        + f". The largest limit is {verdict} the margin of {100 * MARGIN:.1f} points. The fast attack spent "
        f"{total(ours, 'forwards') / survivors:.0f} forward and {total(ours, 'backwards') / survivors:.0f} backward "
        "passes for each example that survives it, the broken ones' included."
    )


def main(seeds: int, page: Path | None, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Compare, print, and write the page."""
    torch.set_num_threads(1)
    lines, runs = [], []
    with Bars(Console(stderr=True)) as bars:
        for name, eps, case in cases():
            runs.append(compare(case, eps, seeds, bars.job(f"{name}, {eps}")))
            lines.append(line(name, eps, runs[-1]))
            write(lines[-1] + "\n")
    end = conclusion(runs)
    write(end + "\n")
    if page is not None:
        page.write_text(HEAD.format(seeds=seeds) + "\n".join([*lines, "", end, ""]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The fast attack beside the cascade's attacks, paired by example.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="attack seeds, 0 and up")
    parser.add_argument("--page", type=Path, help="write the table as Markdown to this file")
    given = parser.parse_args()
    try:
        main(given.seeds, given.page)
    except RobustBoardError as error:
        sys.exit(str(error))
