"""Where the workers of a run live: in processes of this machine, or on the nodes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from robustboard.bench.process import WorkerProcess
from robustboard.bench.remote import Worker, Workers
from robustboard.bench.request import Request


@dataclass(frozen=True)
class Place:
    """Somewhere to start workers.

    Attributes:
        jobs: how many.
        start: starts one without a model, known to a group.
    """

    jobs: int
    start: Callable[[Workers], Worker]


@contextmanager
def place(request: Request, *, threads: int, examples: int) -> Iterator[Place]:
    """The place that a request names; a cluster that is started for it ends with the context.

    Args:
        request: what to score.
        threads: of each worker.
        examples: how many are judged: a cluster may have room for more workers than that is work for.

    Raises:
        ClusterError: if the cluster cannot be used.
    """
    if request.ray is None:

        def start(group: Workers) -> Worker:
            return WorkerProcess(
                device=request.device, threads=threads, load_seconds=request.load_seconds, workers=group
            )

        yield Place(request.jobs or 1, start)
        return
    from robustboard.bench.ray_cluster import Demand, connected

    demand = Demand(request.device, threads, request.jobs, examples, request.load_seconds)
    with connected(request.ray, demand) as cluster:
        yield Place(cluster.jobs, cluster.start)
