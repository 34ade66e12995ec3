"""Where claims are measured: data, trained networks and records that several experiments share.

Trainings and records are kept in a folder, so that an experiment which was killed continues, and so that the same
network under the paper's measure and under the protocol is trained once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from robustboard.attacks.threat import ThreatModel
from robustboard.bench.datasets import Dataset, data_folders, load_dataset
from robustboard.bench.protocol import Track, load_track, select, training_data
from robustboard.bench.request import Request
from robustboard.bench.score import score_defense
from robustboard.defenses import registry
from robustboard.defenses.adapter import CheckpointStore, NoProgress, Progress, Split, TrainingData
from robustboard.leaderboard.record import Record, load


@dataclasses.dataclass(frozen=True)
class Setup:
    """A track's data.

    Attributes:
        track: the track.
        data: what a defense may see.
        test: the judged examples, in the track's order, on the CPU.
        keys: their content hashes.
        threat: the track's.
    """

    track: Track
    data: TrainingData
    test: Split
    keys: tuple[str, ...]
    threat: ThreatModel


@dataclasses.dataclass(frozen=True)
class Trained(Setup):
    """A track's data and a network that was trained on it.

    Attributes:
        model: in eval mode, on the laboratory's device.
        seconds: the training time, NaN where a kept training was continued.
    """

    model: nn.Module
    seconds: float


class Laboratory:
    """Data, networks and records for experiments.

    Args:
        runs: the folder of trainings and records.
        seed: the training seed of networks that do not name their own.
        device: where networks are.
        threads: of the processes that score.
        data_dirs: folders to look for data in, before those of ROBUSTBOARD_DATA.
        progress: told of every step.
    """

    def __init__(
        self,
        runs: Path,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        threads: int = 1,
        data_dirs: Sequence[Path] = (),
        progress: Progress | None = None,
    ) -> None:
        self.runs, self.seed, self.threads = runs, seed, threads
        self.device = torch.device(device)
        self.progress = progress or NoProgress()
        self._data_dirs = tuple(data_dirs)
        self._datasets: dict[str, Dataset] = {}
        self._setups: dict[str, Setup] = {}

    def setup(self, track: str, *, limit: int | None = None) -> Setup:
        """A track's data; `limit` keeps only the first so many training images.

        Raises:
            TrackError, DataError: if the track is unknown, or its data are missing.
        """
        if track not in self._setups:
            loaded, dataset = load_track(track), self.dataset(track)
            examples = select(loaded, dataset)
            test = Split(torch.from_numpy(examples.floats()), torch.from_numpy(examples.labels))
            self._setups[track] = Setup(loaded, training_data(loaded, dataset), test, examples.hashes, loaded.threat)
        found = self._setups[track]
        return found if limit is None else dataclasses.replace(found, data=_limited(found.data, limit))

    def dataset(self, track: str) -> Dataset:
        """The whole data set of a track, its test part in its own order, for measures that count as a paper counts.

        Raises:
            TrackError, DataError: as `setup`.
        """
        wanted = load_track(track).dataset
        name = str(wanted)
        if name not in self._datasets:
            self._datasets[name] = load_dataset(wanted, data_dirs=data_folders(self._data_dirs))
        return self._datasets[name]

    def network(
        self, defense: str, track: str, *, seed: int | None = None, limit: int | None = None, **overrides: object
    ) -> Trained:
        """A trained network, in this process.

        Args:
            defense: a name of the registry.
            track: the track to train for.
            seed: of the training.
            limit: how many training images to use; None uses all.
            **overrides: hyper-parameters.

        Raises:
            RobustBoardError: if the data are missing, or the training cannot be done.
        """
        setup = self.setup(track, limit=limit)
        seed = self.seed if seed is None else seed
        folder = self._folder(defense, track, seed, overrides)
        if limit is not None:
            folder = folder.with_name(f"{folder.name}-first-{limit}")
        kept = (folder / "checkpoints").is_dir()
        merged = {**setup.track.hyper.get(defense, {}), **overrides}
        began = time.perf_counter()
        model = registry.create(defense, merged).fit(
            setup.data,
            setup.threat,
            seed=seed,
            device=self.device,
            progress=self.progress,
            checkpoints=CheckpointStore(folder / "checkpoints"),
        )
        seconds = math.nan if kept else time.perf_counter() - began
        return Trained(setup.track, setup.data, setup.test, setup.keys, setup.threat, model, seconds)

    def record(
        self, defense: str, track: str, *, n: int | None = None, seed: int | None = None, **overrides: object
    ) -> Record:
        """The record of a defense under the whole protocol; a finished one of the same run is not made again.

        Args:
            defense: a name of the registry.
            track: the track.
            n: judge only the first n examples.
            seed: of the training.
            **overrides: hyper-parameters.

        Raises:
            RobustBoardError: as `score_defense`.
        """
        seed = self.seed if seed is None else seed
        folder = self._folder(defense, track, seed, overrides)
        wanted = load_track(track) if n is None else load_track(track).limited(n)
        if (folder / "record" / "record.json").is_file():
            kept = load(folder / "record")
            if kept.track.id == wanted.id:
                return kept
        request = Request(
            defense=defense,
            track=track,
            n=n,
            seed=seed,
            overrides=overrides,
            device=str(self.device),
            threads=self.threads,
            run_dir=folder,
            data_dirs=self._data_dirs,
        )
        return score_defense(request, self.progress).record

    def _folder(self, defense: str, track: str, seed: int, overrides: dict[str, object]) -> Path:
        name = f"seed-{seed}"
        if overrides:
            chosen = json.dumps({key: str(value) for key, value in overrides.items()}, sort_keys=True)
            name += f"-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
        return self.runs / track / defense / name


def _limited(data: TrainingData, limit: int) -> TrainingData:
    kept = Split(data.train.images[:limit], data.train.labels[:limit])
    return dataclasses.replace(data, train=kept)
