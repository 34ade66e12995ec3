"""The record of one scored defense: what was measured, on what, with what, and where it can be read again.

A record is `record.json` beside `outcomes.parquet`; the sha256 of the second stands in the first, and all numbers of
the first follow from the second. Nothing in a record is trusted: text is limited, numbers are finite, and loading
derives every metric anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self
from urllib.parse import urlsplit

import pandas as pd
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from robustboard.errors import RecordError
from robustboard.leaderboard.addenda import AttackSpread, Challenge
from robustboard.leaderboard.metrics import Metric
from robustboard.leaderboard.outcomes import from_parquet
from robustboard.leaderboard.statistics import sandwich_interval

SCHEMA_VERSION: Final = 1

_LARGEST_FREE_FORM = 100_000


def _finite(value: JsonValue) -> JsonValue:
    """Refuse free-form content that is not finite or would swamp a page."""
    left = _LARGEST_FREE_FORM
    pending: list[JsonValue] = [value]
    while pending:
        item = pending.pop()
        left -= len(item) if isinstance(item, str) else 1
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError("numbers must be finite")
        if isinstance(item, dict):
            left -= sum(map(len, item))
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        if left < 0:
            raise ValueError(f"free-form content is limited to {_LARGEST_FREE_FORM} characters")
    return value


Line = Annotated[str, StringConstraints(max_length=300)]
Words = Annotated[str, StringConstraints(max_length=2000)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")]
TrackId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}(@[0-9]{1,6})?$")]
MetricName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._/-]{0,99}$")]
Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Field(ge=0)]
Seconds = Annotated[StrictFloat, Field(ge=0)]
Free = Annotated[JsonValue, AfterValidator(_finite)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrackRef(_Part):
    """The track that was run: `content` is the whole frozen protocol, `hash` is the hash the bench gave it."""

    id: TrackId
    hash: Hex
    content: dict[Line, Free]


class Claim(_Part):
    """One number that the paper claims, in its own setting."""

    metric: Line
    value: StrictFloat
    setting: Line = ""
    source: Line = ""


class DefenseInfo(_Part):
    """Who made the defense and what it is.

    Attributes:
        paper: where it is published; linked only when it is an http or https address.
        year: of the paper; None for a model without one.
        kind: what the defense aims at.
        extra_data: whether it was trained on more than the data set's training images.
    """

    name: Name
    title: Line
    summary: Words = ""
    paper: Line = ""
    authors: Annotated[tuple[Line, ...], Field(max_length=200)] = ()
    year: Annotated[StrictInt, Field(ge=1900, le=2200)] | None = None
    kind: Literal["empirical", "certified", "undefended"]
    extra_data: StrictBool = False
    architecture: Line = ""
    claims: Annotated[tuple[Claim, ...], Field(max_length=100)] = ()
    license: Line | None = None

    @property
    def paper_url(self) -> str | None:
        """The paper's address if it is a plain http or https one, else None."""
        try:
            parts = urlsplit(self.paper)
        except ValueError:
            return None
        plain = self.paper.isascii() and self.paper.isprintable() and " " not in self.paper
        return self.paper if plain and parts.scheme in ("http", "https") and parts.netloc else None


class Environment(_Part):
    """What the evaluation ran on; `commit` and `dirty` are None outside a git checkout."""

    python: Line
    torch: Line
    packages: dict[Line, Line]
    device: Line
    threads: Annotated[StrictInt, Field(ge=1)]
    platform: Line
    commit: Line | None = None
    dirty: StrictBool | None = None


class StageCost(_Part):
    """What one stage took: wall-clock seconds, and passes counted in examples; None where they were not counted."""

    seconds: Seconds
    forwards: Count | None = None
    backwards: Count | None = None


class Audit(_Part):
    """The crossed audit: broken examples that were bounded, certified ones that were attacked, and what it found.

    Attributes:
        upper_limit: with no contradiction in n crossings, the 95 % upper limit 3/n of their rate; None without any.
    """

    broken_bounded: Count
    certified_attacked: Count
    contradictions: Count = 0
    upper_limit: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None

    @classmethod
    def tally(cls, *, broken_bounded: int, certified_attacked: int, contradictions: int = 0) -> Self:
        """An audit with its upper limit filled in.

        >>> Audit.tally(broken_bounded=200, certified_attacked=100).upper_limit
        0.01
        """
        return cls(
            broken_bounded=broken_bounded,
            certified_attacked=certified_attacked,
            contradictions=contradictions,
            upper_limit=_rule_of_three(broken_bounded + certified_attacked, contradictions),
        )

    @model_validator(mode="after")
    def _follows(self) -> Self:
        due = _rule_of_three(self.broken_bounded + self.certified_attacked, self.contradictions)
        if (due is None) != (self.upper_limit is None) or abs((due or 0) - (self.upper_limit or 0)) > 1e-9:
            raise ValueError(f"the upper limit must be {due}, three over the number of crossings")
        return self


def _rule_of_three(crossings: int, contradictions: int) -> float | None:
    return None if crossings == 0 or contradictions else min(1.0, 3 / crossings)


class Record(_Part):
    """One defense, scored on one track.

    Attributes:
        hyper: the hyper-parameters the defense was trained with.
        seeds: by what they seed, such as `training` and `attack`.
        effort: budgets of the run that are no part of its track, in work units, such as `complete_nodes`.
        cost: by stage.
        bound_methods: the bound methods that ran, in their order; empty where bounds were not run.
        metrics: see `derive_metrics`.
        notes: sentences for the reader, such as why bounds are missing.
        diagnostics: what the diagnostics found, by diagnostic.
        status: `ok`, or `suspicious` or `invalid` with at least one sentence in `reasons`.
        attack_spread: robust accuracy on a subset under other attack seeds, where that was asked for.
        challenges: those that lowered this record, the first one first.
        outcomes_sha256: of the bytes of outcomes.parquet; filled in by `save` and `attach`.
    """

    required: ClassVar[tuple[str, ...]] = ("clean", "robust", "certified", "undecided")

    schema_version: Literal[1] = SCHEMA_VERSION
    track: TrackRef
    defense: DefenseInfo
    checkpoint_sha256: Sha256
    code_sha256: Sha256 | None = None
    parameters: Count
    hyper: dict[Line, Free] = Field(default_factory=dict)
    seeds: dict[Line, StrictInt] = Field(default_factory=dict)
    effort: dict[Line, Count] = Field(default_factory=dict)
    environment: Environment
    cost: dict[Line, StageCost] = Field(default_factory=dict)
    bound_methods: Annotated[tuple[Name, ...], Field(max_length=20)] = ()
    metrics: dict[MetricName, Metric]
    audit: Audit
    diagnostics: dict[Line, Free] = Field(default_factory=dict)
    notes: Annotated[tuple[Words, ...], Field(max_length=100)] = ()
    status: Literal["ok", "suspicious", "invalid"] = "ok"
    reasons: Annotated[tuple[Words, ...], Field(max_length=100)] = ()
    attack_spread: AttackSpread | None = None
    challenges: Annotated[tuple[Challenge, ...], Field(max_length=100)] = ()
    outcomes_sha256: Sha256 | None = None

    # Bytes, not a frame: records stay comparable, and nobody can change the table under its hash.
    _table: bytes | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if missing := [name for name in self.required if name not in self.metrics]:
            raise ValueError(f"the metric {missing[0]} is missing")
        if self.status == "ok" and self.audit.contradictions:
            raise ValueError("a record whose audit found a contradiction cannot be ok")
        if self.status != "ok" and not self.reasons:
            raise ValueError(f"a record that is {self.status} must give its reasons")
        return self

    @property
    def n(self) -> int:
        """How many examples were evaluated."""
        return self.metrics["clean"].n

    @property
    def true_robust(self) -> tuple[float, float]:
        """Where the true robust accuracy lies: limits that hold both `certified` and `robust`, together at 95 %."""
        certified, robust = (round(self.metrics[name].value * self.n) for name in ("certified", "robust"))
        return sandwich_interval(certified, robust, self.n)

    @property
    def targets(self) -> tuple[str, ...]:
        """The content hashes of the undecided examples, in the table's order: what a challenge can still break.

        Raises:
            RecordError: if this record came without its table.
        """
        outcomes = self.outcomes
        return tuple(outcomes.loc[outcomes["verdict"] == "undecided", "example"].tolist())

    @property
    def outcomes_parquet(self) -> bytes:
        """The outcome table as the bytes of outcomes.parquet.

        Raises:
            RecordError: if this record came without its table.
        """
        if self._table is None:
            raise RecordError(
                f"The record of {self.defense.name} on {self.track.id} has no outcome table attached; "
                "read it with load."
            )
        return self._table

    @property
    def outcomes(self) -> pd.DataFrame:
        """The outcome table, a fresh copy at each access.

        Raises:
            RecordError: if this record came without its table.
        """
        return from_parquet(self.outcomes_parquet)

    def with_table(self, content: bytes) -> Self:
        """A copy that carries the bytes of a checked outcomes.parquet, and their hash."""
        bound = self.model_copy(update={"outcomes_sha256": hashlib.sha256(content).hexdigest()})
        bound._table = content
        return bound

    def to_json(self) -> str:
        """The text of record.json."""
        return self.model_dump_json(indent=2) + "\n"


def parse_record(text: str | bytes, *, name: str = "The record") -> Record:
    """Read the text of a record.json, without its outcome table.

    Raises:
        RecordError: one sentence that says where the text departs from the schema; `name` is what it calls the text.
    """
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise RecordError(f"{name} is not a valid record: {_first_problem(error)}.") from error


def make_record(content: Mapping[str, Any]) -> Record:
    """Build a record from plain values, with one sentence instead of pydantic's report when they do not fit.

    Raises:
        RecordError: if a value is missing, unknown, or outside what the schema allows.
    """
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        raise RecordError(f"The record cannot be built: {_first_problem(error)}.") from error


def _first_problem(error: ValidationError) -> str:
    problems: Sequence[Any] = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(str(step)[:80] for step in problems[0]["loc"])
    what = str(problems[0]["msg"]).removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where + ': ' if where else ''}{what[:1].lower() + what[1:]}{more}"
