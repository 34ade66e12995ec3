"""AutoAttack by itself, as its users run it: in this process, and in one that keeps the memory that it frees.

`python benchmarks/autoattack_alone.py CASE BATCH_SIZE THREADS` prints the seconds of the latter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from cases import CASES, Case

from robustboard.bench.process import ENVIRONMENT


def reference(case: Case, batch_size: int) -> tuple[float, float]:
    """Seconds of AutoAttack, seed 0, and its robust accuracy."""
    from pyautoattack import AutoAttack

    images, labels = case.examples.tensor(), torch.from_numpy(case.examples.labels)
    attack = AutoAttack(case.model, norm="Linf", eps=case.track.threat.radius, seed=0, device="cpu")
    began = time.perf_counter()
    adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        return seconds, float((case.model(adversarial).argmax(dim=1) == labels).float().mean())


def keeping_memory(name: str, batch_size: int, threads: int) -> float:
    """Its seconds in a process with the allocator settings of our own."""
    command = [sys.executable, str(Path(__file__)), name, str(batch_size), str(threads)]
    # Not the setting of idle threads: those of AutoAttack wait for each other at every layer.
    settings = {variable: value for variable, value in ENVIRONMENT.items() if variable.startswith("MALLOC")}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(reference(CASES[sys.argv[1]](), int(sys.argv[2]))[0])  # noqa: T201 - its answer
