"""Results of claims: one JSON file an experiment, committed in `results/` beside the claims.

A file holds the measurements, the rule as it was when they were made, and what they were made with. The verdict is not
stored: it follows from the measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic
import torch

from robustboard.bench import environment
from robustboard.bench.claims.claim import Measurement, PaperClaim
from robustboard.errors import RecordError, first_line
from robustboard.files import replace_file

_LARGEST = 1 << 20


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Result:
    """What one run of an experiment found.

    Attributes:
        claim: the claim's id.
        seed: the training seed.
        measurements: by the keys that the claim's rule reads.
        rule: the rule when this was measured.
        seconds: how long the experiment took; an experiment that found kept trainings took less than a fresh one.
        made_with: python, packages, device, threads, platform, commit.
    """

    claim: str
    seed: int
    measurements: dict[str, Measurement]
    rule: str
    seconds: float
    made_with: dict[str, Any]


_RESULT = pydantic.TypeAdapter(Result)


def result_of(
    claim: PaperClaim,
    measurements: Mapping[str, Measurement],
    *,
    seed: int,
    seconds: float,
    device: torch.device,
    threads: int,
) -> Result:
    """A result, with what it was made with."""
    commit, dirty = environment.source_commit()
    made_with = {
        "command": f"robustboard claims --verify {claim.id} --seed {seed} --threads {threads}",
        "python": environment.python_version(),
        "torch": torch.__version__,
        "packages": environment.package_versions(),
        "platform": environment.machine(),
        "device": str(device),
        "threads": threads,
        "commit": commit,
        "dirty": dirty,
    }
    return Result(claim.id, seed, dict(measurements), claim.rule, round(seconds, 1), made_with)


def save_result(result: Result, folder: Path) -> Path:
    """Write `<claim>.json` into `folder`, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    path = folder / f"{result.claim}.json"
    content = _RESULT.dump_json(result, indent=1) + b"\n"
    replace_file(path, lambda file: file.write(content))
    return path


def load_result(path: Path) -> Result:
    """Read one result.

    Raises:
        RecordError: if the file is missing or malformed; one sentence.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise RecordError(f"The result {path} is larger than any result is.")
        return _RESULT.validate_json(path.read_bytes())
    except OSError as error:
        raise RecordError(f"The result {path} cannot be read: {error.strerror or error}.") from error
    except (pydantic.ValidationError, ValueError) as error:
        raise RecordError(f"The result {path} is malformed: {first_line(error)}.") from error


def committed(claim: PaperClaim) -> Result | None:
    """The committed result of a claim; None if it was never measured.

    Raises:
        RecordError: as `load_result`.
    """
    with resources.as_file(resources.files("robustboard.bench.claims") / "results" / f"{claim.id}.json") as path:
        return load_result(path) if path.is_file() else None


def as_json(claim: PaperClaim, result: Result | None) -> dict[str, Any]:
    """A claim beside its result, in plain values."""
    return {
        "id": claim.id,
        "defense": claim.defense,
        "statement": claim.statement,
        "paper": [dataclasses.asdict(one) for one in claim.paper],
        "data": claim.data,
        "rule": claim.rule,
        "note": claim.note,
        "verdict": None if result is None else claim.judge(result.measurements),
        "result": None if result is None else _RESULT.dump_python(result, mode="json"),
    }
