"""The defenses that can be trained here: the built-in ones, and those that installed packages announce.

A package announces a defense with an entry point in the group `robustboard.defenses`, whose name is the card's name and
whose object is a subclass of `Defense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from robustboard.defenses.adapter import Defense, DefenseCard
from robustboard.defenses.adversarial import FgsmTraining, PgdTraining, Trades
from robustboard.defenses.convex import ConvexTraining
from robustboard.defenses.differential import Differential
from robustboard.defenses.distillation import Distillation
from robustboard.defenses.ibp import CrownIbp, Ibp
from robustboard.defenses.mixtrain import MixTrain
from robustboard.defenses.mtl_ibp import MtlIbp
from robustboard.defenses.rift import Rift
from robustboard.defenses.standard import Standard
from robustboard.errors import DefenseError

GROUP = "robustboard.defenses"
BUILT_IN: tuple[type[Defense[Any]], ...] = (
    Standard,
    FgsmTraining,
    Distillation,
    PgdTraining,
    Ibp,
    MixTrain,
    Trades,
    Differential,
    CrownIbp,
    Rift,
    MtlIbp,
    ConvexTraining,
)


def names() -> list[str]:
    """The names of all defenses, the built-in ones first, in the order of their years.

    Raises:
        DefenseError: if two defenses have one name.

    >>> names()[:2]
    ['standard', 'fgsm-at']
    """
    return list(_sources())


def create(name: str, overrides: Mapping[str, object] | None = None) -> Defense[Any]:
    """One defense, ready to `fit`.

    Args:
        name: one of `names()`.
        overrides: hyper-parameters by name, as text or typed.

    Raises:
        DefenseError: if the name is unknown, its package cannot be loaded, or an override is not a hyper-parameter.
    """
    sources = _sources()
    if name not in sources:
        raise DefenseError(f"The defense {name!r} is unknown; choose from {', '.join(sources)}.")
    return _load(name, sources[name])(overrides)


def cards() -> list[DefenseCard]:
    """What every defense says about itself, in the order of `names()`.

    Raises:
        DefenseError: as for `create`.
    """
    return [_load(name, source).card for name, source in _sources().items()]


def _sources() -> dict[str, type[Defense[Any]] | EntryPoint]:
    sources: dict[str, type[Defense[Any]] | EntryPoint] = {}
    announced = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value))
    found: list[tuple[str, type[Defense[Any]] | EntryPoint]] = [(kind.card.name, kind) for kind in BUILT_IN]
    found += [(entry.name, entry) for entry in announced]
    for name, source in found:
        if name in sources:
            raise DefenseError(
                f"Two defenses are called {name!r}: {_describe(sources[name])} and {_describe(source)}; "
                "remove one of the packages or rename its entry point."
            )
        sources[name] = source
    return sources


def _load(name: str, source: type[Defense[Any]] | EntryPoint) -> type[Defense[Any]]:
    if isinstance(source, type):
        return source
    try:
        loaded = source.load()
    except Exception as error:  # whatever another package's import raises becomes one sentence
        raise DefenseError(
            f"The defense {name!r} cannot be loaded from {_describe(source)}: {type(error).__name__}: {error}."
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Defense)):
        raise DefenseError(f"The defense {name!r} from {_describe(source)} is not a subclass of Defense.")
    if loaded.card.name != name:
        raise DefenseError(
            f"The entry point {name!r} leads to a defense called {loaded.card.name!r}; both names must be the same."
        )
    return loaded


def _describe(source: type[Defense[Any]] | EntryPoint) -> str:
    if isinstance(source, type):
        return f"{source.__module__}:{source.__qualname__}"
    package = f" of the package {source.dist.name}" if source.dist is not None else ""
    return f"{source.value}{package}"
