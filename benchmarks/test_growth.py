"""What more examples cost: time in proportion, memory as before.

Each number of examples is judged in a process of its own, since a process never gives its peak of memory back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from cases import growing

from robustboard.bench.process import ENVIRONMENT

COUNTS = (200, 1000, 5000)

JUDGE = """
import json, resource, sys
import torch
from cases import growing
from test_verdict import ours

torch.set_num_threads(1)
verdicts, examiner = ours(growing(int(sys.argv[1])))
costs = examiner.costs.values()
print(json.dumps({
    "n": len(verdicts.labels),
    "seconds": sum(cost.seconds for cost in costs),
    "passes": sum((cost.forwards or 0) + (cost.backwards or 0) for cost in costs),
    "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "robust": float((verdicts.certified | verdicts.open).mean()),
}))
"""


@pytest.mark.benchmark(group="growth")
@pytest.mark.parametrize("count", COUNTS)
def test_cost_grows_as_the_examples_do(benchmark, count):
    growing(1)  # trains the network, once and outside the measured process

    def judge() -> dict[str, float]:
        command = [sys.executable, "-c", JUDGE, str(count)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": "benchmarks"}
        done = subprocess.run(command, env=environment, capture_output=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    found = benchmark.pedantic(judge, rounds=1)
    benchmark.extra_info |= found
    assert found["n"] == count
