"""Writing files whole: a reader sees the old content or the new, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from robustboard.errors import OutputError


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make or replace `path`, and the folders above it, through a temporary file that is flushed to the disk first.

    Args:
        path: the file.
        write: puts the content into the open temporary file.

    Raises:
        OutputError: if it cannot be written; what was there before stays.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Temporary files are private; a result is as readable as any file that its owner makes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files of `replace_file` that killed processes left behind; nobody may be writing them.

    Args:
        folder: where to look.
        pattern: of the files that were to be made, relative to the folder, such as `checkpoints/*.pt`.
    """
    above, _, name = pattern.rpartition("/")
    for file in folder.glob(f"{above}/.{name}.*" if above else f".{name}.*"):
        # What `tempfile` puts at the end of a name.
        if re.fullmatch("[a-z0-9_]{8}", file.name.rpartition(".")[2]):
            with contextlib.suppress(OSError):
                file.unlink()


def require_writable(folder: Path, name: str) -> None:
    """Refuse a place that cannot be written before any long work; nothing is made there yet.

    Args:
        folder: where files are to go.
        name: what the error calls it.

    Raises:
        OutputError: if the folder, or the nearest one above it that exists, is none that can be written.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(f"{name} cannot be made: {existing} is not a folder that can be written.")


def write_text(path: Path, text: str) -> None:
    """Make or replace `path` with `text` in UTF-8; see `replace_file`.

    Raises:
        OutputError: if it cannot be written; what was there before stays.
    """
    replace_file(path, lambda file: file.write(text.encode()))
