"""The workers of one run: started side by side, each with the same model, and replaced where one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load as from_safetensors

from robustboard.bench.entrants import Brought, Entrant
from robustboard.bench.places import Place
from robustboard.bench.pool import Pool
from robustboard.bench.remote import Worker, Workers
from robustboard.bench.retrying import Losses, Retrying
from robustboard.bench.session import Session
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import DefenseError


@dataclass(frozen=True)
class Crew:
    """Workers that are ready to be asked.

    Attributes:
        session: asks whoever is idle.
        brought: the model that all of them have.
        device: the name of what each of them runs on.
        losses: who was lost so far.
    """

    session: Session
    brought: Brought
    device: str
    losses: Losses


@contextmanager
def crew(
    ground: Place,
    *,
    entrant: Entrant,
    folder: Path,
    progress: Progress,
    workers: Workers,
) -> Iterator[Crew]:
    """Start workers and bring the model into each; all of them end with the context.

    Args:
        ground: starts them, and says how many.
        entrant: brings the model; where it is trained, the first worker trains it.
        folder: the run directory.
        progress: told of a training.
        workers: where to make all of them known.

    Raises:
        DefenseError: if they do not all run on the same kind of device.
        RobustBoardError: whatever bringing the model raises.
    """
    losses, group = Losses(), Workers()
    with ExitStack() as stack:
        workers.add(group)
        stack.callback(workers.discard, group)
        seats = [Retrying(ground.start, group, losses) for _ in range(ground.jobs)]
        for seat in seats:
            stack.callback(seat.close)
        brought, device = _filled(seats, entrant, folder, progress, group)
        yield Crew(Pool(seats) if ground.jobs > 1 else seats[0], brought, device, losses)


def _filled(
    seats: list[Retrying], entrant: Entrant, folder: Path, progress: Progress, group: Workers
) -> tuple[Brought, str]:
    """Start all at once, bring the model into the first, and from there into the others."""
    first, *others = seats
    with ThreadPoolExecutor(len(seats)) as threads:
        try:
            starting = [threads.submit(seat.do, _name_of_device) for seat in others]
            # Not in a thread: what is told of a training, and its interrupt, are the caller's.
            brought, device = first.do(lambda worker: (entrant.enter(worker, folder, progress), worker.device))

            def follow(worker: Worker) -> None:
                _require_same(worker.device, device)
                found = entrant.enter(worker, folder, NoProgress())
                if brought.weights is not None and found.checkpoint_sha256 != brought.checkpoint_sha256:
                    worker.restore(from_safetensors(brought.weights))

            for one in starting:
                one.result()
            for done in [threads.submit(seat.do, follow) for seat in others]:
                done.result()
        except BaseException:
            # Whoever is still starting ends now, so that nobody waits for it.
            group.end()
            raise
    for seat in seats:
        seat.fill = follow
    return brought, device


def _name_of_device(worker: Worker) -> str:
    return worker.device


def _require_same(name: str, first: str) -> None:
    if name != first:
        raise DefenseError(
            f"One process runs on {first} and another on {name}, which may round differently; a run needs devices of "
            "one kind."
        )
