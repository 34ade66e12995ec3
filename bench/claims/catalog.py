"""All claims, in the order of the methods."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from robustboard.bench.claims.claim import PaperClaim
from robustboard.errors import DefenseError

METHODS = ("convex", "distillation", "differential", "mixtrain", "rift")


def all_claims() -> tuple[PaperClaim, ...]:
    """Every claim of every method."""
    found: list[PaperClaim] = []
    for method in METHODS:
        found += importlib.import_module(f"robustboard.bench.claims.{method}").CLAIMS
    return tuple(found)


def chosen(ids: Sequence[str]) -> tuple[PaperClaim, ...]:
    """The claims with these ids, or of these methods, in the order of `all_claims`; none named means all.

    Raises:
        DefenseError: for a word that is neither.
    """
    claims = all_claims()
    known = {claim.id for claim in claims} | {claim.defense for claim in claims}
    for word in ids:
        if word not in known:
            raise DefenseError(
                f"There is no claim {word!r}; choose a method ({', '.join(METHODS)}) or one of "
                f"{', '.join(claim.id for claim in claims)}."
            )
    return tuple(claim for claim in claims if not ids or claim.id in ids or claim.defense in ids)
