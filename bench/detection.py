"""How well the diagnostics tell masked gradients from honest ones: detection and false alarms on a panel of models.

The panel is a standard network behind every mask of `robustboard.bench.masks`, a distilled network, and the honest
baselines, all trained on one track. A mask counts as detected only when the diagnostic speaks that is meant for it; an
honest model counts as a false alarm when any diagnostic speaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from robustboard.bench.datasets import data_folders, load_dataset
from robustboard.bench.diagnostics import EXAMPLES, VERSION
from robustboard.bench.evaluate import evaluate
from robustboard.bench.masks import MASKS
from robustboard.bench.protocol import Track, load_track, resolve, select, training_data
from robustboard.bench.session import LocalSession
from robustboard.bench.surrogates import Surrogates, surrogates_of
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress, TrainingData
from robustboard.leaderboard.findings import Diagnosis
from robustboard.leaderboard.statistics import wilson

DISTILLED: Final = "distillation"
HONEST: Final[tuple[str, ...]] = ("standard", "fgsm-at", "pgd-at", "trades", "ibp", "crown-ibp", "mtl-ibp")


@dataclass(frozen=True)
class Case:
    """One model of the panel.

    Attributes:
        name: of the mask or the defense.
        seed: of its training.
        seen_by: the diagnostic that must speak; None for an honest model.
        diagnosis: what was found.
    """

    name: str
    seed: int
    seen_by: str | None
    diagnosis: Diagnosis

    @property
    def spoke(self) -> tuple[str, ...]:
        """The diagnostics that spoke."""
        return tuple(one.name for one in self.diagnosis.findings if one.speaks)

    @property
    def right(self) -> bool:
        """Whether a mask was seen for the right reason, or nothing was seen on an honest model."""
        return not self.spoke if self.seen_by is None else self.seen_by in self.spoke


@dataclass(frozen=True)
class Rate:
    """A share of the panel's models with its 95 % Wilson interval."""

    count: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The limits of the share."""
        return wilson(self.count, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.n} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Panel:
    """What the diagnostics said of every model."""

    track: str
    cases: tuple[Case, ...]

    @property
    def detection(self) -> Rate:
        """Masked models that were seen for the right reason."""
        masked = [case for case in self.cases if case.seen_by is not None]
        return Rate(sum(case.right for case in masked), len(masked))

    @property
    def false_alarms(self) -> Rate:
        """Honest models on which any diagnostic spoke."""
        honest = [case for case in self.cases if case.seen_by is None]
        return Rate(sum(not case.right for case in honest), len(honest))

    def as_json(self) -> dict[str, object]:
        """Plain values: the rates with their intervals, and every case."""
        return {
            "track": self.track,
            "version": VERSION,
            **{
                name: {"count": rate.count, "n": rate.n, "low": rate.interval[0], "high": rate.interval[1]}
                for name, rate in (("detection", self.detection), ("false_alarms", self.false_alarms))
            },
            "cases": [
                {
                    "name": case.name,
                    "seed": case.seed,
                    "examples": case.diagnosis.examples,
                    "seen_by": case.seen_by,
                    "spoke": list(case.spoke),
                    "status": case.diagnosis.status,
                    "right": case.right,
                }
                for case in self.cases
            ],
        }


def run_panel(
    track_id: str,
    *,
    seeds: Sequence[int],
    runs: Path,
    data_dirs: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Panel:
    """Train the panel's networks and diagnose every model.

    Bounds and corruptions are left out of the evaluation, which the diagnostics do not read; the attacks are the
    track's, on its first examples. The models run in this process: all of their code is this project's.

    Args:
        track_id: an id, or the path of a TOML.
        seeds: of the trainings; the whole panel is made once for each.
        runs: where trainings are kept and continued.
        data_dirs: folders to look for data in.
        progress: told of every model.

    Raises:
        RobustBoardError: one sentence, such as a track without training images.
    """
    progress = progress or NoProgress()
    track = load_track(track_id)
    dataset = load_dataset(track.dataset, data_dirs=data_folders(tuple(data_dirs)))
    data = training_data(track, dataset)
    folder = runs / track.id
    surrogates = surrogates_of(data, track.threat, folder=folder / "surrogates")
    short = _attacks_only(track.limited(2 * EXAMPLES))
    short = resolve(short, dataset)
    examples = select(short, dataset)

    def diagnosed(model: nn.Module, found: Surrogates) -> Diagnosis:
        session = LocalSession(model, torch.device("cpu"))
        return evaluate(session, short, examples, surrogates=found).diagnosis

    suited = [name for name in (*HONEST, DISTILLED) if registry.create(name).unsuited(data, track.threat) is None]
    progress.begin("panel", len(seeds) * (len(suited) + len(MASKS)))
    cases = []
    for seed in seeds:
        for name, seen_by, model in _models(suited, track, data, seed=seed, folder=folder):
            cases.append(Case(name, seed, seen_by, diagnosed(model, lambda: surrogates)))
            progress.advance()
    return Panel(track.id, tuple(cases))


def show(panel: Panel, console: Console) -> None:
    """Print every model with what spoke, and the two rates with their 95 % intervals."""
    model, must = Column("model", no_wrap=True), Column("must be seen by", no_wrap=True)
    spoke = Column("spoke", overflow="fold")
    table = Table(model, "seed", "n", must, spoke, "status", box=None, header_style="bold", pad_edge=False)
    for case in panel.cases:
        words = case.seen_by or "nothing", ", ".join(case.spoke) or "nothing"
        table.add_row(case.name, str(case.seed), str(case.diagnosis.examples), *words, case.diagnosis.status)
    console.print(table)
    console.print(f"Detected for the right reason: {panel.detection}", markup=False, highlight=False)
    console.print(f"False alarms: {panel.false_alarms}", markup=False, highlight=False)


def _models(
    names: Sequence[str], track: Track, data: TrainingData, *, seed: int, folder: Path
) -> Iterator[tuple[str, str | None, nn.Module]]:
    """Every model of the panel with its name and the diagnostic that is meant for it."""
    for name in names:
        model = registry.create(name, track.hyper.get(name, {})).fit(
            data,
            track.threat,
            seed=seed,
            device=torch.device("cpu"),
            progress=NoProgress(),
            checkpoints=CheckpointStore(folder / f"{name}-seed-{seed}"),
        )
        yield name, "saturated-softmax" if name == DISTILLED else None, model
        if name == "standard":
            for kind, mask in MASKS.items():
                yield kind, mask.seen_by, mask.wrap(model)


def _attacks_only(track: Track) -> Track:
    return track.model_copy(
        update={
            "bounds": track.bounds.model_copy(update={"methods": ()}),
            "corruptions": track.corruptions.model_copy(update={"names": ()}),
        }
    )
