"""The contract of a defense as checks that anyone can run on their own adapter, in the manner of `check_estimator`.

    from robustboard.defenses.conformance import check_defense
    check_defense(MyDefense)

The adapter is trained several times on a few dozen synthetic images, so its `defaults` should be small on small data.
"""

from __future__ import annotations

import dataclasses
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from robustboard.attacks.keyed import generator
from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import (
    CheckpointStore,
    Defense,
    DefenseCard,
    NoProgress,
    Progress,
    Split,
    TrainingData,
)
from robustboard.defenses.contract import check_classifier
from robustboard.errors import DefenseError, ModelError

_SENTENCE = re.compile(r"[^\n]*\S[^\n]*\.")


def check_defense(defense: str | type[Defense[Any]] | Defense[Any]) -> None:
    """Check that a defense keeps every promise of `Defense`.

    The rules, in order: the card is complete; the hyper-parameters are a frozen dataclass; every track either suits or
    is refused in a sentence; `fit` returns a classifier in eval mode whose state is finite; the seed alone decides the
    weights; the data and the global random state are left alone; progress is told; a killed training resumes to the
    same weights, and a finished one is not repeated.

    Args:
        defense: a name from `registry.names()`, a subclass of `Defense`, or an instance with overrides of its own.

    Raises:
        DefenseError: naming the first rule that is broken.

    >>> check_defense("standard")
    """
    adapter = registry.create(defense) if isinstance(defense, str) else defense
    if isinstance(adapter, type):
        _check_card(adapter)
        adapter = adapter()
    check = _Conformance(adapter)
    check.card()
    check.hyper_parameters()
    check.says_what_suits()
    check.trains()
    check.repeats()
    check.resumes()


class _Conformance:
    """The rules, checked on the first tiny track that suits."""

    def __init__(self, defense: Defense[Any]) -> None:
        self._defense = defense
        self._track = next(
            ((data, threat) for data, threat in _tracks() if defense.unsuited(data, threat) is None), None
        )
        self._weights: dict[str, torch.Tensor] = {}
        self._steps = 0

    def card(self) -> None:
        """The card is complete."""
        _check_card(type(self._defense))

    def hyper_parameters(self) -> None:
        """`hyper_type` is a frozen dataclass, and `defaults` returns one."""
        kind = getattr(self._defense, "hyper_type", None)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise self._broken("hyper-parameters", "hyper_type must be a dataclass")
        if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise self._broken("hyper-parameters", f"{kind.__name__} must be a frozen dataclass")
        defaults = self._defense.defaults(*self._suited())
        if type(defaults) is not kind:
            raise self._broken(
                "hyper-parameters", f"defaults must return a {kind.__name__}, not a {type(defaults).__name__}"
            )

    def says_what_suits(self) -> None:
        """A track that does not suit is refused in a sentence, by `unsuited` and by `fit`."""
        self._suited()
        for data, threat in _tracks():
            reason = self._defense.unsuited(data, threat)
            if reason is None:
                continue
            if not _SENTENCE.fullmatch(str(reason)):
                raise self._broken("unsuited", f"the reason must be one sentence with a full stop, not {reason!r}")
            try:
                self._fit(data=data, threat=threat)
            except DefenseError:
                continue
            raise self._broken("unsuited", f"fit must raise a DefenseError on a track that does not suit ({reason})")

    def trains(self) -> None:
        """`fit` returns a classifier with a finite state, tells its progress, and touches nothing else."""
        data, _ = self._suited()
        images, labels = data.train.images.clone(), data.train.labels.clone()
        progress = _CountingProgress()
        with self._same_random_state():
            model = self._fit(progress=progress)
        if not isinstance(model, nn.Module):
            raise self._broken("model", f"fit must return a torch.nn.Module, not {type(model).__name__}")
        try:
            check_classifier(model, data.validation.images, classes=data.classes)
        except ModelError as error:
            raise self._broken("model", str(error).rstrip(".")) from error
        self._weights = _weights(model)
        for name, value in self._weights.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise self._broken("model", f"the tensor {name!r} of its state has NaN or infinite entries")
        if not (torch.equal(images, data.train.images) and torch.equal(labels, data.train.labels)):
            raise self._broken("data", "fit must not change the training data in place")
        self._steps = progress.steps
        if self._steps < 3:
            raise self._broken(
                "progress",
                f"fit must call progress.advance throughout; on {len(labels)} images it made {self._steps} calls",
            )

    def repeats(self) -> None:
        """The seed decides the weights, whatever the global random state is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20_000)
            model = self._fit()
        self._same_weights(model, "seed", "the same seed must give the same weights bit for bit")

    def resumes(self) -> None:
        """A training that is killed continues from its last state; one that is finished returns it."""
        with tempfile.TemporaryDirectory() as folder:
            killed = _RecordingStore(Path(folder))
            try:
                self._fit(progress=_CountingProgress(limit=self._steps * 3 // 4), checkpoints=killed)
            except _Killed:
                pass
            else:
                raise self._broken("resume", "an error raised by progress.advance must end fit")
            if not killed.saves:
                raise self._broken("resume", "fit must keep a state in checkpoints before three quarters of its work")
            for again in ("killed", "finished"):
                store = _RecordingStore(Path(folder))
                model = self._fit(checkpoints=store)
                if not store.found:
                    raise self._broken("resume", f"fit must load the state that a {again} training kept")
                self._same_weights(
                    model, "resume", f"after a {again} training, fit must end with the weights of an uninterrupted one"
                )
                if again == "finished" and store.saves:
                    raise self._broken("resume", "fit must keep its final state and return it, not train once more")

    def _suited(self) -> tuple[TrainingData, ThreatModel]:
        if self._track is None:
            raise self._broken("unsuited", "some L-inf or L2 track with two or three classes must suit it")
        return self._track

    def _fit(
        self,
        *,
        data: TrainingData | None = None,
        threat: ThreatModel | None = None,
        progress: Progress | None = None,
        checkpoints: CheckpointStore | None = None,
    ) -> nn.Module:
        if data is None or threat is None:
            data, threat = self._suited()
        return self._defense.fit(
            data,
            threat,
            seed=1,
            device=torch.device("cpu"),
            progress=progress or NoProgress(),
            checkpoints=checkpoints or CheckpointStore(),
        )

    @contextmanager
    def _same_random_state(self) -> Iterator[None]:
        before = (torch.get_rng_state(), repr(np.random.get_state()), random.getstate())
        yield
        after = (torch.get_rng_state(), repr(np.random.get_state()), random.getstate())
        names = ("torch", "numpy", "Python")
        equal = (torch.equal(before[0], after[0]), before[1] == after[1], before[2] == after[2])
        moved = [name for name, same in zip(names, equal, strict=True) if not same]
        if moved:
            raise self._broken("seed", f"fit must leave the global random state of {' and '.join(moved)} as it was")

    def _same_weights(self, model: nn.Module, rule: str, sentence: str) -> None:
        weights = _weights(model)
        if weights.keys() != self._weights.keys():
            raise self._broken(rule, sentence)
        for name, value in weights.items():
            if not torch.equal(value, self._weights[name]):
                raise self._broken(rule, f"{sentence}; {name!r} differs")

    def _broken(self, rule: str, sentence: str) -> DefenseError:
        return _broken(type(self._defense), rule, sentence)


class _Killed(Exception):  # noqa: N818 (it stands for a signal, not for an error)
    """What a training is killed with."""


class _CountingProgress(NoProgress):
    """Counts the calls of `advance`, and kills the training at the last allowed one."""

    def __init__(self, limit: int | None = None) -> None:
        self.steps = 0
        self._limit = limit

    def advance(self, steps: int = 1) -> None:
        del steps
        self.steps += 1
        if self.steps == self._limit:
            raise _Killed


class _RecordingStore(CheckpointStore):
    """Knows whether states were kept and found."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saves = 0
        self.found = False

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        super().save(name, state)
        self.saves += 1

    def load(self, name: str) -> dict[str, Any] | None:
        state = super().load(name)
        self.found = self.found or state is not None
        return state


def _check_card(kind: type[Defense[Any]]) -> None:
    card = getattr(kind, "card", None)
    if not isinstance(card, DefenseCard):
        raise DefenseError(
            f"{kind.__name__} breaks the rule 'card': it has no class attribute card of type DefenseCard."
        )
    rules: tuple[tuple[bool, str], ...] = (
        (bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.name)), f"the name {card.name!r} must be like pgd-at"),
        (bool(card.title.strip()), "the title is empty"),
        (bool(card.summary.strip()), "the summary is empty"),
        (card.paper.startswith(("https://", "http://")), f"the paper must be an address, not {card.paper!r}"),
        (bool(card.authors) and all(author.strip() for author in card.authors), "the authors are missing"),
        (1950 <= card.year <= 2100, f"the year {card.year} is none"),
        (card.kind in ("empirical", "certified", "undefended"), f"the kind {card.kind!r} is unknown"),
        (
            all(claim.source.strip() and claim.setting.strip() for claim in card.claims),
            "a claim lacks setting or source",
        ),
    )
    for kept, sentence in rules:
        if not kept:
            raise _broken(kind, "card", sentence)


def _broken(kind: type[Defense[Any]], rule: str, sentence: str) -> DefenseError:
    card = getattr(kind, "card", None)
    name = card.name if isinstance(card, DefenseCard) else kind.__name__
    return DefenseError(f"{name} breaks the rule '{rule}': {sentence}.")


def _tracks() -> list[tuple[TrainingData, ThreatModel]]:
    """Tiny tracks of every kind: L-inf and L2, three classes and two, grey and colour."""
    threats = (ThreatModel.parse("linf", "1/20"), ThreatModel.parse("l2", "1/4"))
    return [
        (_synthetic(classes=classes, channels=channels), threat)
        for channels in (1, 3)
        for classes in (3, 2)
        for threat in threats
    ]


def _synthetic(*, classes: int, channels: int, count: int = 48) -> TrainingData:
    """Images (N, C, 8, 8) that are a bright square in a place that tells the class, and noise."""
    draws = generator("conformance", classes, channels)
    labels = torch.arange(count) % classes
    images = 0.5 * torch.rand(count, channels, 8, 8, generator=draws)
    for place, label in enumerate(labels.tolist()):
        images[place, :, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 0.5
    held = count // 4
    return TrainingData(
        "conformance", Split(images[held:], labels[held:]), Split(images[:held], labels[:held]), classes
    )


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
