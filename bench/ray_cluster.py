"""A connection to a Ray cluster, for one run: what it has room for, and workers on its nodes."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from robustboard.bench.environment import cores
from robustboard.bench.parts import LEAST_ATTACKED
from robustboard.bench.ray_host import software
from robustboard.bench.remote import START_SECONDS, Worker, Workers
from robustboard.errors import ClusterError, first_line

LOCAL: Final = "auto"
"""The address of a cluster that is started on this machine and ends with the run."""

REPLACE_SECONDS: Final = 120.0
"""Where a node is lost there may be no room for its worker any more."""

_REACH_SECONDS = 5.0
_MOST_JOBS = 64
# A socket's path may have 107 characters, and Ray's own part of it has 75.
_LONGEST_FOLDER = 30

_SETTINGS = {
    # Nobody is told of this use.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Demand:
    """What a run asks of a cluster.

    Attributes:
        device: a torch device; Ray hands out the GPUs, so `cuda` names none.
        threads: of each worker.
        jobs: how many workers; None is as many as there is room and work for.
        examples: how many are judged.
        load_seconds: as of `Worker`.
    """

    device: str
    threads: int
    jobs: int | None
    examples: int
    load_seconds: float

    @property
    def gpus(self) -> int:
        """Of each worker."""
        return 1 if self.device.startswith("cuda") else 0


@dataclass(frozen=True)
class Cluster:
    """A connected cluster.

    Attributes:
        demand: of the run.
        jobs: how many workers it is to have.
    """

    demand: Demand
    jobs: int
    _started: Iterator[int] = field(default_factory=itertools.count, repr=False)

    def start(self, group: Workers) -> Worker:
        """Start a worker wherever there is room."""
        from robustboard.bench.ray_worker import Needs, RayWorker

        demand = self.demand
        needs = Needs(demand.device, demand.threads, demand.gpus, demand.load_seconds, software())
        # One that replaces another comes while the rest is at work, and they can do its work too.
        replaces = next(self._started) >= self.jobs
        return RayWorker(needs, workers=group, room_seconds=REPLACE_SECONDS if replaces else START_SECONDS)


@dataclass
class _Connection:
    """What ends this process's connection, and how many contexts share it."""

    end: contextlib.ExitStack
    users: int = 0


# By address; there is one at most. The lock is held while it begins or ends.
_open: dict[str, _Connection] = {}
_changing = threading.Lock()


@contextlib.contextmanager
def connected(address: str, demand: Demand) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine; the connection, or that cluster, ends with the context.

    A process has one connection. Contexts that name its address share it, also those of other threads, and it ends with
    the last of them.

    Args:
        address: HOST:PORT of the cluster's head, on a machine of the cluster; or `LOCAL`.
        demand: what is asked of it.

    Raises:
        ClusterError: if Ray is not installed, nobody is there, or the cluster is too small.
    """
    if demand.device.startswith("cuda:"):
        raise ClusterError(f"On a cluster Ray hands out the GPUs: give --device cuda, not {demand.device}.")
    with _shared(address, demand) as ray:
        yield Cluster(demand, _jobs(demand, ray.nodes(), ray.available_resources()))


@contextlib.contextmanager
def _shared(address: str, demand: Demand) -> Iterator[Any]:
    """Ray, connected by the first context that comes and until the last one goes."""
    with _changing:
        if address not in _open:
            _open[address] = _Connection(_begun(address, demand))
        connection = _open[address]
        connection.users += 1
    try:
        yield _imported()
    finally:
        with _changing:
            connection.users -= 1
            if not connection.users:
                del _open[address]
                connection.end.close()


def _begun(address: str, demand: Demand) -> contextlib.ExitStack:
    """Begin a connection; what ends it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(_SETTINGS))
        ray = _imported()
        if ray.is_initialized():
            raise ClusterError("This process is connected to a Ray cluster already; end that connection first.")
        if address == LOCAL:
            stack.enter_context(_started(ray, demand))
        else:
            stack.enter_context(_joined(ray, address))
        return stack.pop_all()


def _imported() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ClusterError("Ray is not installed; install it with: pip install 'robustboard[ray]'.") from error


@contextlib.contextmanager
def _started(ray: Any, demand: Demand) -> Iterator[None]:
    """A cluster of this machine alone, which nobody else can use; its files go with it."""
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _LONGEST_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="rb-ray-", dir=parent, ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        with (
            # Where to find the secret; whether it is asked for is Ray's default, or the user's own setting.
            _environment({"RAY_AUTH_TOKEN_PATH": str(token)}),
            _session(
                ray,
                address="local",
                num_cpus=max(cores(), demand.threads * (demand.jobs or 1)),
                include_dashboard=False,
                _temp_dir=folder,
            ),
        ):
            yield


@contextlib.contextmanager
def _joined(ray: Any, address: str) -> Iterator[None]:
    """A connection to a cluster that others started."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        raise ClusterError(f"--ray takes HOST:PORT of a cluster's head, or auto, not {address[:80]!r}.")
    try:
        # Ray itself waits for minutes, and says so at length.
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"Nothing answers at {address}, where a Ray cluster should be ({first_line(error)})."
        ) from error
    with _session(ray, address=address):
        yield


@contextlib.contextmanager
def _session(ray: Any, **options: Any) -> Iterator[None]:
    """Ray initialised, with the signal handlers as they were: an interrupt is the command's."""
    with _same_handlers(), tempfile.TemporaryDirectory(prefix="robustboard-") as nothing:
        try:
            # Else Ray puts the current folder first on the workers' path, where its files could replace modules.
            working = {"working_dir": nothing}
            ray.init(log_to_driver=False, logging_level="ERROR", runtime_env=working, **options)
        except (Exception, SystemExit) as error:
            ray.shutdown()
            raise ClusterError(
                f"The Ray cluster cannot be used ({first_line(error)}); the command has to run on one of its machines, "
                "with its versions of Python and Ray, and with its RAY_AUTH_MODE."
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _same_handlers() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Some variables set, for Ray reads its settings there."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _jobs(demand: Demand, nodes: list[dict[str, Any]], free: Mapping[str, float]) -> int:
    """How many workers the run is to have.

    >>> nodes = [{"Alive": True, "Resources": {"CPU": 5.0}}, {"Alive": True, "Resources": {"CPU": 3.0}}]
    >>> _jobs(Demand("cpu", 2, None, 1000, 60), nodes, {"CPU": 8.0})
    3
    """
    room = sum(_room(demand, node["Resources"]) for node in nodes if node["Alive"])
    each = f"{demand.threads} CPU{'s' if demand.threads > 1 else ''}" + (" and a GPU" if demand.gpus else "")
    if room < (demand.jobs or 1):
        raise ClusterError(
            f"The cluster has room for {room} worker{'' if room == 1 else 's'} with {each} each, and this run needs "
            f"{demand.jobs or 1}; give fewer --jobs or --threads, or add nodes."
        )
    work = math.ceil(demand.examples / LEAST_ATTACKED)
    return demand.jobs or max(1, min(room, _room(demand, free), work, _MOST_JOBS))


def _room(demand: Demand, resources: Mapping[str, float]) -> int:
    """For how many workers that is enough."""
    room = int(resources.get("CPU", 0) // demand.threads)
    return min(room, int(resources.get("GPU", 0) // demand.gpus)) if demand.gpus else room
