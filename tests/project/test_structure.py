"""The shape of the project: imports flow one way, every doctest runs, the public names exist."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import robustboard

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "attacks": {"attacks"},
    "defenses": {"attacks", "defenses"},
    "leaderboard": {"leaderboard"},
    "bench": {"attacks", "defenses", "bench", "leaderboard"},
}


def _imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "robustboard" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_flow_one_way(room):
    for file in sorted((ROOT / room).rglob("*.py")):
        assert _imported_rooms(file) <= MAY_IMPORT[room], f"{file.relative_to(ROOT)} imports against the flow"


def test_mlflow_is_imported_in_one_place_only():
    """Evaluation and training must run on a machine without MLflow."""
    for file in sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")):
        if re.search(r"^\s*(import|from) mlflow\b", file.read_text(), flags=re.MULTILINE):
            assert file.relative_to(ROOT).as_posix() in ("bench/tracking.py", "bench/mlflow_store.py")


def _modules() -> list[str]:
    files = (file for room in sorted(MAY_IMPORT) for file in sorted((ROOT / room).rglob("*.py")))
    return sorted(m.name for m in pkgutil.walk_packages(robustboard.__path__, "robustboard.")) + [
        ".".join(("robustboard", *file.relative_to(ROOT).with_suffix("").parts))
        for file in files
        if file.name != "__init__.py"
    ]


@pytest.mark.parametrize("name", sorted(set(_modules())))
def test_doctests_of(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_doctests_exist():
    """An empty walk would make the test above pass without a single example."""
    finder = doctest.DocTestFinder()
    examples = sum(len(t.examples) for name in set(_modules()) for t in finder.find(importlib.import_module(name)))
    assert examples >= 20


def test_every_public_name_exists():
    for name in robustboard.__all__:
        assert getattr(robustboard, name) is not None
    with pytest.raises(AttributeError):
        _ = robustboard.no_such_name
