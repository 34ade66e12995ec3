"""The corruption stages: accuracy on corrupted images, and robust accuracy around some of them.

The second is hardly ever published: an attack in the track's ball around an image that is corrupted already. It is made
on a fixed part of the examples, drawn by content hash, and a break counts as everywhere: the very tensor, in the ball
around the corrupted image, misclassified in the canonical pass of its shard of corrupted images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from robustboard.attacks.keyed import derive_seed
from robustboard.bench.arrays import Images
from robustboard.bench.corruptions import SETS, corrupt
from robustboard.bench.examiner import Examiner
from robustboard.bench.protocol import Examples, Track, as_floats
from robustboard.bench.verdicts import Flags, Rows, Verdicts
from robustboard.errors import DataError

Pictures = Callable[[str, int, Rows], Images]
"""(corruption, severity, rows) -> the corrupted images of those examples, (len(rows), C, H, W), as stored."""


def made(track: Track, examples: Examples) -> Pictures:
    """The corrupted images of a set that is made here.

    Raises:
        DataError: if the track's set is read from official files instead.
    """
    suite = track.corruptions
    if SETS[suite.set].files is not None:
        raise DataError(
            f"The set {suite.set} of {track.id} is read from official files; score by name, or pass data_dirs."
        )

    def pictures(corruption: str, severity: int, rows: Rows) -> Images:
        keys = [examples.hashes[row] for row in rows]
        images = examples.images[rows]
        return corrupt(images, corruption=corruption, severity=severity, keys=keys, seed=suite.seed, family=suite.set)

    return pictures


def require_possible(track: Track, pictures: Pictures) -> None:
    """Corrupt one image in every way: what cannot be made, or is not in the files, is said before any long work.

    Raises:
        DataError: whatever `pictures` raises.
    """
    for name, severity in track.corruptions.conditions:
        pictures(name, severity, np.zeros(1, dtype=np.int64))


def judge_corrupted(examiner: Examiner, verdicts: Verdicts, pictures: Pictures) -> None:
    """Accuracy under every corruption and severity of the track, on all examples."""
    conditions = examiner.track.corruptions.conditions
    everything = np.ones(len(examiner.labels), dtype=bool)
    examiner.progress.begin("corruptions", len(conditions) * len(everything))
    for name, severity in conditions:
        correct = np.zeros(len(everything), dtype=bool)
        shards = [shard for shard, _ in examiner.shards(everything)]
        batches = (as_floats(pictures(name, severity, shard)) for shard in shards)
        for shard, predicted in zip(shards, examiner.predict_each("corruption", batches), strict=True):
            correct[shard] = predicted == examiner.labels[shard]
            examiner.progress.advance(len(shard))
        verdicts.corrupted[f"corruption/{name}/{severity}"] = correct


def attack_corrupted(examiner: Examiner, verdicts: Verdicts, pictures: Pictures) -> None:
    """The track's PGD around corrupted images, on the track's part of the examples; after `judge_corrupted`."""
    suite, pgd = examiner.track.corruptions, examiner.track.attacks.pgd
    if suite.robust is None:
        return
    chosen = _chosen(examiner.examples, suite.robust.examples, suite.robust.seed)
    passes = pgd.restarts * len(pgd.losses_for(examiner.examples.classes)) * pgd.steps
    examiner.progress.begin("PGD on corrupted images", int(chosen.sum()) * len(suite.attacked) * passes)
    for name, severity in suite.attacked:
        robust = chosen & verdicts.corrupted[f"corruption/{name}/{severity}"]
        images = examiner.examples.images.copy()
        for shard, _ in examiner.shards(robust):
            images[shard] = pictures(name, severity, shard)
        # The same examiner, with the same bills, of a world in which the corrupted images are the clean ones.
        moved = dataclasses.replace(examiner, examples=dataclasses.replace(examiner.examples, images=images))
        rows = np.flatnonzero(robust)
        found = moved.pgd("robust corruption", rows)
        robust[rows] = ~moved.confirm("robust corruption", "PGD", rows, found)
        verdicts.robust_corrupted[f"robust_corruption/{name}/{severity}"] = (chosen, robust)


def _chosen(examples: Examples, count: int, seed: int) -> Flags:
    """The fixed part of the examples that is attacked."""
    drawn = sorted(range(len(examples)), key=lambda row: derive_seed(seed, "robust corruption", examples.hashes[row]))
    chosen = np.zeros(len(examples), dtype=bool)
    chosen[drawn[:count]] = True
    return chosen
