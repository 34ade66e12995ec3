"""Hyper-parameters: frozen dataclasses whose fields can be set as text, as in `--set epochs=5`."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from robustboard.errors import DefenseError

Hyper = TypeVar("Hyper")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def apply_overrides(defaults: Hyper, overrides: Mapping[str, object], *, owner: str) -> Hyper:
    """`defaults` with the named fields replaced.

    Args:
        defaults: a frozen dataclass with fields of type int, float, bool, str, a Literal, or one of them or None.
        overrides: values by field name, as text or already of the field's type.
        owner: who has these hyper-parameters, for the sentence.

    Raises:
        DefenseError: if a field is unknown, a value does not read as the field's type, or the dataclass refuses it.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Example:
    ...     epochs: int = 10
    ...     lr: float = 1e-3
    >>> apply_overrides(Example(), {"epochs": "5"}, owner="example")
    Example(epochs=5, lr=0.001)
    """
    kinds = get_type_hints(type(defaults))
    values: dict[str, Any] = {}
    for name, given in overrides.items():
        require_known(name, type(defaults), owner=owner)
        try:
            values[name] = _read(given, kinds[name])
        except ValueError:
            raise DefenseError(f"{owner}: {name} must be {_describe(kinds[name])}, not {given!r}.") from None
    try:
        return dataclasses.replace(defaults, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise DefenseError(f"{owner}: {error}.") from error


def require_known(name: str, hyper_type: type[Any], *, owner: str) -> None:
    """Raise a DefenseError that lists the hyper-parameters unless `name` is one of them."""
    known = [field.name for field in dataclasses.fields(hyper_type)]
    if name not in known:
        raise DefenseError(f"{owner} has no hyper-parameter {name!r}; it has {', '.join(sorted(known))}.")


def _read(given: object, kind: Any) -> Any:
    """`given` as a value of type `kind`; a ValueError if it is none."""
    choices = _choices(kind)
    if choices is not None:
        if str(given) in choices:
            return str(given)
        raise ValueError(given)
    if get_origin(kind) in (types.UnionType, Union):
        if given is None or str(given).lower() == "none":
            return None
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if kind is bool:
        return _boolean(given)
    if kind is int:
        return _integer(given)
    if kind is float:
        return _number(given)
    if isinstance(given, str):
        return given
    raise ValueError(given)


def _boolean(given: object) -> bool:
    word = str(given).lower()
    if word not in _TRUE + _FALSE:
        raise ValueError(given)
    return word in _TRUE


def _integer(given: object) -> int:
    if isinstance(given, bool) or not isinstance(given, int | str):
        raise ValueError(given)
    return int(given)


def _number(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise ValueError(given)
    above, slash, below = str(given).partition("/")
    try:
        number = float(above) / float(below) if slash else float(given)
    except ZeroDivisionError:
        raise ValueError(given) from None
    if not math.isfinite(number):
        raise ValueError(given)
    return number


def _choices(kind: Any) -> tuple[str, ...] | None:
    return get_args(kind) if get_origin(kind) is Literal else None


def _describe(kind: Any) -> str:
    choices = _choices(kind)
    if choices is not None:
        return f"one of {', '.join(choices)}"
    if get_origin(kind) in (types.UnionType, Union):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        return f"{_describe(kind)} or none"
    names = {bool: "true or false", int: "a whole number", float: "a number or a fraction such as 2/255", str: "text"}
    return names.get(kind, str(kind))
