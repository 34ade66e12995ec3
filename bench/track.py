"""A track: one frozen protocol under which defenses are compared, as a model of its TOML.

A track that changes its meaning is another track, so everything that can move a verdict is in here and under its hash:
data, radius, attacks, bounds, corruptions, batch size, and what a defense may train on.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainSerializer,
)

from robustboard.attacks.threat import ThreatModel
from robustboard.bench import corruptions, datasets
from robustboard.bench.datasets import ARRAYS, NpzSource
from robustboard.errors import TrackError

_ID = re.compile(r"[a-z0-9][a-z0-9.-]*@[1-9][0-9]*")
_SHA256 = re.compile("[0-9a-f]{64}")


def _id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError('a lower-case name and a version such as "mnist-linf@1"')
    return value


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        raise ValueError("64 hexadecimal digits")
    return value


def _fraction(value: object) -> Fraction:
    demand = 'a positive fraction in quotes such as "1/4"'
    if not isinstance(value, str | Fraction):
        raise ValueError(demand)
    try:
        number = Fraction(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(demand) from error
    if number <= 0:
        raise ValueError(demand)
    return number


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _count_or_all(value: object) -> object:
    if value != "all" and not _positive(value):
        raise ValueError('a whole number from 1, or "all"')
    return value


def _size(value: object) -> object:
    if _positive(value):
        return value
    demand = 'a whole number from 1, or a fraction below one such as "1/10"'
    if not isinstance(value, str | Fraction):
        raise ValueError(demand)
    try:
        share = Fraction(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(demand) from error
    if not 0 < share < 1:
        raise ValueError(demand)
    return share


def _setting(value: object) -> object:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("true or false, a finite number, or text")
    return value


def _source(value: object) -> object:
    known = (*datasets.names(), ARRAYS)
    if not isinstance(value, NpzSource) and value not in known:
        raise ValueError(f"one of {', '.join(known)}, or {{npz = path}}")
    return value


def _known_corruptions(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in corruptions.NAMES]
    if unknown:
        raise ValueError(f"a list out of {', '.join(corruptions.NAMES)}")
    return names


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a list without repetition")
    return values


Share = Annotated[InstanceOf[Fraction], BeforeValidator(_fraction), PlainSerializer(str)]
Size = Annotated[
    int | InstanceOf[Fraction],
    BeforeValidator(_size),
    PlainSerializer(lambda size: size if isinstance(size, int) else str(size)),
]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Severity = Annotated[int, Field(ge=1, le=5)]
Setting = Annotated[bool | int | float | str, BeforeValidator(_setting)]
CountOrAll = Annotated[int | Literal["all"], BeforeValidator(_count_or_all)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Pgd(_Frozen):
    """The first attack.

    Attributes:
        step: the step size as a fraction of eps.
        losses: the losses to ascend, each from its own random starts.
    """

    steps: Count
    restarts: Count
    step: Share
    losses: Annotated[tuple[Literal["ce", "margin", "dlr"], ...], Field(min_length=1), AfterValidator(_distinct)]
    seed: Seed

    def losses_for(self, classes: int) -> tuple[str, ...]:
        """The losses that are defined for K classes: the difference-of-logits ratio needs three.

        Source: Croce and Hein, "Reliable evaluation of adversarial robustness" (ICML 2020), section 4.
        """
        return tuple(loss for loss in self.losses if loss != "dlr" or classes >= 3)


class Autoattack(_Frozen):
    """The reference attack, with the authors' own settings; it runs in the track's canonical batches."""

    version: Literal["standard"]
    seed: Seed


class Attacks(_Frozen):
    """What is run against a defense."""

    pgd: Pgd
    autoattack: Autoattack


class BoundSettings(_Frozen):
    """Verified bounds, in the order they are tried, and their work budgets."""

    methods: Annotated[tuple[Literal["ibp", "crown-ibp", "crown", "alpha-crown"], ...], AfterValidator(_distinct)]
    alpha_iterations: Count
    memory_mebibytes: Count


class AuditSettings(_Frozen):
    """The crossed audit: which certified examples are attacked in full.

    Attributes:
        certified_sample: how many, drawn by content hash.
        smallest_margins: how many more, those of the smallest certified margin.
    """

    certified_sample: Annotated[int, Field(ge=0)]
    smallest_margins: Annotated[int, Field(ge=0)]


class CorruptionSuite(_Frozen):
    """Common corruptions.

    Attributes:
        set: what the set is called; `cifar10-c-style` is generated by `bench/corruptions.py`.
    """

    set: Literal["cifar10-c-style"]
    names: Annotated[tuple[str, ...], AfterValidator(_known_corruptions), AfterValidator(_distinct)]
    severities: Annotated[tuple[Severity, ...], Field(min_length=1), AfterValidator(_distinct)]
    seed: Seed


class Training(_Frozen):
    """What an adapter trains on.

    Attributes:
        train: how many images, or `"all"` that are left.
        validation: how many training images are held out, or which fraction of them.
        seed: which ones.
    """

    train: CountOrAll
    validation: Size
    seed: Seed


class Track(_Frozen):
    """One protocol.

    Attributes:
        id: name and version, such as `mnist-linf@1`.
        dataset: a data set by name, or the user's npz file.
        threat: norm and radius.
        n: how many examples are judged (those of smallest content hash), or `"all"`.
        images_sha256: the sha256 of the judged examples with their labels; None until they were seen.
        batch_size: the canonical evaluation batch.
        hyper: hyper-parameters by defense that differ from the defense's own defaults.
    """

    id: Annotated[str, AfterValidator(_id)]
    title: Annotated[str, Field(min_length=1)]
    dataset: Annotated[
        str | InstanceOf[NpzSource],
        BeforeValidator(_source),
        PlainSerializer(lambda source: source if isinstance(source, str) else ARRAYS),
    ]
    threat: Annotated[
        InstanceOf[ThreatModel], PlainSerializer(lambda threat: {"norm": threat.norm, "eps": threat.text})
    ]
    n: CountOrAll
    images_sha256: Annotated[str, AfterValidator(_sha256)] | None
    batch_size: Count
    attacks: Attacks
    bounds: BoundSettings
    audit: AuditSettings
    corruptions: CorruptionSuite
    training: Training
    hyper: dict[str, dict[str, Setting]]

    def frozen(self) -> dict[str, Any]:
        """The whole content as plain JSON values, for records; the place of a file is not part of it."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """The sha256 of the canonical JSON of `frozen()`: sorted keys, no spaces, UTF-8."""
        text = json.dumps(self.frozen(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def limited(self, n: int) -> Track:
        """The same protocol on the first `n` examples, under an id of its own: `mnist-linf-n50@1`.

        Raises:
            TrackError: if n is not positive.
        """
        if n < 1:
            raise TrackError(f"The number of examples must be at least 1, not {n}.")
        if self.n != "all" and n >= self.n:
            return self
        name, _, version = self.id.partition("@")
        return self.model_copy(update={"id": f"{name}-n{n}@{version}", "n": n, "images_sha256": None})
