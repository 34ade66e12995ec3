"""Hyper-parameters given as text become typed values, or one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from robustboard.defenses.hyper import apply_overrides
from robustboard.errors import DefenseError


@dataclass(frozen=True)
class Settings:
    epochs: int = 10
    lr: float = 0.1
    augment: bool = False
    architecture: str = "mlp-10"
    optimizer: Literal["adam", "sgd"] = "adam"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")


READ = [
    ("epochs", "5", 5),
    ("epochs", 5, 5),
    ("lr", "1e-3", 1e-3),
    ("lr", "2/255", 2 / 255),
    ("lr", 3, 3.0),
    ("augment", "true", True),
    ("augment", "No", False),
    ("augment", True, True),
    ("architecture", "cnn-small", "cnn-small"),
    ("optimizer", "sgd", "sgd"),
    ("limit", "none", None),
    ("limit", None, None),
    ("limit", "7", 7),
]


@pytest.mark.parametrize(("name", "given", "value"), READ)
def test_values_are_read_as_the_field_s_type(name: str, given: object, value: object) -> None:
    changed = apply_overrides(Settings(), {name: given}, owner="method")
    assert getattr(changed, name) == value
    assert type(getattr(changed, name)) is type(value)


REFUSED = [
    ("epochs", "5.5", "epochs must be a whole number, not '5.5'"),
    ("epochs", 5.5, "a whole number"),
    ("epochs", True, "a whole number"),
    ("lr", "fast", "lr must be a number or a fraction such as 2/255, not 'fast'"),
    ("lr", "1/0", "a number or a fraction"),
    ("lr", "nan", "a number or a fraction"),
    ("lr", "1/2/3", "a number or a fraction"),
    ("augment", "maybe", "true or false"),
    ("architecture", 3, "text"),
    ("optimizer", "lbfgs", "one of adam, sgd"),
    ("limit", "few", "a whole number or none"),
    ("epochs", "0", "method: epochs must be at least 1, not 0."),
    ("depth", "3", "method has no hyper-parameter 'depth'; it has architecture, augment, epochs"),
]


@pytest.mark.parametrize(("name", "given", "sentence"), REFUSED)
def test_what_does_not_read_is_one_sentence(name: str, given: object, sentence: str) -> None:
    with pytest.raises(DefenseError) as caught:
        apply_overrides(Settings(), {name: given}, owner="method")
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_what_is_not_overridden_stays() -> None:
    assert apply_overrides(Settings(epochs=3), {"lr": "0.5"}, owner="method") == Settings(epochs=3, lr=0.5)
