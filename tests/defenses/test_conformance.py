"""`check_defense` accepts every built-in method and catches an adapter that breaks any one rule."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustboard.attacks.threat import ThreatModel
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, Claim, NoProgress, TrainingData
from robustboard.defenses.conformance import check_defense
from robustboard.defenses.standard import Standard
from robustboard.defenses.training import Recipe
from robustboard.errors import DefenseError

FAST = {"epochs": 4, "architecture": "mlp-8"}


@pytest.mark.parametrize("name", registry.names())
def test_every_registered_defense_keeps_the_contract(name: str) -> None:
    check_defense(name)


def test_an_instance_with_overrides_is_checked_as_it_is() -> None:
    check_defense(Standard(FAST))


class Quick(Standard):
    """A sound adapter, as the ground that one rule at a time is broken on."""

    def __init__(self, overrides: Mapping[str, object] | None = None) -> None:
        super().__init__({**FAST, **(overrides or {})})

    def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
        return self.spoil(super().fit(data, threat, **options))

    def spoil(self, model: nn.Module) -> nn.Module:
        return model


def test_the_ground_is_sound() -> None:
    check_defense(Quick)


def card(**changes: Any) -> type[Quick]:
    return type("BadCard", (Quick,), {"card": dataclasses.replace(Standard.card, **changes)})


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.inner(images))

    def change(self, logits: Tensor) -> Tensor:
        return logits


def answers(change: Any) -> type[Quick]:
    wrapper = type("Changed", (Wrapped,), {"change": lambda _, logits: change(logits)})
    return type("BadModel", (Quick,), {"spoil": lambda _, model: wrapper(model).eval()})


class NoCard(Quick):
    card = None  # type: ignore[assignment]


@dataclasses.dataclass(kw_only=True)
class Melted:
    architecture: str = "mlp-8"
    epochs: int = 4


class MutableHyper(Quick):
    hyper_type = Melted


class OtherHyper(Quick):
    def defaults(self, data: TrainingData, threat: ThreatModel) -> Recipe:
        return dataclasses.make_dataclass("Other", [("epochs", int, 1)], frozen=True)()


class NothingSuits(Quick):
    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        return "It never suits."


class Mumbles(Quick):
    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        return "no l2" if threat.norm == "l2" else None


class FitsAnyway(Quick):
    def unsuited(self, data: TrainingData, threat: ThreatModel) -> str | None:
        return "It needs L-inf." if threat.norm == "l2" else None

    def hyper(self, data: TrainingData, threat: ThreatModel) -> Recipe:
        return super().hyper(data, ThreatModel.parse("linf", "1/20"))


class TrainMode(Quick):
    def spoil(self, model: nn.Module) -> nn.Module:
        return model.train()


class NotAModule(Quick):
    def spoil(self, model: nn.Module) -> nn.Module:
        return model.forward  # type: ignore[return-value]


class NanState(Quick):
    def spoil(self, model: nn.Module) -> nn.Module:
        model.register_buffer("spare", torch.tensor([float("nan")]))
        return model


class GlobalSeed(Quick):
    def spoil(self, model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        return model


def moves(draw: Any) -> type[Quick]:
    def spoil(_: Quick, model: nn.Module) -> nn.Module:
        draw()
        return model

    return type("MovesState", (Quick,), {"spoil": spoil})


class ChangesData(Quick):
    def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
        model = super().fit(data, threat, **options)
        data.train.images.mul_(0.999)
        return model


class Silent(Quick):
    def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
        return super().fit(data, threat, **{**options, "progress": NoProgress()})


class Unkillable(Quick):
    def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
        try:
            return super().fit(data, threat, **options)
        except Exception:
            return super().fit(data, threat, **{**options, "progress": NoProgress()})


class Forgetful(Quick):
    def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
        return super().fit(data, threat, **{**options, "checkpoints": CheckpointStore()})


class Store(CheckpointStore):
    def __init__(self, inner: CheckpointStore) -> None:
        super().__init__()
        self.inner = inner

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        self.inner.save(name, state)

    def load(self, name: str) -> dict[str, Any] | None:
        return self.inner.load(name)


def through(store: type[Store]) -> type[Quick]:
    class Through(Quick):
        def fit(self, data: TrainingData, threat: ThreatModel, **options: Any) -> nn.Module:
            return super().fit(data, threat, **{**options, "checkpoints": store(options["checkpoints"])})

    return Through


class NeverLoads(Store):
    def load(self, name: str) -> dict[str, Any] | None:
        return None


class LosesAnEpoch(Store):
    """The state says one epoch more than it holds."""

    def load(self, name: str) -> dict[str, Any] | None:
        state = self.inner.load(name)
        return state and {**state, "epochs": min(4, state["epochs"] + 1)}


class TrainsAgain(Store):
    """A finished training is taken for one that has an epoch to go."""

    def load(self, name: str) -> dict[str, Any] | None:
        state = self.inner.load(name)
        if state is not None and state["epochs"] == 4:
            self.inner.save(name, state)
        return state


BROKEN = [
    (NoCard, "card", "no class attribute card"),
    (card(name="Pgd AT"), "card", "must be like pgd-at"),
    (card(title=" "), "card", "title is empty"),
    (card(summary=""), "card", "summary is empty"),
    (card(paper="1706.06083"), "card", "must be an address"),
    (card(authors=()), "card", "authors are missing"),
    (card(year=0), "card", "the year 0"),
    (card(kind="secret"), "card", "kind 'secret'"),
    (card(claims=(Claim("robust_accuracy", 0.5, "MNIST", ""),)), "card", "lacks setting or source"),
    (MutableHyper, "hyper-parameters", "Melted must be a frozen dataclass"),
    (type("NoHyper", (Quick,), {"__init__": lambda self: None, "hyper_type": dict}), "hyper-parameters", "a dataclass"),
    (OtherHyper, "hyper-parameters", "must return a Recipe, not a Other"),
    (NothingSuits, "unsuited", "must suit it"),
    (Mumbles, "unsuited", "one sentence with a full stop, not 'no l2'"),
    (FitsAnyway, "unsuited", "fit must raise a DefenseError"),
    (NotAModule, "model", "must return a torch.nn.Module"),
    (TrainMode, "model", "train mode"),
    (answers(lambda logits: logits[:, :-1]), "model", "logits of shape"),
    (answers(lambda logits: logits.softmax(dim=1)), "model", "probabilities"),
    (answers(lambda logits: logits / 0), "model", "NaN or infinite logits"),
    (answers(lambda logits: logits + torch.randn_like(logits)), "model", "differently the second time"),
    (answers(lambda logits: logits - logits.mean(dim=0)), "model", "differently alone than in a batch"),
    (answers(lambda logits: logits.detach()), "model", "No gradient reaches"),
    (NanState, "model", "'spare' of its state has NaN"),
    (GlobalSeed, "seed", "the same seed must give the same weights"),
    (moves(lambda: torch.rand(1)), "seed", "global random state of torch as it was"),
    (moves(np.random.rand), "seed", "global random state of numpy as it was"),
    (moves(random.random), "seed", "global random state of Python as it was"),
    (ChangesData, "data", "must not change the training data"),
    (Silent, "progress", "must call progress.advance"),
    (Unkillable, "resume", "must end fit"),
    (Forgetful, "resume", "before three quarters"),
    (through(NeverLoads), "resume", "must load the state that a killed training kept"),
    (through(LosesAnEpoch), "resume", "after a killed training"),
    (through(TrainsAgain), "resume", "not train once more"),
]


@pytest.mark.parametrize(("defense", "rule", "fragment"), BROKEN, ids=[f"{rule}: {part}" for _, rule, part in BROKEN])
def test_each_broken_rule_is_named(defense: type[Quick], rule: str, fragment: str) -> None:
    with pytest.raises(DefenseError) as caught:
        check_defense(defense)
    assert f"breaks the rule '{rule}'" in str(caught.value)
    assert fragment in str(caught.value)
    assert str(caught.value).endswith(".")
