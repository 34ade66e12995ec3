"""One verdict an example, however the work is cut: batch sizes, order, several workers, a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustboard.bench.cascade import judge
from robustboard.bench.datasets import load_dataset
from robustboard.bench.examiner import Examiner
from robustboard.bench.pool import Pool
from robustboard.bench.process import WorkerProcess
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select, training_data
from robustboard.bench.session import LocalSession, Session
from robustboard.bench.verdicts import Verdicts
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress

MODEL = """
from robustboard.defenses.architectures import build

def make():
    return build("cnn-a", image_shape=(1, 8, 8), classes=10, seed=0)
"""

MANIFEST = """
[defense]
name = "small-cnn"
title = "A small convolutional network"
year = 2020
[model]
factory = "model.py:make"
weights = "weights.safetensors"
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Convolutions, since these are computed in another way for other batch sizes; robust enough to keep all busy."""
    track = load_track("digits-linf@1")
    return registry.create("pgd-at", {"architecture": "cnn-a", "epochs": 5}).fit(
        training_data(track, load_dataset(track.dataset)),
        track.threat,
        seed=0,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=CheckpointStore(None),
    )


@pytest.fixture(scope="module")
def question() -> tuple[Track, Examples]:
    """A track and its examples."""
    track = load_track("digits-linf@1").limited(40)
    dataset = load_dataset(track.dataset)
    track = resolve(track, dataset)
    return track, select(track, dataset)


@pytest.fixture(scope="module")
def submission(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as somebody hands it in."""
    folder = tmp_path_factory.mktemp("small-cnn")
    (folder / "model.py").write_text(MODEL)
    (folder / "defense.toml").write_text(MANIFEST)
    save_file(dict(network.state_dict()), folder / "weights.safetensors")
    return folder / "defense.toml"


def verdicts_of(session: Session, track: Track, examples: Examples) -> pd.DataFrame:
    """The outcome table by content hash."""
    verdicts = Verdicts(examples.hashes, examples.labels)
    judge(Examiner(session, track, examples, NoProgress()), verdicts)
    return verdicts.table().set_index("example").drop(columns="index").sort_index()


def chosen(examples: Examples, rows: np.ndarray) -> Examples:
    """Some of the examples, in this order."""
    return replace(
        examples,
        images=examples.images[rows],
        labels=examples.labels[rows],
        hashes=tuple(examples.hashes[row] for row in rows),
        order=examples.order[rows],
        draws=np.arange(len(rows)),
    )


@pytest.fixture(scope="module")
def expected(network: nn.Module, question: tuple[Track, Examples]) -> pd.DataFrame:
    """The verdicts in one go."""
    found = verdicts_of(LocalSession(network, torch.device("cpu")), *question)
    assert {"broken", "certified", "undecided"} <= set(found["verdict"]), "every stage must have something to do"
    return found


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Equal in every column; margins are bounds, which other batches may round otherwise in float64."""
    pd.testing.assert_frame_equal(found.drop(columns="margin_lower"), expected.drop(columns="margin_lower"))
    np.testing.assert_allclose(found["margin_lower"], expected["margin_lower"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [16, 500])
def test_the_batch_size_changes_no_verdict(network, question, expected, size):
    track, examples = question
    resized = track.model_copy(update={"batch_size": size})
    same(verdicts_of(LocalSession(network, torch.device("cpu")), resized, examples), expected)


def test_the_order_of_the_examples_changes_no_verdict(network, question, expected):
    track, examples = question
    order = np.random.default_rng(3).permutation(len(examples))
    same(verdicts_of(LocalSession(network, torch.device("cpu")), track, chosen(examples, order)), expected)


def test_two_workers_give_the_verdicts_of_one(submission, question, expected):
    """Whoever is idle takes the next part, so who judges an example is chance; one of the two has another thread."""
    with WorkerProcess(threads=1) as first, WorkerProcess(threads=2) as second:
        for worker in (first, second):
            worker.load(submission)
        same(verdicts_of(Pool([first, second]), *question), expected)


@contextmanager
def scoring(submission: Path, runs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command itself, in a process group of its own."""
    code = "import sys; from robustboard.bench.cli import main; sys.exit(main())"
    command = ["score", str(submission), "--track", "digits-linf@1", "--n", "30", "--runs", str(runs), "--no-mlflow"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        yield process


def outcomes(runs: Path) -> pd.DataFrame:
    """The one table under `runs`."""
    (path,) = runs.glob("*/*/*/record/outcomes.parquet")
    return pd.read_parquet(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_killed_ends_as_one_that_was_not(submission, tmp_path):
    """SIGKILL in the middle of the attacks; the same command then goes on and finds the same."""
    with scoring(submission, tmp_path / "killed") as process:
        said = ""
        while "apgd_t" not in said:
            line = process.stderr.readline().decode()
            assert line, f"the run ended before it could be killed: {said}"
            said += line
        os.killpg(process.pid, signal.SIGKILL)
    assert not list((tmp_path / "killed").glob("**/outcomes.parquet"))
    for runs in ("killed", "straight"):
        with scoring(submission, tmp_path / runs) as process:
            assert process.wait(timeout=300) == 0, process.stderr.read().decode()
    pd.testing.assert_frame_equal(outcomes(tmp_path / "killed"), outcomes(tmp_path / "straight"))
