"""Settings are compared on validation images: the numbers are those of that split, and test images stay out."""

from __future__ import annotations

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from robustboard.attacks.threat import ThreatModel
from robustboard.bench import tuning
from robustboard.bench.datasets import load_dataset
from robustboard.bench.protocol import load_track, training_data
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Split, TrainingData

QUICK = {"epochs": "2", "architecture": "mlp-10"}


def digits() -> tuple[TrainingData, ThreatModel]:
    track = load_track("digits-linf@1")
    return training_data(track, load_dataset("digits")), track.threat


def run(*words: str):
    app = Typer()
    app.command()(tuning.main)
    return CliRunner().invoke(app, list(words))


def test_the_numbers_are_those_of_the_validation_split():
    data, threat = digits()
    found = tuning.validate("pgd-at", data, threat, QUICK, n=50)
    model = registry.create("pgd-at", QUICK).fit(
        data, threat, seed=0, device=torch.device("cpu"), progress=NoProgress(), checkpoints=CheckpointStore()
    )
    with torch.no_grad():
        right = model(data.validation.images).argmax(dim=1) == data.validation.labels
    assert found.clean == pytest.approx(right.float().mean().item(), abs=1e-6)
    assert (found.clean_n, found.robust_n) == (len(data.validation), 50)
    assert found.robust <= right[:50].float().mean().item()


def test_other_validation_labels_give_other_numbers():
    data, threat = digits()
    wrong = Split(data.validation.images, (data.validation.labels + 1) % 10)
    moved = TrainingData(data.name, data.train, wrong, data.classes)
    first, second = (tuning.validate("standard", each, threat, QUICK, n=20) for each in (data, moved))
    assert first.clean > second.clean + 0.1


def test_the_command_prints_one_line():
    result = run("pgd-at", "--track", "digits-linf@1", "--set", "epochs=2", "--set", "architecture=mlp-10", "--n", "20")
    assert result.exit_code == 0
    assert result.output.startswith("pgd-at digits-linf@1 epochs=2 architecture=mlp-10: clean ")
    assert "(n = 20)" in result.output


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["nothing", "--track", "digits-linf@1"], "defense 'nothing' is unknown"),
        (["pgd-at", "--track", "nowhere@1"], "track 'nowhere@1' is not known"),
        (["pgd-at", "--track", "digits-linf@1", "--set", "ramp=2"], "ramp must be a share"),
        (["pgd-at", "--track", "digits-linf@1", "--set", "ramp"], "ramp must be a number"),
    ],
)
def test_misuse_is_one_sentence(words, fragment):
    result = run(*words)
    assert result.exit_code == 2
    assert fragment in result.output
    assert result.output.count("\n") == 1
