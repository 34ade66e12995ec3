"""What every room's tests share: where the shared data is, and how a missing file is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a test that fails today failed yesterday. `--hypothesis-profile default` draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """Find a file in the folders of ROBUSTBOARD_DATA; without it skip, or with ROBUSTBOARD_REQUIRE_DATA=1 fail."""

    def find(name: str) -> Path:
        folders = [Path(part) for part in os.environ.get("ROBUSTBOARD_DATA", "").split(os.pathsep) if part]
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        sentence = f"{name} is in none of the folders of ROBUSTBOARD_DATA ({', '.join(map(str, folders)) or 'not set'})"
        if os.environ.get("ROBUSTBOARD_REQUIRE_DATA") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)

    return find
