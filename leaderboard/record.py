"""Records on disk: a folder with record.json and outcomes.parquet, written so that no crash loses a result.

The schema's public names are here too, so that this is the one module to import for anything about records.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

import pandas as pd

from robustboard.errors import OutputError, RecordError
from robustboard.leaderboard.addenda import AttackSpread, Challenge
from robustboard.leaderboard.metrics import Metric, check_metrics, derive_metrics
from robustboard.leaderboard.outcomes import check_outcomes, from_parquet, to_parquet
from robustboard.leaderboard.schema import (
    SCHEMA_VERSION,
    Audit,
    Claim,
    DefenseInfo,
    Environment,
    Record,
    StageCost,
    TrackRef,
    make_record,
    parse_record,
)

__all__ = [
    "OUTCOMES_FILE",
    "RECORD_FILE",
    "SCHEMA_VERSION",
    "AttackSpread",
    "Audit",
    "Challenge",
    "Claim",
    "DefenseInfo",
    "Environment",
    "Metric",
    "Record",
    "StageCost",
    "TrackRef",
    "attach",
    "broke_most",
    "check_outcomes",
    "derive_metrics",
    "in_force",
    "load",
    "load_all",
    "make_record",
    "parse_record",
    "save",
    "sort_key",
]

RECORD_FILE = "record.json"
OUTCOMES_FILE = "outcomes.parquet"

_NEXT_FILE = "outcomes.next.parquet"
# Not called record.json, so that nobody takes what a killed process left behind for a result.
_STAGED_RECORD = "record.next.json"
_STAGING = ".saving-"
_LARGEST_RECORD = 4 << 20
_LARGEST_OUTCOMES = 256 << 20


def attach(record: Record, outcomes: pd.DataFrame) -> Record:
    """A copy of `record` that carries its outcome table, and the hash that binds the two.

    Raises:
        RecordError: if the table is refused, or the record's metrics are not those of the table.
    """
    check_metrics(record.metrics, outcomes, bound_methods=record.bound_methods, name="The record")
    return record.with_table(to_parquet(outcomes))


def save(record: Record, outcomes: pd.DataFrame, folder: Path) -> Record:
    """Write `record` and its table into `folder`, replacing the result that is there, and return what was written.

    Whatever interrupts this, `load(folder)` finds the old result or the new one. Other files there are left alone.

    Raises:
        RecordError: if the table is refused, or the record's metrics are not those of the table.
        OutputError: if the folder cannot be written.
    """
    bound = attach(record, outcomes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _commit(bound, folder)
    except OSError as error:
        raise OutputError(f"The record cannot be written to {folder}: {error.strerror or error}.") from error
    return bound


def load(folder: Path) -> Record:
    """Read the record in `folder`, with its outcome table.

    Raises:
        RecordError: if a file is missing or malformed, the table is not the one that the record was made from, or a
            number of the record does not follow from the table.
    """
    path = folder / RECORD_FILE
    record = parse_record(_read(path, _LARGEST_RECORD), name=str(path))
    content = _read_outcomes(record, folder)
    outcomes = from_parquet(content, name=str(folder / OUTCOMES_FILE))
    check_metrics(record.metrics, outcomes, bound_methods=record.bound_methods, name=str(path))
    return record.with_table(content)


def load_all(root: Path, *, ignore: Container[str] = ()) -> list[Record]:
    """Read every record under `root`, ordered by track, defense and checkpoint whatever the folders are called.

    A result that is there twice, to the last byte of its table, counts once.

    Args:
        root: a folder that holds records, at any depth.
        ignore: names of folders that are not looked into, such as a store that keeps copies.

    Raises:
        RecordError: if there is none, or one is malformed.
    """
    if not root.is_dir():
        raise RecordError(f"There is no folder {root} to read records from.")
    records: dict[tuple[str, ...], Record] = {}
    for path in sorted(root.rglob(RECORD_FILE)):
        if any(part in ignore for part in path.relative_to(root).parts):
            continue
        record = load(path.parent)
        key = sort_key(record)
        records[key] = record
    if not records:
        raise RecordError(f"There is no {RECORD_FILE} anywhere under {root}.")
    return [records[key] for key in sorted(records)]


def in_force(records: Iterable[Record]) -> list[Record]:
    """`records` without those that a challenge among them has replaced, in the same order.

    Where challenges were entered side by side, several records follow from one table; of these the one that broke most
    stands, and of several that broke as many, the one whose table has the smallest hash.
    """
    found = list(records)
    replaced = {
        (record.track.hash, record.checkpoint_sha256, challenge.replaces)
        for record in found
        for challenge in record.challenges
    }
    lowest: dict[tuple[str, str, str], Record] = {}
    standing = []
    for record in found:
        origin = (record.track.hash, record.checkpoint_sha256)
        if (*origin, record.outcomes_sha256) in replaced:
            continue
        standing.append(record)
        if record.challenges:
            key = (*origin, record.challenges[0].replaces)
            lowest[key] = min(lowest.get(key, record), record, key=broke_most)
    kept = {id(record) for record in lowest.values()}
    return [record for record in standing if not record.challenges or id(record) in kept]


def broke_most(record: Record) -> tuple[float, str]:
    """What orders records that follow from one table: the one that broke most comes first."""
    return (record.metrics["robust"].value, record.outcomes_sha256 or "")


def sort_key(record: Record) -> tuple[str, ...]:
    """What orders records, and tells any two results apart."""
    return (
        record.track.id,
        record.track.hash,
        record.defense.name,
        record.checkpoint_sha256,
        record.outcomes_sha256 or "",
    )


def _commit(record: Record, folder: Path) -> None:
    """Replace the result in `folder`: at every step the record on disk has its own table beside it.

    The new table waits under a name of its own; replacing record.json, whose hash names the new table, is the moment
    the result changes; then the table takes its place. `_read_outcomes` looks at both names.
    """
    for abandoned in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(abandoned)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        for name, content in ((_NEXT_FILE, record.outcomes_parquet), (_STAGED_RECORD, record.to_json().encode())):
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _settle(folder)
        (staging / _NEXT_FILE).replace(folder / _NEXT_FILE)
        _sync(folder)
        (staging / _STAGED_RECORD).replace(folder / RECORD_FILE)
        _sync(folder)
        (folder / _NEXT_FILE).replace(folder / OUTCOMES_FILE)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Finish a replacement that was interrupted before its last step, so that its table is not overwritten now."""
    record_file, waiting = folder / RECORD_FILE, folder / _NEXT_FILE
    if record_file.is_file() and waiting.is_file():
        with suppress(RecordError):
            if parse_record(record_file.read_bytes()).outcomes_sha256 == _sha256(waiting.read_bytes()):
                waiting.replace(folder / OUTCOMES_FILE)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_outcomes(record: Record, folder: Path) -> bytes:
    candidates = [path for path in (folder / OUTCOMES_FILE, folder / _NEXT_FILE) if path.is_file()]
    if not candidates:
        raise RecordError(f"The file {folder / OUTCOMES_FILE} is missing; a record is of no use without its outcomes.")
    for path in candidates:
        content = _read(path, _LARGEST_OUTCOMES)
        if _sha256(content) == record.outcomes_sha256:
            return content
    raise RecordError(
        f"The file {folder / OUTCOMES_FILE} is not the table that {RECORD_FILE} beside it was made from "
        "(its sha256 differs)."
    )


def _read(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise RecordError(f"The file {path} is larger than {limit >> 20} MiB, which no record needs.")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"The file {path} cannot be read: {error.strerror or error}.") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
