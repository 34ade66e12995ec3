"""Whether a run directory holds the finished record of the very run that a request would make."""

from __future__ import annotations

import torch

from robustboard.bench.environment import machine, package_versions, python_version, source_commit
from robustboard.bench.request import Prepared, Request
from robustboard.errors import RecordError
from robustboard.leaderboard.record import RECORD_FILE, Record, load


def finished(request: Request, made: Prepared) -> Record | None:
    """The record in the request's run directory, if another run with the same software would be about the same.

    Compared is what a record tells: the track's hash, method or files, hyper-parameters, training seed, number of other
    attack seeds, kind of device, versions and git commit. Engine and budget of complete verification are in the name of
    the directory. A record that cannot be read counts as none, and uncommitted changes of the source are not seen.
    """
    folder = made.folder / "record"
    if not (folder / RECORD_FILE).is_file():
        return None
    try:
        record = load(folder)
    except RecordError:
        return None
    entrant, spread = made.entrant, record.attack_spread
    same = (
        record.track.hash == made.track.hash
        and record.defense.name == entrant.info.name
        and record.hyper == dict(entrant.hyper)
        and {name: record.seeds.get(name) for name in entrant.seeds} == dict(entrant.seeds)
        and record.code_sha256 == entrant.code_sha256
        and (len(spread.seeds) - 1 if spread else 0) == request.attack_seeds
    )
    return record if same and _same_software(record, request.device) else None


def _same_software(record: Record, device: str) -> bool:
    then = record.environment
    return (
        (then.python, then.torch, then.platform) == (python_version(), torch.__version__, machine())
        and then.packages == package_versions()
        and then.commit == source_commit()[0]
        # A record names a graphics card by its model.
        and (then.device == "cpu") == (device == "cpu")
    )
