"""Writing files whole: a reader sees the old content or the new, whatever happens in between."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from robustboard.errors import OutputError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` through a temporary file beside it, flushed to the disk before it takes the name.

    Raises:
        OutputError: if it cannot be written; what was there before stays.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the temporary name is text
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
