"""What can be scored: a defense that is trained here, or a network that somebody submits.

Both say who they are, and bring a classifier into the worker process.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors.numpy import save as to_safetensors

from robustboard.bench.answers import StageCost
from robustboard.bench.datasets import Dataset
from robustboard.bench.protocol import Track, training_data
from robustboard.bench.remote import Worker
from robustboard.defenses import registry
from robustboard.defenses.adapter import Defense, DefenseCard, Progress, Split, TrainingData
from robustboard.defenses.submission import Submission, read_manifest
from robustboard.errors import DefenseError, SubmissionError
from robustboard.leaderboard.record import Claim, DefenseInfo


@dataclass(frozen=True)
class Brought:
    """A classifier that stands ready in the worker.

    Attributes:
        parameters: how many numbers it has.
        checkpoint_sha256: of its weights' file.
        weights: the safetensors bytes of a model that was trained here.
        training: what the training cost.
    """

    parameters: int
    checkpoint_sha256: str
    weights: bytes | None = None
    training: StageCost | None = None


class Entrant(ABC):
    """Something to score.

    Attributes:
        info: who it is.
        code_sha256: of a submission's model code.
        key: tells it from others of its name that can end differently, as part of a folder's name.
        hyper: the hyper-parameters of a training.
        seeds: the seeds of a training.
    """

    info: DefenseInfo
    key: str
    code_sha256: str | None = None
    hyper: Mapping[str, Any]
    seeds: Mapping[str, int]

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the classifier's answers depend on beside its weights, as plain values."""

    @abstractmethod
    def enter(self, worker: Worker, folder: Path, progress: Progress) -> Brought:
        """Bring the classifier into the worker; `folder` is the run directory."""


class TrainedEntrant(Entrant):
    """A defense of the registry, to be trained on the track's training data.

    Raises:
        DefenseError: if the track does not suit it, or an override is wrong.
    """

    def __init__(
        self, name: str, overrides: Mapping[str, object], track: Track, dataset: Dataset, *, seed: int
    ) -> None:
        merged = {**track.hyper.get(name, {}), **overrides}
        self._adapter: Defense[Any] = registry.create(name, merged)
        self._track = track
        self._data = training_data(track, dataset)
        if reason := self._adapter.unsuited(self._data, track.threat):
            raise DefenseError(f"{name} does not suit {track.id}: {reason}")
        hyper = self._adapter.hyper(self._data, track.threat)
        self.hyper = dataclasses.asdict(hyper)
        self.seeds = {"training": seed}
        self.key = f"seed-{seed}"
        if overrides:
            chosen = json.dumps({name: str(value) for name, value in overrides.items()}, sort_keys=True)
            self.key += f"-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
        self.info = _card_info(self._adapter.card, architecture=str(self.hyper.get("architecture", "")))

    @property
    def identity(self) -> Mapping[str, object]:
        """The method, its source, which may be somebody else's, and its hyper-parameters."""
        source = Path(inspect.getfile(type(self._adapter)))
        return {
            "defense": self._adapter.card.name,
            "source": hashlib.sha256(source.read_bytes()).hexdigest(),
            "hyper": {name: str(value) for name, value in self.hyper.items()},
        }

    @property
    def images(self) -> int:
        """How many images it is trained on."""
        return len(self._data.train)

    def shortened(self, images: int) -> TrainedEntrant:
        """The same method with the same hyper-parameters on the first images, to see what training costs.

        Of the validation images as large a part is kept.

        Raises:
            DefenseError: if so few images do not suit the method.
        """
        part = images / self.images
        validation = self._data.validation
        data = dataclasses.replace(
            self._data,
            train=_first(self._data.train, images),
            validation=_first(validation, max(1, round(part * len(validation)))),
        )
        other = copy.copy(self)
        other._data = data
        # Some follow from how many images there are, such as the number of epochs.
        found = dataclasses.asdict(self._adapter.hyper(data, self._track.threat))
        changed = {name: value for name, value in self.hyper.items() if found[name] != value}
        other._adapter = registry.create(self._adapter.card.name, {**self._adapter.overrides, **changed})
        return other

    def enter(self, worker: Worker, folder: Path, progress: Progress) -> Brought:
        """Train in the worker; a training that was killed continues from the run directory's checkpoints."""
        threat = self._track.threat
        request = {
            "defense": self._adapter.card.name,
            "overrides": dict(self._adapter.overrides),
            "data": self._data.name,
            "classes": self._data.classes,
            "norm": threat.norm,
            "eps": str(threat.eps),
            "seed": self.seeds["training"],
            "checkpoints": str(folder / "checkpoints"),
        }
        reply = worker.train(request, _arrays(self._data), progress)
        weights = to_safetensors(dict(reply.arrays))
        return Brought(
            reply.count("parameters"),
            hashlib.sha256(weights).hexdigest(),
            weights,
            # A training's passes are not counted: its loop knows no single place through which they all go.
            StageCost(reply.seconds, None, None),
        )


class SubmittedEntrant(Entrant):
    """A network described by a defense.toml.

    Raises:
        SubmissionError: if the manifest, or a file that it names, cannot be used.
    """

    def __init__(self, manifest: Path) -> None:
        self._submission = read_manifest(manifest)
        self.code_sha256 = self._submission.code_sha256
        # The function that builds the network is part of it: one file may hold several.
        content = self._submission.code_sha256 + self._submission.weights_sha256 + self._submission.model.factory
        self.key = f"files-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        self.hyper = {}
        self.seeds = {}
        self.info = _submission_info(self._submission)

    @property
    def identity(self) -> Mapping[str, object]:
        """The code, and the manifest, which names the function that builds the network."""
        content = self._submission.manifest.read_bytes()
        return {"code": self.code_sha256, "manifest": hashlib.sha256(content).hexdigest()}

    def enter(self, worker: Worker, folder: Path, progress: Progress) -> Brought:
        """Build the network and read its weights in the worker.

        Raises:
            SubmissionError: if they are no longer the files that were found at first.
        """
        del folder, progress
        reply = worker.load(self._submission.manifest)
        if read_manifest(self._submission.manifest) != self._submission:
            raise SubmissionError("The submission's files changed while they were read; score it again.")
        return Brought(reply.count("parameters"), self._submission.weights_sha256)


def find_entrant(
    defense: str, overrides: Mapping[str, object], track: Track, dataset: Dataset, *, seed: int
) -> Entrant:
    """The entrant that `defense` names: a path of a defense.toml, or a name of the registry.

    Raises:
        SubmissionError, DefenseError: if there is none, or it cannot enter this track.
    """
    if not is_path(defense):
        return TrainedEntrant(defense, overrides, track, dataset, seed=seed)
    if overrides:
        raise DefenseError("A submission has no hyper-parameters of ours, so --set does not apply to it.")
    return SubmittedEntrant(Path(defense))


def require_known(defense: str, overrides: Mapping[str, object]) -> None:
    """Refuse a name or an override that cannot be, before any data is read.

    Raises:
        DefenseError: if a name is not of the registry, or has no such hyper-parameter.
    """
    if not is_path(defense):
        registry.create(defense, overrides)


def why_unsuited(name: str, track: Track, dataset: Dataset) -> str | None:
    """Why a defense of the registry cannot enter a track, in a sentence; None when it can."""
    return registry.create(name, {}).unsuited(training_data(track, dataset), track.threat)


def is_path(defense: str) -> bool:
    """Whether the words name a file rather than a defense of the registry."""
    return defense.endswith(".toml") or "/" in defense


def _card_info(card: DefenseCard, *, architecture: str) -> DefenseInfo:
    return DefenseInfo(
        name=card.name,
        title=card.title,
        summary=card.summary,
        paper=card.paper,
        authors=card.authors,
        year=card.year,
        kind=card.kind,
        architecture=architecture,
        claims=tuple(
            Claim(metric=claim.metric, value=claim.value, setting=claim.setting, source=claim.source)
            for claim in card.claims
        ),
    )


def _submission_info(submission: Submission) -> DefenseInfo:
    about = submission.defense
    return DefenseInfo(
        name=about.name,
        title=about.title,
        paper=str(about.paper or ""),
        authors=about.authors,
        year=about.year,
        kind=about.kind,
        extra_data=about.extra_data,
        architecture=about.architecture or "",
        license=about.license,
        claims=tuple(
            Claim(
                metric=claim.metric,
                value=claim.value,
                setting=", ".join(part for part in (claim.attack, claim.eps) if part),
                source=claim.source or "",
            )
            for claim in submission.claims
        ),
    )


def _first(split: Split, count: int) -> Split:
    return Split(split.images[:count], split.labels[:count])


def _arrays(data: TrainingData) -> dict[str, npt.NDArray[Any]]:
    return {
        "train_images": data.train.images.numpy(),
        "train_labels": data.train.labels.numpy(),
        "validation_images": data.validation.images.numpy(),
        "validation_labels": data.validation.labels.numpy(),
    }
