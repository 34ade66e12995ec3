"""Defenses are found by name: the built-in ones, and those that installed packages announce."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from robustboard.defenses import registry
from robustboard.defenses.adapter import DefenseCard
from robustboard.defenses.standard import Standard
from robustboard.errors import DefenseError


class Announced(Standard):
    """What another package would bring."""

    card = DefenseCard("announced", "Announced", "https://example.org", ("A. Author",), 2026, "empirical", "A test.")


def announce(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> None:
    entries = [EntryPoint(name, value, registry.GROUP) for name, value in pairs]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: entries if group == registry.GROUP else [])


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module that holds `Announced`, whatever this test module is called."""
    import sys
    from types import ModuleType

    module: Any = ModuleType("announced_plugin")
    module.Announced, module.number = Announced, 3
    monkeypatch.setitem(sys.modules, "announced_plugin", module)
    return "announced_plugin"


def test_the_five_methods_and_the_baselines_are_there_by_year() -> None:
    five = {"convex", "distillation", "differential", "mixtrain", "rift"}
    baselines = {"standard", "fgsm-at", "pgd-at", "trades", "ibp", "crown-ibp", "mtl-ibp"}
    cards = registry.cards()
    assert {card.name for card in cards} == five | baselines
    assert [card.name for card in cards] == registry.names()
    assert [card.year for card in cards] == sorted(card.year for card in cards)


def test_create_hands_the_overrides_over() -> None:
    defense = registry.create("trades", {"beta": "3"})
    assert (defense.card.name, defense.overrides) == ("trades", {"beta": "3"})


def test_an_announced_defense_is_found(monkeypatch: pytest.MonkeyPatch, plugin: str) -> None:
    announce(monkeypatch, ("announced", f"{plugin}:Announced"))
    assert registry.names()[-1] == "announced"
    assert isinstance(registry.create("announced", {"epochs": 1}), Announced)
    assert registry.cards()[-1] is Announced.card


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DefenseError, match="'pdg-at' is unknown; choose from standard, fgsm-at, distillation, pgd-at,"):
        registry.create("pdg-at")


def test_an_unknown_hyper_parameter_is_refused_before_any_training() -> None:
    with pytest.raises(DefenseError, match="pgd-at has no hyper-parameter 'temperature'; it has architecture, augment"):
        registry.create("pgd-at", {"temperature": "40"})


def test_a_duplicate_name_names_both_sources(monkeypatch: pytest.MonkeyPatch, plugin: str) -> None:
    announce(monkeypatch, ("pgd-at", f"{plugin}:Announced"))
    with pytest.raises(DefenseError, match=r"adversarial:PgdTraining and announced_plugin:Announced"):
        registry.names()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("missing_plugin:Announced", "cannot be loaded from missing_plugin:Announced: ModuleNotFoundError"),
        ("announced_plugin:Nothing", "cannot be loaded from announced_plugin:Nothing: AttributeError"),
        ("announced_plugin:number", "is not a subclass of Defense"),
        ("announced_plugin:Announced", "leads to a defense called 'announced'"),
    ],
)
def test_a_bad_announcement_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, plugin: str, value: str, sentence: str
) -> None:
    announce(monkeypatch, ("other", value))
    with pytest.raises(DefenseError, match=sentence):
        registry.create("other")
