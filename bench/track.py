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
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
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


def _severity(value: object) -> object:
    if value != "fixed" and not (_positive(value) and isinstance(value, int) and value <= 5):
        raise ValueError('a severity from 1 to 5, or "fixed"')
    return value


def _severities(value: object) -> object:
    listed = value if isinstance(value, tuple) else ()
    possible = bool(listed) and all(_positive(one) and one <= 5 for one in listed)
    if value != "fixed" and not (possible and len(set(listed)) == len(listed)):
        raise ValueError('a list without repetition of severities less than or equal to 5, or "fixed"')
    return value


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """For pydantic: the values, if none is there twice."""
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
Severities = Annotated[tuple[int, ...] | Literal["fixed"], BeforeValidator(_severities)]
SeverityOrFixed = Annotated[int | Literal["fixed"], BeforeValidator(_severity)]
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
    losses: Annotated[tuple[Literal["ce", "margin", "dlr"], ...], Field(min_length=1), AfterValidator(distinct)]
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
    """What is run against a defense.

    Attributes:
        ensemble: what follows PGD: the `"standard"` attacks, which are as strong as AutoAttack, or the `"fast"` one.
    """

    pgd: Pgd
    autoattack: Autoattack
    ensemble: Literal["standard", "fast"] = "standard"

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As for the corruptions: the hashes of earlier tracks stay what they are.
        content: dict[str, Any] = serialize(self)
        if self.ensemble == "standard":
            del content["ensemble"]
        return content


class BoundSettings(_Frozen):
    """Verified bounds, in the order they are tried, and their work budgets."""

    methods: Annotated[tuple[Literal["ibp", "crown-ibp", "crown", "alpha-crown"], ...], AfterValidator(distinct)]
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


class RobustCorruptions(_Frozen):
    """Which corrupted images are attacked, by the track's PGD in a ball around the corrupted image.

    Attributes:
        examples: how many of the track's examples, drawn by content hash.
        names: corruptions out of those of the suite.
        severity: 1 to 5, or `"fixed"` for the benchmark's one.
        seed: of the draw.
    """

    examples: Count
    names: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(distinct)]
    severity: SeverityOrFixed
    seed: Seed


class CorruptionSuite(_Frozen):
    """Common corruptions.

    Attributes:
        set: what the set is called; those that end in `-style` are made by `bench/corruptions.py`, the others are read
            from the official files.
        severities: a list, or `"fixed"`: each corruption at the one severity that its benchmark gives it.
        robust: which corrupted images are attacked too; None for none.
    """

    set: corruptions.SetName
    names: Annotated[tuple[str, ...], AfterValidator(distinct)]
    severities: Severities
    seed: Seed
    robust: RobustCorruptions | None = None

    @field_validator("names")
    @classmethod
    def _known(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = corruptions.SETS[info.data.get("set", "cifar10-c-style")].names
        if not set(names) <= set(known):
            raise ValueError(f"a list out of {', '.join(known)}")
        return names

    @field_validator("severities")
    @classmethod
    def _possible(
        cls, severities: tuple[int, ...] | Literal["fixed"], info: ValidationInfo
    ) -> tuple[int, ...] | Literal["fixed"]:
        family = corruptions.SETS[info.data.get("set", "cifar10-c-style")]
        if severities == "fixed" and not family.fixed:
            raise ValueError(f"a list of severities, since the set {family.name} fixes none")
        for name, severity in family.conditions(info.data.get("names", ()), severities):
            if not family.allows(name, severity):
                raise ValueError(f'severities that {name} has, or "fixed"')
        return severities

    @field_validator("robust")
    @classmethod
    def _attackable(cls, robust: RobustCorruptions | None, info: ValidationInfo) -> RobustCorruptions | None:
        if robust is None or not {"set", "names", "severities"} <= info.data.keys():
            return robust
        family, names, severities = (corruptions.SETS[info.data["set"]], info.data["names"], info.data["severities"])
        judged = family.conditions(names, severities)
        if not set(_robust_conditions(family, robust)) <= set(judged):
            raise ValueError("a table whose names and severity are among those of the suite")
        return robust

    @property
    def conditions(self) -> tuple[tuple[str, int], ...]:
        """The (corruption, severity) pairs under which every example is judged."""
        return corruptions.SETS[self.set].conditions(self.names, self.severities)

    @property
    def attacked(self) -> tuple[tuple[str, int], ...]:
        """The (corruption, severity) pairs under which some examples are attacked."""
        return () if self.robust is None else _robust_conditions(corruptions.SETS[self.set], self.robust)

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The first tracks had no such table, and their hashes stay what they are.
        content: dict[str, Any] = serialize(self)
        if self.robust is None:
            del content["robust"]
        return content


def _robust_conditions(family: corruptions.CorruptionSet, robust: RobustCorruptions) -> tuple[tuple[str, int], ...]:
    return family.conditions(robust.names, "fixed" if robust.severity == "fixed" else (robust.severity,))


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
        return self.model_copy(update={"id": self._named(f"n{n}"), "n": n, "images_sha256": None})

    def hurried(self) -> Track:
        """The fast mode: one run of PGD and the fast attack, no bounds of auto_LiRPA's, as `mnist-linf-fast@1`.

        What it finds is compared with nothing but itself: it is another protocol on the same examples.
        """
        if self.attacks.ensemble == "fast":
            return self
        pgd = self.attacks.pgd.model_copy(update={"restarts": 1, "losses": ("margin",)})
        return self.model_copy(
            update={
                "id": self._named("fast"),
                "title": f"{self.title}, fast mode",
                "attacks": self.attacks.model_copy(update={"pgd": pgd, "ensemble": "fast"}),
                "bounds": self.bounds.model_copy(update={"methods": ()}),
            }
        )

    def _named(self, addition: str) -> str:
        name, _, version = self.id.partition("@")
        return f"{name}-{addition}@{version}"
