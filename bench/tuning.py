"""Hyper-parameters are compared on the validation split: this trains one setting and says what became of it there.

    python -m robustboard.bench.tuning pgd-at --track mnist-linf-0.3@1 --set epochs=2 --set ramp=0.25

No test image is read into a decision: `training_data` holds none. docs/tuning.md is what was found with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from robustboard.attacks.keyed import content_hash
from robustboard.attacks.pgd import pgd
from robustboard.attacks.threat import ThreatModel
from robustboard.bench.datasets import data_folders, load_dataset
from robustboard.bench.protocol import load_track, training_data
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, TrainingData
from robustboard.defenses.training import accuracy
from robustboard.errors import RobustBoardError
from robustboard.leaderboard.statistics import wilson

_BATCH = 500


@dataclass(frozen=True)
class Validated:
    """What one setting reached on the validation split.

    Attributes:
        clean: the clean accuracy, on the whole split.
        clean_n: its size.
        robust: the share that is correct after PGD: 40 steps of a tenth of the radius, two starts for each loss.
        robust_n: how many images were attacked.
        seconds: processor time of the training.
    """

    clean: float
    clean_n: int
    robust: float
    robust_n: int
    seconds: float

    def text(self) -> str:
        """One line for people.

        >>> Validated(0.98, 6000, 0.9, 1000, 61.2).text()
        'clean 98.0 % [97.6, 98.3] (n = 6000), robust 90.0 % [88.0, 91.7] (n = 1000), 61 s'
        """
        parts = []
        for name, value, n in (("clean", self.clean, self.clean_n), ("robust", self.robust, self.robust_n)):
            low, high = wilson(round(value * n), n)
            parts.append(f"{name} {100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n = {n})")
        return f"{', '.join(parts)}, {self.seconds:.0f} s"


def validate(
    defense: str,
    data: TrainingData,
    threat: ThreatModel,
    settings: Mapping[str, object],
    *,
    seed: int = 0,
    n: int = 1000,
    checkpoints: CheckpointStore | None = None,
) -> Validated:
    """Train one setting and judge it on the validation split.

    Args:
        defense: a name of the registry.
        data: what to train on, and the split to judge on.
        threat: what to train for and to attack with.
        settings: hyper-parameters by name.
        seed: of the training and the attack.
        n: attack only the first n validation images.
        checkpoints: where states are kept.

    Raises:
        DefenseError: if the track does not suit the method, or a setting is wrong.
    """
    began = time.process_time()
    model = registry.create(defense, settings).fit(
        data,
        threat,
        seed=seed,
        device=torch.device("cpu"),
        progress=NoProgress(),
        checkpoints=checkpoints or CheckpointStore(),
    )
    seconds = time.process_time() - began
    images, labels = data.validation.images[:n], data.validation.labels[:n]
    kept = 0
    for part, wanted in zip(torch.split(images, _BATCH), torch.split(labels, _BATCH), strict=True):
        found = pgd(
            model,
            part,
            wanted,
            threat=threat,
            keys=[content_hash(image.numpy()) for image in part],
            seed=seed,
            steps=40,
            restarts=2,
            step_size=threat.radius / 10,
        )
        with torch.no_grad():
            kept += int((model(found).argmax(dim=1) == wanted).sum())
    return Validated(accuracy(model, data.validation), len(data.validation), kept / len(labels), len(labels), seconds)


def main(
    defense: Annotated[str, typer.Argument(help="A name from `robustboard defenses`.")],
    *,
    track: Annotated[str, typer.Option(help="An id from `robustboard tracks`, or the path of your own TOML.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="A hyper-parameter; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The training seed.")] = 0,
    n: Annotated[int, typer.Option(min=1, help="Attack only the first N validation images.")] = 1000,
    threads: Annotated[int, typer.Option(min=1, help="Threads to train with.")] = 1,
    data_dir: Annotated[list[Path] | None, typer.Option(help="A folder to look for data in; may be repeated.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Where the training's state is kept.")] = None,
) -> None:
    """Train one setting of a defense and judge it on the validation split."""
    torch.set_num_threads(threads)
    chosen: dict[str, object] = {name: value for name, _, value in (word.partition("=") for word in settings or [])}
    try:
        loaded = load_track(track)
        data = training_data(loaded, load_dataset(loaded.dataset, data_dirs=data_folders(data_dir or ())))
        found = validate(defense, data, loaded.threat, chosen, seed=seed, n=n, checkpoints=CheckpointStore(checkpoints))
    except RobustBoardError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    words = " ".join(settings or [])
    typer.echo(f"{defense} {track} {words}".rstrip() + f": {found.text()}")


if __name__ == "__main__":
    typer.run(main)
