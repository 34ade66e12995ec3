"""The TOML of a sweep: which defenses are judged on which tracks, with which seeds and settings; every mistake is said.

Its keys are the options of `robustboard score`, with underscores; docs/sweep.md has an example.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from robustboard.bench.track import Count, Seed, Setting, distinct
from robustboard.bench.trackfile import sentence, with_tuples
from robustboard.errors import SweepError

_LARGEST_FILE = 1 << 20


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("text without control characters")
    return value


def _choices(value: object) -> object:
    """One setting, or several to be tried one after another."""
    return value if isinstance(value, tuple) else (value,)


Name = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
Names = Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(distinct)]
Choices = Annotated[
    tuple[Setting, ...], BeforeValidator(_choices), Field(min_length=1, max_length=100), AfterValidator(distinct)
]


class SweepFile(BaseModel):
    """What a sweep.toml says.

    Attributes:
        tracks: ids, or paths of track files.
        defenses: names of the registry, or paths of defense.toml files.
        seeds: training seeds; a submission has none and is judged once.
        n: judge only the first n examples.
        complete, attack_seeds, attack_engine, device, threads, jobs: as the options of `robustboard score`.
        side_by_side: how many cells are worked on at a time.
        hyper: hyper-parameters by defense; of a list every value is tried, and of several lists every combination.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tracks: Names
    defenses: Names
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(distinct)] = (0,)
    n: Count | None = None
    complete: Annotated[int, Field(ge=0)] = 0
    attack_seeds: Annotated[int, Field(ge=0, le=99)] = 0
    attack_engine: Literal["cascade", "reference", "fast"] = "cascade"
    device: Name = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    jobs: Annotated[int, Field(ge=1, le=256)] | None = None
    side_by_side: Annotated[int, Field(ge=1, le=256)] = 1
    hyper: dict[str, dict[str, Choices]] = Field(default_factory=dict)


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep.toml; whether its tracks and defenses exist is not looked at yet.

    Raises:
        SweepError: one sentence that names the key and what is allowed.
    """
    values = _parsed(path)
    try:
        return SweepFile.model_validate(values)
    except ValidationError as error:
        raise SweepError(sentence(error, str(path), SweepFile)) from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise SweepError(f"{path} is larger than one megabyte, so it is not a sweep.toml.")
        values: dict[str, Any] = with_tuples(tomllib.loads(path.read_text(encoding="utf-8")))
        return values
    except FileNotFoundError as error:
        raise SweepError(f"There is no file {path}; give the path of a sweep.toml.") from error
    except OSError as error:
        raise SweepError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError is a ValueError, and so is what is not UTF-8
        raise SweepError(f"{path} is not valid TOML: {str(error).rstrip('.')}.") from error
