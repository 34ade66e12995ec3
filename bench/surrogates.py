"""Networks that the transfer diagnostic attacks in a model's place: trained here, by recipes frozen in this file.

An adversarial example of one network often breaks another trained on the same data (Papernot et al. 2017,
arXiv 1602.02697). The surrogates of a track follow from its training images and these recipes alone, so that every
defense on a track meets the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from robustboard.attacks import global_draws, keyed
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress, Split, TrainingData

RECIPES: Final[tuple[str, ...]] = ("standard", "fgsm-at")
"""An undefended network, and one whose examples suit adversarially trained ones better."""

SEED: Final = 20_220_617
_LARGEST = 5000
_PASSES = 30_000
"""Images shown to one surrogate in all, so that no data set takes long."""

STEPS: Final = 40


@dataclass(frozen=True)
class Surrogate:
    """One trained surrogate.

    Attributes:
        name: its recipe.
        sha256: of its weights as safetensors.
    """

    name: str
    model: nn.Module
    sha256: str


Surrogates = Callable[[], Sequence[Surrogate]]


def surrogates_of(
    data: TrainingData,
    threat: ThreatModel,
    *,
    folder: Path | None = None,
    recipes: Sequence[str] = RECIPES,
    progress: Progress | None = None,
) -> tuple[Surrogate, ...]:
    """Train the surrogates of a track, on the CPU and one thread; those that do not suit the track are left out.

    Args:
        data: the track's training images, in its order.
        threat: the ball.
        folder: where finished trainings are kept for the next run; None keeps nothing.
        recipes: which of `RECIPES`.
        progress: told of every step.
    """
    part = Split(data.train.images[:_LARGEST], data.train.labels[:_LARGEST])
    less = TrainingData(data.name, part, data.validation, data.classes)
    settings: Mapping[str, object] = MappingProxyType({"epochs": max(2, round(_PASSES / len(part)))})
    # Jobs in threads share torch's generators, its thread count and the folder.
    with global_draws.one_thread_at_a_time():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return tuple(
                _train(name, settings, less, threat, folder, progress or NoProgress())
                for name in recipes
                if registry.create(name, settings).unsuited(less, threat) is None
            )
        finally:
            torch.set_num_threads(threads)


def transferred(
    surrogate: Surrogate, images: Tensor, labels: Tensor, *, threat: ThreatModel, keys: Sequence[str]
) -> Tensor:
    """Images that ascend the surrogate's margin to the end, (N, C, H, W).

    They do not stop at the first point that the surrogate misclassifies, where they would hardly transfer. The starts
    are random and keyed by example.
    """
    draw = keyed.uniform if threat.norm == "linf" else keyed.normal
    noise = draw(keys, images.shape[1:], SEED, "transfer", surrogate.name)
    return ascend(
        surrogate.model,
        images,
        labels,
        threat=threat,
        start=threat.start(images, noise),
        steps=STEPS,
        step_size=threat.radius / 10,
        loss="margin",
    )


def _train(
    name: str,
    settings: Mapping[str, object],
    data: TrainingData,
    threat: ThreatModel,
    folder: Path | None,
    progress: Progress,
) -> Surrogate:
    model = registry.create(name, settings).fit(
        data,
        threat,
        seed=SEED,
        device=torch.device("cpu"),
        progress=progress,
        checkpoints=CheckpointStore(None if folder is None else folder / name),
    )
    weights = to_safetensors({key: value.contiguous() for key, value in model.state_dict().items()})
    return Surrogate(name, model, hashlib.sha256(weights).hexdigest())
