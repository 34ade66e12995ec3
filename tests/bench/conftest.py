"""Small submissions and tracks, records and stores: real files, real processes."""

from __future__ import annotations

import importlib.util
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from quadrants import quadrant_weights, quadrants

from robustboard.bench import mlflow_store
from robustboard.leaderboard.record import Record, make_record, save

GOOD_MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x.flatten(1))

def build():
    return Net()
"""

MANIFEST = """
[defense]
name = "{name}"
title = "A linear network"
year = 2020
[model]
factory = "model.py:build"
weights = "weights.npz"
"""


@pytest.fixture
def make_submission(tmp_path: Path) -> Callable[..., Path]:
    """Write a defense.toml with its model and weights; returns its path."""

    def make(model: str = GOOD_MODEL, *, name: str = "linear", weights: dict[str, np.ndarray] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.py").write_text(model)
        (folder / "defense.toml").write_text(MANIFEST.format(name=name))
        np.savez(folder / "weights.npz", **(quadrant_weights() if weights is None else weights))
        return folder / "defense.toml"

    return make


@pytest.fixture
def quadrant_track(tmp_path: Path) -> Path:
    """A four-line track on the quadrant images at 1/20, without the slow parts of the protocol."""
    images, labels = quadrants()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    path = tmp_path / "track.toml"
    path.write_text(
        'id = "quadrants-linf@1"\ndataset = {npz = "data.npz"}\nthreat = {norm = "linf", eps = "1/20"}\nn = 40\n'
    )
    return path


@pytest.fixture(scope="session")
def factories() -> ModuleType:
    """The makers of records that the leaderboard's tests have."""
    path = Path(__file__).resolve().parents[1] / "leaderboard" / "conftest.py"
    spec = importlib.util.spec_from_file_location("leaderboard_factories", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A folder with a fresh store: its migrations take seconds, a copy does not."""
    folder = tmp_path_factory.mktemp("template")
    mlflow_store.prepare(mlflow_store.local_uri(folder))
    return folder


@pytest.fixture
def uri(template, tmp_path) -> str:
    """A fresh store in tmp_path/runs."""
    folder = tmp_path / "runs"
    shutil.copytree(template, folder)
    with closing(sqlite3.connect(folder / "mlflow.db")) as connection, connection:
        connection.execute(
            "UPDATE experiments SET artifact_location = replace(artifact_location, ?, ?)", (str(template), str(folder))
        )
    return mlflow_store.local_uri(folder)


@pytest.fixture
def publish(factories, tmp_path):
    """Write a record into a run directory; returns the record and its folder."""

    def make(where: str = "a", *, name: str = "pgd-at", rows: int = 0, **changes) -> tuple[Record, Path]:
        outcomes = factories.table(seed=rows)
        content = factories.content(outcomes, name=name, **changes)
        content["track"]["content"].setdefault("images_sha256", "5a" * 32)
        folder = tmp_path / "runs" / where / "record"
        return save(make_record(content), outcomes, folder), folder

    return make
