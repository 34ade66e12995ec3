"""What the diagnostics of masked gradients found, as it stands in a record under `diagnostics["gradients"]`.

Every finding carries its own explanation, threshold and evidence, so that a page can be printed from the record alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictBool, StrictFloat, StrictInt, ValidationError

from robustboard.leaderboard.schema import Line, Words

KEY: Final = "gradients"

Verdict = Literal["ok", "suspicious", "invalid"]
Evidence = dict[Line, StrictInt | StrictFloat | Line]

_WORST_FIRST: Final[tuple[Verdict, ...]] = ("invalid", "suspicious")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Finding(_Part):
    """One diagnostic's result.

    Attributes:
        name: the diagnostic.
        looks_for: what it looks for, in plain words.
        threshold: when it speaks, as declared before any measurement.
        verdict: `not run` where it could not be applied.
        decides: whether it sets the record's status; a finding that does not is a flag.
        sentence: what was found, or why it was not run.
        evidence: the measured numbers by what they are.
    """

    name: Line
    looks_for: Words
    threshold: Words
    verdict: Verdict | Literal["not run"]
    decides: StrictBool
    sentence: Words
    evidence: Evidence = Field(default_factory=dict)

    @property
    def speaks(self) -> bool:
        """Whether something was found."""
        return self.verdict in ("suspicious", "invalid")


class Diagnosis(_Part):
    """All findings on one model.

    Attributes:
        version: of the table of thresholds.
        examples: how many correctly classified examples were looked at.
    """

    version: Annotated[StrictInt, Field(ge=1)]
    examples: Annotated[StrictInt, Field(ge=0)]
    findings: Annotated[tuple[Finding, ...], Field(max_length=100)]

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings, flags included."""
        return worst(finding.verdict for finding in self.findings)

    @property
    def status(self) -> Verdict:
        """The worst of the findings that decide: what the record's status is."""
        return worst(finding.verdict for finding in self.findings if finding.decides)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The sentences of the deciding findings that are as bad as the status; none when it is ok."""
        status = self.status
        return tuple(one.sentence for one in self.findings if one.decides and one.verdict == status and status != "ok")

    @property
    def flags(self) -> tuple[str, ...]:
        """The sentences of the findings that speak and do not decide."""
        return tuple(one.sentence for one in self.findings if one.speaks and not one.decides)

    @property
    def flagged(self) -> tuple[str, ...]:
        """The names of the findings that speak and do not decide."""
        return tuple(one.name for one in self.findings if one.speaks and not one.decides)


def worst(verdicts: Iterable[str]) -> Verdict:
    """The worst of some verdicts; what was not run is no verdict.

    >>> worst(["ok", "not run", "suspicious"])
    'suspicious'
    """
    found = set(verdicts)
    return next((verdict for verdict in _WORST_FIRST if verdict in found), "ok")


def read_diagnosis(diagnostics: Mapping[str, JsonValue]) -> Diagnosis | None:
    """The diagnosis of a record, or None where there is none that can be read."""
    try:
        return Diagnosis.model_validate(diagnostics[KEY], strict=False) if KEY in diagnostics else None
    except ValidationError:
        return None
