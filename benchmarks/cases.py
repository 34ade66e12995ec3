"""The networks on which the whole verdict is timed beside AutoAttack, and those on which attacks are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.datasets import Dataset, data_folders, load_dataset
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select, track_from, training_data
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress
from robustboard.errors import DataError

TRAININGS = Path("runs/benchmarks")


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on the examples of one track."""

    model: nn.Module
    track: Track
    examples: Examples


def trained(defense: str, track_id: str, *, eps: str | None = None, n: int, **settings: object) -> Case:
    """A network that is trained here, once; `eps` replaces the radius that it is judged at."""
    track = load_track(track_id)
    dataset = load_dataset(track.dataset, data_dirs=data_folders(()))
    name = "-".join([defense, *(f"{key}={value}" for key, value in settings.items())])
    model = _fitted(defense, track, dataset, settings, CheckpointStore(TRAININGS / track.id / name))
    # Not `limited`: some benchmarks judge more examples than the track does.
    judged = track.model_copy(update={"n": n, "images_sha256": None})
    if eps is not None:
        judged = judged.model_copy(update={"threat": ThreatModel.parse("linf", eps)})
    judged = resolve(judged, dataset)
    return Case(model, judged, select(judged, dataset))


DIGITS = ("standard", "fgsm-at", "pgd-at", "trades", "ibp", "crown-ibp", "mtl-ibp", "distillation")
DIGITS_RADII = ("1/10", "1/20")


def digits(defense: str) -> Case:
    """A network that is trained here in seconds, on all the digits of the track."""
    track = load_track("digits-linf@1")
    dataset = load_dataset(track.dataset)
    model = _fitted(defense, track, dataset, {}, CheckpointStore(None))
    judged = resolve(track, dataset)
    return Case(model, judged, select(judged, dataset))


def _fitted(
    defense: str, track: Track, dataset: Dataset, settings: Mapping[str, object], store: CheckpointStore
) -> nn.Module:
    trainer = registry.create(defense, {**track.hyper.get(defense, {}), **settings})
    return trainer.fit(
        training_data(track, dataset),
        track.threat,
        seed=0,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=store,
    ).eval()


def reseeded(track: Track, seed: int, eps: str | None = None) -> Track:
    """The track with other draws in its attacks, and at another radius if one is given."""
    attacks = track.attacks
    pgd = attacks.pgd.model_copy(update={"seed": seed})
    autoattack = attacks.autoattack.model_copy(update={"seed": seed})
    threat = track.threat if eps is None else ThreatModel.parse(track.threat.norm, eps)
    changes = {"attacks": attacks.model_copy(update={"pgd": pgd, "autoattack": autoattack}), "threat": threat}
    return track.model_copy(update=changes)


class _CnnA(nn.Sequential):
    """CNN-A of the verification literature (Dathathri et al. 2020, arXiv 2010.11645)."""

    def __init__(self, channels: int, flat: int, mean: list[float], std: list[float]) -> None:
        super().__init__(
            *(nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(flat, 100), nn.ReLU(), nn.Linear(100, 10)),
        )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward((images - self.mean) / self.std)


def third_party(data: str, eps: str, n: int = 200) -> Case:
    """A network that others trained, on the images that they report on.

    Raises:
        DataError: if its weights are in none of the data folders.
    """
    folders = [folder for folder in data_folders() if (folder / f"{data}_cnn_a_adv.npz").is_file()]
    if not folders:
        raise DataError(f"{data}_cnn_a_adv.npz is in none of the folders of ROBUSTBOARD_DATA.")
    sizes: dict[str, tuple[int, int, list[float], list[float]]] = {
        "cifar": (3, 2048, [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]),
        "mnist": (1, 1568, [0.0], [1.0]),
    }
    model = _CnnA(*sizes[data])
    with np.load(folders[0] / f"{data}_cnn_a_adv.npz") as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    track = track_from(
        {
            "id": f"sdp-{data}-linf@1",
            "dataset": {"npz": str(folders[0] / f"sdp_{data}_200.npz")},
            "threat": {"norm": "linf", "eps": eps},
            "n": n,
        }
    )
    dataset = load_dataset(track.dataset)
    track = resolve(track, dataset)
    return Case(model.eval(), track, select(track, dataset))


MODEL = """
import sys
from pathlib import Path

import torch

sys.path.append({benchmarks!r})

def make():
    return torch.load(Path(__file__).with_name("model.pt"), weights_only=False)
"""
MANIFEST = """
[defense]
name = "benchmarked"
title = "A benchmarked network"
year = 2026
[model]
factory = "model.py:make"
weights = "weights.safetensors"
"""


def handed_in(case: Case, folder: Path) -> Path:
    """The network as a submission, for processes of its own; the path of its manifest."""
    (folder / "model.py").write_text(MODEL.format(benchmarks=str(Path(__file__).parent)))
    (folder / "defense.toml").write_text(MANIFEST)
    torch.save(case.model, folder / "model.pt")
    save_file(
        {name: value.contiguous() for name, value in case.model.state_dict().items()}, folder / "weights.safetensors"
    )
    return folder / "defense.toml"


def hurried(case: Case) -> Case:
    """The same in the fast mode."""
    return dataclasses.replace(case, track=case.track.hurried())


def growing(n: int) -> Case:
    """The network on which cost is shown to grow with the number of examples: most of them are attacked and bounded."""
    return trained("crown-ibp", "mnist-linf@1", n=n)


CASES: dict[str, Callable[[], Case]] = {
    "undefended, MNIST 3/10": lambda: trained("standard", "mnist-linf@1", eps="3/10", n=1000, epochs=2),
    "distilled at T = 100, MNIST 3/10": lambda: trained("distillation", "mnist-linf@1", eps="3/10", n=1000, epochs=2),
    "cifar_cnn_a_adv, 2/255": lambda: third_party("cifar", "2/255"),
    "CROWN-IBP, MNIST 1/10": lambda: trained("crown-ibp", "mnist-linf@1", n=200),
    "mnist_cnn_a_adv, 3/10": lambda: third_party("mnist", "3/10"),
    "mnist_cnn_a_adv, 3/10, fast mode": lambda: hurried(third_party("mnist", "3/10")),
}
