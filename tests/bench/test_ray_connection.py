"""Who shares a process's connection to a cluster, and when it ends; Ray itself is simulated."""

from __future__ import annotations

import contextlib

import pytest

from robustboard.bench import ray_cluster
from robustboard.bench.ray_cluster import Demand, connected
from robustboard.errors import ClusterError

DEMAND = Demand("cpu", 1, 1, 40, 60)


class Ray:
    """A cluster of one node, that knows whether it runs."""

    def __init__(self):
        self.said = []

    def is_initialized(self):
        return self.said[-1:] == ["begun"]

    def nodes(self):
        assert self.is_initialized(), "it was ended under somebody"
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]

    def available_resources(self):
        return {"CPU": 4.0}


@pytest.fixture
def ray(monkeypatch):
    made = Ray()

    @contextlib.contextmanager
    def started(ray, demand):
        made.said.append("begun")
        try:
            yield
        finally:
            made.said.append("ended")

    monkeypatch.setattr(ray_cluster, "_imported", lambda: made)
    monkeypatch.setattr(ray_cluster, "_started", started)
    return made


def test_a_connection_ends_with_the_last_who_shares_it(ray):
    """Two runs in threads of one process: the one that began it may well be done first."""
    first, second = connected("auto", DEMAND), connected("auto", DEMAND)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ray.said == ["begun"]
    with connected("auto", DEMAND) as cluster:
        assert cluster.jobs == 1
    second.__exit__(None, None, None)
    assert ray.said == ["begun", "ended"]
    with connected("auto", DEMAND):
        assert ray.said == ["begun", "ended", "begun"]
    assert ray.said[-1] == "ended"


def test_who_asks_for_too_much_ends_no_connection_of_others(ray):
    too_much = Demand("cpu", 1, 9, 40, 60)
    with connected("auto", DEMAND):
        with pytest.raises(ClusterError, match="room for 4 workers"), connected("auto", too_much):
            pass
        assert ray.said == ["begun"]
        with pytest.raises(ClusterError, match="connected to a Ray cluster already"), connected("a:1", DEMAND):
            pass
    with pytest.raises(ClusterError, match="room for 4 workers"), connected("auto", too_much):
        pass
    assert ray.said == ["begun", "ended"] * 2
