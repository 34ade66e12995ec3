"""The whole verdict (attacks, bounds, crossed audit) beside unmodified AutoAttack, in one run on one machine.

Both have the same cores: AutoAttack as many threads, we as many processes (`score --jobs`). Run with `make bench`.
Nothing here passes or fails on time: the ratio, the passes and both robust accuracies are printed after the table and
written to docs/performance.md.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack

import pytest
import torch
from autoattack_alone import keeping_memory, reference
from cases import CASES, Case, handed_in

from robustboard.attacks.counting import PassCounter
from robustboard.bench.cascade import judge
from robustboard.bench.environment import cores
from robustboard.bench.examiner import Examiner
from robustboard.bench.pool import Pool
from robustboard.bench.process import WorkerProcess
from robustboard.bench.session import LocalSession, Session
from robustboard.bench.verdicts import Verdicts
from robustboard.defenses.adapter import NoProgress
from robustboard.errors import DataError

ROUNDS = 3
CORES = cores()
# AutoAttack is given the best of these.
BATCH_SIZES = (50, 200, 1000)


def ours(case: Case, session: Session | None = None) -> tuple[Verdicts, Examiner]:
    """The verdicts of one case; without a session in this process."""
    session = session or LocalSession(case.model, torch.device("cpu"))
    examiner = Examiner(session, case.track, case.examples, NoProgress())
    verdicts = Verdicts(case.examples.hashes, case.examples.labels)
    judge(examiner, verdicts)
    assert not verdicts.contradictions()
    return verdicts, examiner


@pytest.mark.benchmark(group="whole verdict")
@pytest.mark.parametrize("name", CASES)
def test_our_verdict_beside_autoattack(benchmark, name, tmp_path):
    torch.set_num_threads(CORES)
    try:
        case = CASES[name]()
    except DataError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess()) for _ in range(CORES)]
        for worker in workers:
            worker.load(handed_in(case, tmp_path))
        compare(benchmark, name, case, Pool(workers))


def compare(benchmark, name: str, case: Case, session: Session) -> None:
    """Time them by turns."""
    count = len(case.examples)
    probed = {size: reference(case, size)[0] for size in BATCH_SIZES if size <= count}
    best = min(probed, key=probed.__getitem__)
    times = []

    def alternate() -> None:
        # One of theirs for each of ours, so that both see the same machine.
        with PassCounter(case.model) as passes:
            times.append((*reference(case, best), passes.forwards, passes.backwards))

    verdicts, examiner = benchmark.pedantic(lambda: ours(case, session), setup=alternate, rounds=ROUNDS)
    seconds = statistics.median(one[0] for one in times)
    _, accuracy, forwards, backwards = times[-1]
    held = float((verdicts.certified | verdicts.open).mean())
    stages = examiner.costs.values()
    benchmark.extra_info |= {
        "case": name,
        "n": count,
        "rounds": ROUNDS,
        "cores": CORES,
        "ours_seconds": round(benchmark.stats.stats.median, 2),
        "autoattack_seconds": round(seconds, 2),
        "ratio": round(seconds / benchmark.stats.stats.median, 2),
        "batch_size": best,
        "autoattack_keeping_memory": round(keeping_memory(name, best, CORES), 2),
        "ours_forwards": sum(cost.forwards or 0 for cost in stages),
        "ours_backwards": sum(cost.backwards or 0 for cost in stages),
        "autoattack_forwards": forwards,
        "autoattack_backwards": backwards,
        "robust": held,
        "certified": float(verdicts.certified.mean()),
        "autoattack": accuracy,
        "stages": {stage: round(cost.seconds, 2) for stage, cost in examiner.costs.items()},
    }
    # AutoAttack's own number is an upper limit for ours, up to the examples that its draws decide by chance.
    assert held <= accuracy + 2 / count
