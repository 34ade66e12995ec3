"""Several processes beside one: the whole verdict of a robust network, of which its attacks are the most.

Each process has one thread and a core to itself. Nothing here passes or fails on time.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

import pandas as pd
import pytest
from cases import CASES, handed_in
from test_verdict import CORES, ROUNDS, ours

from robustboard.bench.pool import Pool
from robustboard.bench.process import WorkerProcess
from robustboard.errors import DataError

NETWORK = "mnist_cnn_a_adv, 3/10"


@pytest.mark.benchmark(group="processes")
def test_processes_beside_one(benchmark, tmp_path):
    try:
        case = CASES[NETWORK]()
    except DataError as error:
        pytest.skip(str(error))
    alone, tables = [], []
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess()) for _ in range(CORES)]
        for worker in workers:
            worker.load(handed_in(case, tmp_path))

        def one() -> None:
            began = time.perf_counter()
            tables.append(ours(case, workers[0])[0].table())
            alone.append(time.perf_counter() - began)

        verdicts, _ = benchmark.pedantic(lambda: ours(case, Pool(workers)), setup=one, rounds=ROUNDS)
    pd.testing.assert_frame_equal(verdicts.table(), tables[-1])
    seconds = statistics.median(alone)
    together = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "case": NETWORK,
        "n": len(case.examples),
        "processes": CORES,
        "one_process_seconds": round(seconds, 2),
        "processes_seconds": round(together, 2),
        "speedup": round(seconds / together, 2),
    }
