"""What the MLflow store is owed: a record on the disk that is not logged yet, with what the store needs beside it.

`record.owed.json` lies beside the folder `record` from before the first attempt to log it until the store has it whole,
so neither a store that is away nor a killed process loses anything; `robustboard sync` logs it then. It names no store:
a URI may hold a password.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from robustboard.bench import tracking
from robustboard.bench.journal import alone
from robustboard.errors import OutputError, RobustBoardError, TrackingError
from robustboard.files import write_text
from robustboard.leaderboard.record import RECORD_FILE, Record, load

_ENDING = ".owed.json"


class _Images(BaseModel):
    """Shape and size in memory of the judged images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...]
    nbytes: int


class _Owed(BaseModel):
    """The content of the file; numbers of a training may be infinite or NaN."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    record_sha256: str
    images: _Images
    training: list[dict[str, float]]


def owe(record: Record, folder: Path, *, images: tracking.Shaped, training: Sequence[Mapping[str, float]]) -> None:
    """Note on the disk that the record in `folder` is to be logged.

    Args:
        record: the record, which is written.
        folder: where it is.
        images: the judged images, (N, C, H, W).
        training: the numbers that the training told of, in order.

    Raises:
        OutputError: if that cannot be written.
    """
    content = _Owed(
        record_sha256=_sha256(record),
        images=_Images(shape=images.shape, nbytes=images.nbytes),
        training=[dict(numbers) for numbers in training],
    )
    write_text(_file(folder), content.model_dump_json() + "\n")


def forget(folder: Path) -> None:
    """Take the note about the record in `folder` away: it is logged, or it is no longer there.

    Raises:
        OutputError: if it cannot be removed.
    """
    try:
        _file(folder).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{_file(folder)} cannot be removed: {error.strerror or error}.") from error


def is_owed(folder: Path) -> bool:
    """Whether the record in `folder` is noted as owed."""
    return _file(folder).exists()


def find(place: Path) -> list[Path]:
    """The folders of the records that are owed in a run directory, or at any depth below a folder.

    Raises:
        RobustBoardError: if there is no such folder.
    """
    if not place.is_dir():
        raise RobustBoardError(f"There is no run directory {place}, nor a folder of them.")
    return sorted(file.with_name(file.name.removesuffix(_ENDING)) for file in place.rglob(f"?*{_ENDING}"))


def log(folder: Path, uri: str) -> bool:
    """Log the record in `folder`, if it is owed; its run directory is held meanwhile.

    Returns:
        Whether it was logged: another process may have been faster.

    Raises:
        StoreAwayError: if the store is away; the record stays owed.
        TrackingError: if the store cannot be used, or the note and the record do not fit.
        OutputError: if another process is at work in the run directory.
        RecordError: if the record is damaged.
    """
    with alone(folder.parent):
        return _log(folder, uri)


def ensure_logged(folder: Path, uri: str, *, images: tracking.Shaped) -> None:
    """Log the record in `folder`, owed or not, unless the store has it; its run directory is held meanwhile.

    A finished run may have been killed before it was noted as owed, or may have been asked not to log. It is not noted
    here: the store tells whether it has the record. A run directory that cannot be written is read without holding it.

    Args:
        folder: where the record is.
        uri: the store.
        images: the judged images, (N, C, H, W).

    Raises:
        RobustBoardError: as for `log`.
    """
    if not os.access(folder.parent, os.W_OK):
        tracking.log_record(load(folder), folder, uri=uri, images=images, training=())
        return
    with alone(folder.parent):
        if not _log(folder, uri):
            tracking.log_record(load(folder), folder, uri=uri, images=images, training=())


def _log(folder: Path, uri: str) -> bool:
    """Log what is owed, if it is, in a run directory that is held."""
    try:
        owed = _Owed.model_validate_json(_file(folder).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValidationError) as error:
        raise TrackingError(f"{_file(folder)} cannot be read; score again to make it anew.") from error
    if not (folder / RECORD_FILE).exists():
        raise TrackingError(f"The record {folder} is no longer there; delete {_file(folder)} if it is not missed.")
    record = load(folder)
    if _sha256(record) != owed.record_sha256:
        raise TrackingError(f"The record {folder} was changed after it was written; score again to log it.")
    tracking.log_record(record, folder, uri=uri, images=owed.images, training=owed.training)
    forget(folder)
    return True


def _file(folder: Path) -> Path:
    return folder.with_name(folder.name + _ENDING)


def _sha256(record: Record) -> str:
    return hashlib.sha256(record.to_json().encode()).hexdigest()
