"""From the values of a TOML file to a `Track`: defaults filled in, and every mistake said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.datasets import NpzSource
from robustboard.bench.track import Track
from robustboard.errors import TrackError


def parse_track(content: Mapping[str, Any], *, standard: Mapping[str, Any], where: str, folder: Path) -> Track:
    """A track from the values of its TOML, completed by the standard protocol.

    Args:
        content: what the file says, or what `Track.frozen` gave.
        standard: the standard protocol.
        where: what to call the file in an error.
        folder: what relative paths are relative to.

    Raises:
        TrackError: one sentence that names the key and what is allowed.
    """
    values = merged(standard, content)
    values.setdefault("title", values.get("id"))
    values.setdefault("images_sha256", None)
    if isinstance(values.get("dataset"), Mapping):
        values["dataset"] = _npz_source(values["dataset"], where, folder)
    if "threat" in values:
        values["threat"] = _threat(values["threat"], where)
    try:
        return Track.model_validate(with_tuples(values))
    except ValidationError as error:
        raise TrackError(sentence(error, where, Track)) from error
    except RecursionError as error:
        raise TrackError(f"{where} nests its tables too deeply to be a track.") from error


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One set of values over another: tables are merged key by key, everything else is replaced.

    >>> merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}})
    {'a': {'x': 1, 'y': 4}, 'b': 3}
    """
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def with_tuples(value: Any) -> Any:
    """Values of a TOML with tuples in place of lists: what a frozen model holds."""
    if isinstance(value, Mapping):
        return {key: with_tuples(inner) for key, inner in value.items()}
    return tuple(with_tuples(inner) for inner in value) if isinstance(value, list) else value


def _npz_source(table: Mapping[str, Any], where: str, folder: Path) -> NpzSource:
    _require_keys(table, ("npz",), ("classes",), f"{where}: dataset")
    path, classes = table["npz"], table.get("classes")
    if not isinstance(path, str) or not path:
        raise TrackError(f"{where}: dataset.npz must be the path of an npz file, not {path!r}.")
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
        raise TrackError(f"{where}: dataset.classes must be a whole number from 2, not {classes!r}.")
    return NpzSource((folder / path).absolute(), classes)


def _threat(table: object, where: str) -> ThreatModel:
    if not isinstance(table, Mapping):
        raise TrackError(f'{where}: threat must be a table such as {{norm = "linf", eps = "8/255"}}, not {table!r}.')
    _require_keys(table, ("norm", "eps"), (), f"{where}: threat")
    try:
        return ThreatModel.parse(table["norm"], table["eps"])
    except TrackError as error:
        raise TrackError(f"{where}: {error}") from error


def _require_keys(table: Mapping[str, Any], needed: tuple[str, ...], more: tuple[str, ...], where: str) -> None:
    allowed = ", ".join((*needed, *more))
    for key in table:
        if key not in (*needed, *more):
            raise TrackError(f"{where}.{key} is not known; allowed are {allowed}.")
    for key in needed:
        if key not in table:
            raise TrackError(f"{where}.{key} is missing; allowed are {allowed}.")


# pydantic's kinds of error whose own words are about Python, not about TOML.
_DEMANDS: Mapping[str, str] = {
    "int_type": "a whole number",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "model_type": "a table",
    "dict_type": "a table",
}


def sentence(error: ValidationError, where: str, model: type[BaseModel]) -> str:
    """The first mistake in a file: which key it is about, and what is allowed there.

    Args:
        error: what validating its values raised.
        where: what to call the file.
        model: what they were validated as.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where}: the key {key} is missing."
    if first["type"] == "extra_forbidden":
        return f"{where}: the key {key} is not known; allowed are {', '.join(_allowed(model, first['loc'][:-1]))}."
    demand = _DEMANDS.get(first["type"], first["msg"].removeprefix("Value error, ").removeprefix("Input should be "))
    return f"{where}: {key} must be {demand}, not {first['input']!r}."


def _allowed(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                model = kind
    return sorted(model.model_fields)
