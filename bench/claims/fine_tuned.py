"""The measures of the RiFT paper (arXiv 2308.02533, sec. 5.1) on networks before and after fine-tuning.

`Std` is clean accuracy, `Adv` the worst of three runs of PGD-10, `OOD` the unweighted mean over corruptions. All are
taken on the same test images for every network, so that networks are compared image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robustboard.attacks import keyed
from robustboard.attacks.pgd import ascend
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.arrays import Images, ImageSet, as_floats
from robustboard.bench.claims.claim import Measurement, mean, paired_difference
from robustboard.bench.claims.laboratory import Laboratory, Trained
from robustboard.bench.corruptions import FIRST_FIVE, SEVERITIES, corrupt
from robustboard.defenses.adapter import CheckpointStore
from robustboard.defenses.fine_tuning import FineTuning, chosen_modules, rank_modules, tune_modules
from robustboard.defenses.robust_criticality import Criticality
from robustboard.defenses.training import device_of

Flags = npt.NDArray[np.bool_]
_BATCH = 500
RUNS, STEPS = 3, 10


def first_images(lab: Laboratory, track: str, count: int) -> ImageSet:
    """The first test images of the track's data set, in its own order, as the paper takes them."""
    test = lab.dataset(track).test
    return ImageSet(test.images[:count], test.labels[:count])


def standard(network: nn.Module, images: ImageSet) -> Flags:
    """Whether each image is classified correctly."""
    return _right(network, images.images, images.labels)


def adversarial(network: nn.Module, images: ImageSet, threat: ThreatModel, *, seed: int) -> Flags:
    """Whether each image is correct after PGD-10, in the worst of three runs.

    The worst run is the one with the lowest accuracy, which is weaker than the worst case of every image.
    """
    clean = torch.from_numpy(as_floats(images.images))
    labels = torch.from_numpy(images.labels)
    draw, device = keyed.uniform if threat.norm == "linf" else keyed.normal, device_of(network)
    runs = []
    for run in range(RUNS):
        right = []
        for first in range(0, len(images), _BATCH):
            part, wanted = clean[first : first + _BATCH].to(device), labels[first : first + _BATCH].to(device)
            noise = draw(images.hashes[first : first + _BATCH], part.shape[1:], seed, "rift claim", run).to(device)
            start, size = threat.start(part, noise), threat.radius / 4
            found = ascend(network, part, wanted, threat=threat, start=start, steps=STEPS, step_size=size)
            right.append(_right(network, found.detach().cpu().numpy(), wanted.cpu().numpy()))
        runs.append(np.concatenate(right))
    return min(runs, key=lambda flags: int(flags.sum()))


def corrupted(networks: Sequence[nn.Module], images: ImageSet, *, seed: int) -> list[npt.NDArray[np.float64]]:
    """The share of (corruption, severity) pairs under which each image is classified correctly, for each network."""
    shares = [np.zeros(len(images)) for _ in networks]
    for name in FIRST_FIVE:
        for severity in SEVERITIES:
            changed = corrupt(images.images, corruption=name, severity=severity, keys=images.hashes, seed=seed)
            for place, network in enumerate(networks):
                shares[place] += _right(network, changed, images.labels)
    return [total / (len(FIRST_FIVE) * len(SEVERITIES)) for total in shares]


def gains(
    before: nn.Module, after: nn.Module, lab: Laboratory, track: str, images: ImageSet, ood: int
) -> dict[str, Measurement]:
    """What a network gains over another by the paper's three measures, in points."""
    threat = lab.setup(track).threat
    fewer = ImageSet(images.images[:ood], images.labels[:ood])
    shares = corrupted([after, before], fewer, seed=lab.seed)
    return {
        "clean": paired_difference(
            "clean accuracy, RiFT less its parent", standard(after, images), standard(before, images)
        ),
        "ood": mean("accuracy under corruptions, RiFT less its parent", 100 * (shares[0] - shares[1]), unit="points"),
        "adversarial": paired_difference(
            "accuracy under PGD-10, the worst of three runs, RiFT less its parent",
            adversarial(after, images, threat, seed=lab.seed),
            adversarial(before, images, threat, seed=lab.seed),
        ),
    }


def ranking(lab: Laboratory, parent: Trained, settings: FineTuning) -> tuple[Criticality, ...]:
    """The modules of a network by robust criticality, kept beside the laboratory's runs."""
    store = CheckpointStore(_folder(lab, parent) / settings.criticality_adversary)
    return rank_modules(
        parent.model, parent.data, parent.threat, settings, seed=lab.seed, progress=lab.progress, checkpoints=store
    )


def tuned(
    lab: Laboratory, parent: Trained, found: Sequence[Criticality], settings: FineTuning
) -> tuple[tuple[str, ...], nn.Module]:
    """The modules that `settings` choose, and the network with these tuned (alpha = 1)."""
    modules = chosen_modules(parent.model, found, settings)
    store = CheckpointStore(_folder(lab, parent) / "-".join(modules))
    network = tune_modules(
        parent.model,
        modules,
        parent.data,
        parent.threat,
        settings,
        seed=lab.seed,
        progress=lab.progress,
        checkpoints=store,
    )
    return modules, network


def _folder(lab: Laboratory, parent: Trained) -> Path:
    """Where states are kept; they know themselves which parent and settings they belong to."""
    return lab.runs / parent.track.id / "rift-claims" / f"seed-{lab.seed}"


def _right(network: nn.Module, images: Images, labels: npt.NDArray[np.int64]) -> Flags:
    found: list[Tensor] = []
    with torch.no_grad():
        for first in range(0, len(images), _BATCH):
            part = torch.from_numpy(as_floats(images[first : first + _BATCH]))
            answers = network(part.to(device_of(network))).argmax(dim=1).cpu()
            found.append(answers == torch.from_numpy(labels[first : first + _BATCH]))
    right: Flags = torch.cat(found).numpy()
    return right
