"""What may be added to a record beside its verdicts: the spread over attack seeds, and challenges that lowered it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StringConstraints, model_validator

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[StrictInt, Field(ge=0)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]


class _Addendum(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AttackSpread(_Addendum):
    """Robust accuracy on one subset of the examples under several seeds of the attacks.

    The verdicts rest on the first seed, the protocol's, alone. An example that only another seed breaks is truly
    broken all the same, so it is counted here and its image is kept as a challenge.

    Attributes:
        n: how many examples the subset has, drawn by content hash from all that were judged.
        seeds: what is added to the protocol's attack seeds, 0 first.
        values: the robust accuracy on the subset, by seed; breaks by complete verification alone do not count.
        min, max, sd: of the values; the standard deviation is that of a sample.
        would_break: how many undecided examples at least one other seed broke.
    """

    n: Annotated[StrictInt, Field(ge=1)]
    seeds: Annotated[tuple[Count, ...], Field(min_length=2, max_length=100)]
    values: Annotated[tuple[Share, ...], Field(min_length=2, max_length=100)]
    min: Share
    max: Share
    sd: Share
    would_break: Count

    @classmethod
    def tally(cls, held: Sequence[int], *, n: int, seeds: Sequence[int], would_break: int) -> Self:
        """The spread of counts of examples that held, one a seed.

        >>> AttackSpread.tally([90, 89, 89], n=100, seeds=[0, 1, 2], would_break=2).sd
        0.005773502691896263
        """
        values = tuple(count / n for count in held)
        return cls(
            n=n,
            seeds=tuple(seeds),
            values=values,
            min=min(values),
            max=max(values),
            sd=statistics.stdev(values),
            would_break=would_break,
        )

    @model_validator(mode="after")
    def _follows(self) -> Self:
        if len(self.seeds) != len(self.values) or self.seeds[0] != 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("the seeds must be distinct, begin with 0, and be as many as the values")
        due = (min(self.values), max(self.values), statistics.stdev(self.values))
        given = (self.min, self.max, self.sd)
        if not all(math.isclose(one, other, abs_tol=1e-9) for one, other in zip(due, given, strict=True)):
            raise ValueError("min, max and sd must be those of the values")
        return self


class Challenge(_Addendum):
    """Somebody else's adversarial examples, checked against a record that they lowered.

    Attributes:
        file_sha256: of the npz file.
        given: how many images it holds.
        held: how many of them are allowed perturbations of correctly classified examples that change the class.
        lowered: how many examples they broke that were undecided until then.
        replaces: the sha256 of the outcome table before.
    """

    file_sha256: Sha256
    given: Count
    held: Count
    lowered: Annotated[StrictInt, Field(ge=1)]
    replaces: Sha256

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lowered <= self.held <= self.given:
            raise ValueError("of the given examples at most all can hold, and of those at most all can lower")
        return self
