"""The contract of a defense: what it is handed, what it hands back, and what it says about itself.

A defense trains a classifier: an `nn.Module` that takes float32 images (N, C, H, W) in [0, 1] and returns logits
(N, K), with any normalisation inside. In eval mode it is deterministic and does not depend on the rest of the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses.checkpoints import CheckpointStore
from robustboard.defenses.hyper import apply_overrides, require_known
from robustboard.errors import DefenseError

__all__ = [
    "CheckpointStore",
    "Claim",
    "Defense",
    "DefenseCard",
    "Kind",
    "NoProgress",
    "Progress",
    "Split",
    "TrainingData",
]

Hyper = TypeVar("Hyper")

Kind = Literal["empirical", "certified", "undefended"]


@dataclass(frozen=True)
class Claim:
    """One number that a paper claims.

    Attributes:
        metric: what is measured, in the board's words where they fit (`robust_accuracy`, `certified_accuracy`).
        value: the number, a share in [0, 1] unless `metric` says otherwise.
        setting: data set, network, attack and radius, in words.
        source: where the paper says it (abstract, table, section).
    """

    metric: str
    value: float
    setting: str
    source: str


@dataclass(frozen=True)
class DefenseCard:
    """What a board prints about a defense.

    Attributes:
        name: what the command line calls it, `[a-z0-9-]+`.
        title: the method's name in words.
        paper: the address of the paper.
        authors: in the paper's order.
        year: of the paper.
        kind: `"empirical"` (aims to survive attacks), `"certified"` (aims to be provable) or `"undefended"`.
        summary: one sentence on how it trains.
        claims: what the paper says it reaches.
    """

    name: str
    title: str
    paper: str
    authors: tuple[str, ...]
    year: int
    kind: Kind
    summary: str
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32 in [0, 1], and labels (N,), int64, on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TrainingData:
    """All that an adapter ever sees of a data set: no test image is in here.

    Attributes:
        name: the data set's id, such as `mnist`.
        train: what to fit.
        validation: what to select on.
        classes: the number of classes K.
    """

    name: str
    train: Split
    validation: Split
    classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width


class Progress(Protocol):
    """How long work says how far it is; `NoProgress` says nothing."""

    def begin(self, stage: str, total: int) -> None:
        """Start a bar named `stage` of `total` steps (any unit)."""

    def advance(self, steps: int = 1) -> None:
        """Move the current bar on."""

    def note(self, **values: float) -> None:
        """Numbers to show beside the bar and to log for the epoch, such as `loss=0.1`."""


class NoProgress:
    """A `Progress` that shows nothing."""

    def begin(self, stage: str, total: int) -> None:
        """Do nothing."""

    def advance(self, steps: int = 1) -> None:
        """Do nothing."""

    def note(self, **values: float) -> None:
        """Do nothing."""


class Defense(ABC, Generic[Hyper]):
    """One published method, as a trainer of classifiers.

    Subclasses name a `card` and a frozen dataclass of hyper-parameters (`hyper_type`), and implement `defaults` and
    `fit`. The registry makes one instance for each use; `conformance.check_defense` says whether all promises hold.

    Args:
        overrides: hyper-parameters by name, as text (from `--set`) or already typed (from a track).

    Raises:
        DefenseError: if an override names no hyper-parameter of the method.
    """

    card: ClassVar[DefenseCard]
    hyper_type: ClassVar[type[Any]]

    def __init__(self, overrides: Mapping[str, object] | None = None) -> None:
        self.overrides = dict(overrides or {})
        for name in self.overrides:
            require_known(name, self.hyper_type, owner=self.card.name)

    @abstractmethod
    def defaults(self, data: TrainingData, threat: ThreatModel) -> Hyper:
        """The hyper-parameters for this data set and radius, before overrides."""

    def hyper(self, data: TrainingData, threat: ThreatModel) -> Hyper:
        """The hyper-parameters in force: the defaults with the overrides applied.

        Raises:
            DefenseError: if the track does not suit the method, or an override does not read as the field's type.
        """
        reason = self.unsuited(data, threat)
        if reason is not None:
            raise DefenseError(reason)
        return apply_overrides(self.defaults(data, threat), self.overrides, owner=self.card.name)

    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        """A sentence that says why this track does not suit the method, or None when it does."""
        del data, threat
        return None

    @abstractmethod
    def fit(
        self,
        data: TrainingData,
        threat: ThreatModel,
        *,
        seed: int,
        device: torch.device,
        progress: Progress,
        checkpoints: CheckpointStore,
    ) -> nn.Module:
        """Train a classifier and return it in eval mode on `device`.

        The same seed, machine and thread count repeat bit for bit, and a training that was killed continues from
        `checkpoints` to the same weights. The global random state is left as it was.

        Args:
            data: the training and validation splits.
            threat: what the classifier is to withstand.
            seed: the one source of randomness.
            device: where to train.
            progress: told about every step.
            checkpoints: where states are kept, the final one too.

        Raises:
            DefenseError: if the track does not suit the method, or the training fails.
        """
