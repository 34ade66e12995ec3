"""Submissions: a good one loads; a bad one is refused in one sentence, and reading a manifest runs no code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustboard.defenses.submission import load_model, read_manifest
from robustboard.errors import SubmissionError

MODEL = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
"""

MANIFEST = """
[defense]
name = "tiny"
title = "A tiny network"
paper = "https://example.org/paper"
authors = ["A. Author"]
year = 2020
license = "MIT"
kind = "empirical"
architecture = "linear"
[model]
factory = "model.py:build"
weights = "weights.npz"
[[claims]]
metric = "robust_accuracy"
value = 0.5
attack = "PGD"
eps = "1/10"
source = "Table 1"
"""


def _state() -> dict[str, torch.Tensor]:
    return {"1.weight": torch.arange(8.0).view(2, 4), "1.bias": torch.tensor([1.0, -1.0])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "defense.toml").write_text(MANIFEST)
    np.savez(tmp_path / "weights.npz", **{name: value.numpy() for name, value in _state().items()})
    return tmp_path


def _edit(folder: Path, old: str, new: str) -> Path:
    text = (folder / "defense.toml").read_text()
    assert old in text
    (folder / "defense.toml").write_text(text.replace(old, new))
    return folder / "defense.toml"


def test_a_good_submission_loads_with_its_weights(folder):
    submission = read_manifest(folder / "defense.toml")
    model = load_model(submission)
    assert not model.training
    torch.testing.assert_close(model(torch.ones(1, 1, 2, 2)), torch.tensor([[7.0, 21.0]]))
    assert len(submission.code_sha256) == len(submission.weights_sha256) == 64
    assert submission.claims[0].value == 0.5


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_every_weight_format_gives_the_same_network(folder, ending):
    file = folder / f"weights{ending}"
    if ending == ".pt":
        torch.save(_state(), file)
    else:
        save_file(_state(), file)
    model = load_model(read_manifest(_edit(folder, "weights.npz", file.name)))
    torch.testing.assert_close(model(torch.ones(1, 1, 2, 2)), torch.tensor([[7.0, 21.0]]))


def test_reading_a_manifest_runs_nothing(folder):
    (folder / "model.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    read_manifest(folder / "defense.toml")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('name = "tiny"', 'name = "Tiny!"', "defense.name"),
        ('name = "tiny"', "name = 3", "defense.name"),
        ('title = "A tiny network"', "", "defense.title"),
        ('title = "A tiny network"', 'titel = "typo"\ntitle = "x"', "defense.titel"),
        ('"https://example.org/paper"', '"javascript:alert(1)"', "defense.paper"),
        ("year = 2020", "year = 99999", "defense.year"),
        ('kind = "empirical"', 'kind = "magic"', "defense.kind"),
        ("value = 0.5", "value = nan", r"claims\.0\.value"),
        ('"model.py:build"', '"model.py"', "file.py:function"),
        ('"model.py:build"', '"nowhere.py:build"', "no such file"),
        ('"model.py:build"', '"../model.py:build"', "leads out"),
        ('"weights.npz"', '"../weights.npz"', "leads out"),
        ('"weights.npz"', '"a\\u0000.npz"', "not a file name"),
        ('"weights.npz"', '"/etc/passwd"', "leads out"),
        ('"weights.npz"', '"missing.npz"', "no such file"),
        ('"weights.npz"', '"model.py"', r"must end in \.safetensors"),
        ('"weights.npz"', '"weights.npz"\nrequires = ["no-such-package-at-all"]', "install it first"),
        ('"weights.npz"', '"weights.npz"\nrequires = ["numpy<1"]', "is installed"),
        ('"weights.npz"', '"weights.npz"\nrequires = ["!!"]', "not a requirement"),
        ("[model]", "[model", "not valid TOML"),
    ],
)
def test_a_bad_manifest_is_one_sentence(folder, old, new, sentence):
    path = _edit(folder, old, new)
    with pytest.raises(SubmissionError, match=sentence) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "weights.npz"
    np.savez(outside, x=np.zeros(1))
    (folder / "weights.npz").unlink()
    (folder / "weights.npz").symlink_to(outside)
    with pytest.raises(SubmissionError, match="leads out"):
        read_manifest(folder / "defense.toml")


def test_a_missing_manifest_is_one_sentence(tmp_path):
    with pytest.raises(SubmissionError, match="There is no file"):
        read_manifest(tmp_path / "defense.toml")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def build(): raise ValueError('no luck')", "failed to build the model: ValueError: no luck"),
        ("import sys\ndef build(): sys.exit(3)", "SystemExit"),
        ("def build(): return 3", "must return a torch.nn.Module, not int"),
        ("x = 1", "has no function 'build'"),
        ("def build(:", "SyntaxError"),
        ("import not_a_module_anywhere", "ModuleNotFoundError"),
    ],
)
def test_a_failing_factory_is_one_sentence(folder, code, sentence):
    (folder / "model.py").write_text(code)
    with pytest.raises(SubmissionError, match=sentence):
        load_model(read_manifest(folder / "defense.toml"))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"1.weight": np.zeros((2, 4))}, "lacks 1.bias"),
        ({"1.weight": np.zeros((2, 4)), "1.bias": np.zeros(2), "x": np.zeros(1)}, "has x that"),
        ({"1.weight": np.zeros((4, 2)), "1.bias": np.zeros(2)}, r"shape \(4, 2\)"),
        ({"1.weight": np.full((2, 4), np.nan), "1.bias": np.zeros(2)}, "NaN"),
        ({"1.weight": np.array([{}], dtype=object), "1.bias": np.zeros(2)}, "cannot be read"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence(folder, arrays, sentence):
    np.savez(folder / "weights.npz", **arrays)
    with pytest.raises(SubmissionError, match=sentence):
        load_model(read_manifest(folder / "defense.toml"))


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".pt"])
def test_a_truncated_weight_file_is_one_sentence(folder, ending):
    file = folder / f"weights{ending}"
    if ending == ".pt":
        torch.save(_state(), file)
    elif ending == ".safetensors":
        save_file(_state(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if ending != ".npz":
        _edit(folder, "weights.npz", file.name)
    with pytest.raises(SubmissionError, match="cannot be read as weights"):
        load_model(read_manifest(folder / "defense.toml"))


def test_a_pickle_that_wants_more_than_weights_is_refused(folder):
    torch.save(nn.Linear(4, 2), folder / "weights.pt")
    with pytest.raises(SubmissionError, match="cannot be read as weights"):
        load_model(read_manifest(_edit(folder, "weights.npz", "weights.pt")))
