"""From an evaluation to a record: what was found, on what, with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from robustboard.bench import environment
from robustboard.bench.answers import StageCost
from robustboard.bench.evaluate import Evaluation
from robustboard.bench.protocol import Track
from robustboard.leaderboard.findings import KEY
from robustboard.leaderboard.record import Audit, DefenseInfo, Record, attach, derive_metrics, make_record


def build_record(
    found: Evaluation,
    *,
    track: Track,
    info: DefenseInfo,
    checkpoint_sha256: str,
    code_sha256: str | None,
    parameters: int,
    training: StageCost | None,
    hyper: Mapping[str, Any],
    seeds: Mapping[str, int],
    device: str,
    threads: int,
) -> Record:
    """The record of an evaluation, with its outcome table attached.

    Args:
        found: the evaluation.
        track: the resolved track.
        info: who was scored.
        checkpoint_sha256: of the weights.
        code_sha256: of a submission's model code.
        parameters: how many numbers the model has.
        training: what a training cost.
        hyper: a training's hyper-parameters.
        seeds: a training's seeds; the protocol's are added.
        device: what the model ran on.
        threads: of the model's process.

    Raises:
        RecordError: if the evaluation contradicts itself.
    """
    commit, dirty = environment.source_commit()
    costs = {**({"train": training} if training else {}), **found.costs}
    record = make_record(
        {
            "track": {"id": track.id, "hash": track.hash, "content": track.frozen()},
            "defense": info,
            "checkpoint_sha256": checkpoint_sha256,
            "code_sha256": code_sha256,
            "parameters": parameters,
            "hyper": dict(hyper),
            "seeds": {
                **seeds,
                "pgd": track.attacks.pgd.seed,
                "autoattack": track.attacks.autoattack.seed,
                "corruptions": track.corruptions.seed,
            },
            "environment": {
                "python": environment.python_version(),
                "torch": torch.__version__,
                "packages": environment.package_versions(),
                "device": device,
                "threads": threads,
                "platform": environment.machine(),
                "commit": commit,
                "dirty": dirty,
            },
            "cost": {stage: dataclasses.asdict(cost) for stage, cost in costs.items()},
            "bound_methods": found.bound_methods,
            "metrics": derive_metrics(found.outcomes, bound_methods=found.bound_methods),
            "audit": Audit.tally(
                broken_bounded=found.audit.broken_bounded,
                certified_attacked=found.audit.certified_attacked,
            ),
            "diagnostics": {
                "autoattack": [dataclasses.asdict(warning) for warning in found.warnings],
                KEY: found.diagnosis.model_dump(mode="json"),
            },
            "status": found.diagnosis.status,
            "reasons": found.diagnosis.reasons,
            "notes": tuple(found.notes),
            "effort": dict(found.effort),
        }
    )
    return attach(record, found.outcomes)
