"""RobustBoard: what is left of a defense's claims after attacks, bounds and corruptions.

    import robustboard

    record = robustboard.score(model, track="digits-linf@1")
    record.metrics["robust"], record.outcomes

The names below are the public Python API; they are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustboard.attacks.threat import ThreatModel
    from robustboard.bench.protocol import Track, load_track, track_from, track_ids
    from robustboard.bench.score import score
    from robustboard.defenses.conformance import check_defense
    from robustboard.leaderboard.record import Record, load
    from robustboard.leaderboard.site import build_site

__all__ = [
    "Record",
    "ThreatModel",
    "Track",
    "build_site",
    "check_defense",
    "load",
    "load_track",
    "score",
    "track_from",
    "track_ids",
]

_HOMES = {
    "Record": "leaderboard.record",
    "ThreatModel": "attacks.threat",
    "Track": "bench.protocol",
    "build_site": "leaderboard.site",
    "check_defense": "defenses.conformance",
    "load": "leaderboard.record",
    "load_track": "bench.protocol",
    "score": "bench.score",
    "track_from": "bench.protocol",
    "track_ids": "bench.protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'robustboard' has no attribute {name!r}")
    return getattr(import_module(f"robustboard.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
