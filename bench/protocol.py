"""The released tracks, the examples that a track judges, and the data that a defense may train on.

Everything is chosen by content hash: any copy of a data set, in any order, gives the same examples, the same training
images in the same order and the same validation split. No test image ever reaches a defense.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robustboard.attacks.keyed import derive_seed
from robustboard.bench.arrays import Images, ImageSet, Labels, as_floats, lines_digest
from robustboard.bench.datasets import ARRAYS, Dataset
from robustboard.bench.track import Track
from robustboard.bench.trackfile import merged, parse_track
from robustboard.defenses.adapter import Split, TrainingData
from robustboard.errors import DataError, TrackError

__all__ = [
    "Examples",
    "Track",
    "as_floats",
    "load_track",
    "resolve",
    "select",
    "track_from",
    "track_ids",
    "training_data",
]


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples that a track judges, by rising content hash; no two have the same pixels.

    Attributes:
        images: (N, C, H, W), as stored: uint8, or float32 in [0, 1].
        labels: (N,), int64.
        hashes: the content hash of every image.
        order: (N,), where each stands in the data set's test part.
        draws: (N,), the rows in the order in which an attack that draws by batch takes them.
        classes: the number of classes K.
        class_names: what they are called.
    """

    images: Images
    labels: Labels
    hashes: tuple[str, ...]
    order: Labels
    draws: Labels
    classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hashes)

    def floats(self) -> npt.NDArray[np.float32]:
        """The images as float32 in [0, 1]."""
        return as_floats(self.images)

    def tensor(self) -> Tensor:
        """The images as a float32 tensor in [0, 1], on the CPU."""
        return torch.from_numpy(self.floats())

    @cached_property
    def sha256(self) -> str:
        """The sha256 over the hashes and labels in order: what `Track.images_sha256` holds."""
        return lines_digest([f"{key} {label}" for key, label in zip(self.hashes, self.labels, strict=True)])


def track_ids() -> tuple[str, ...]:
    """The ids of all released tracks, each `-full` variant after its track.

    >>> "mnist-linf@1" in track_ids() and "mnist-linf-full@1" in track_ids()
    True
    """
    ids: list[str] = []
    for name in sorted(entry.name for entry in _folder().iterdir()):
        if name.endswith(".toml") and "@" in name:
            base = name.removesuffix(".toml")
            ids.append(base)
            if "full" in _released(base):
                ids.append(_full_id(base))
    return tuple(ids)


def load_track(id_or_path: str | Path) -> Track:
    """A released track by its id, or the user's own by the path of its TOML.

    Raises:
        TrackError: if there is none, or it does not describe a track; one sentence.

    >>> load_track("digits-linf@1").threat.text
    '1/10'
    """
    text = str(id_or_path)
    if isinstance(id_or_path, Path) or text.endswith(".toml") or "/" in text:
        return _own_track(Path(id_or_path))
    base = text.replace("-full@", "@")
    if text not in track_ids():
        near = difflib.get_close_matches(text, track_ids(), n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        raise TrackError(
            f"The track {text!r} is not known; {guess}`robustboard tracks` lists all, and a path that ends in .toml "
            "names your own."
        )
    content = dict(_released(base))
    full = content.pop("full", None)
    if text != base:
        content |= {
            "id": text,
            "n": "all",
            "images_sha256": None,
            "title": f"{content['title']}, whole test set",
        } | full
    return track_from(content, where=f"the track {text}")


def track_from(content: Mapping[str, Any], *, where: str = "the track", folder: Path | None = None) -> Track:
    """A track from values: those of a TOML, or what `Track.frozen` gave; the standard protocol completes them.

    Args:
        content: at least `id`, `dataset` and `threat`; `dataset = "arrays"` for data that the caller brings.
        where: what to call it in an error.
        folder: what a relative npz path is relative to, by default the current folder.

    Raises:
        TrackError: if it does not describe a track; one sentence.
    """
    standard = tomllib.loads((_folder() / "standard.toml").read_text(encoding="utf-8"))
    return parse_track(content, standard=standard, where=where, folder=folder or Path())


def _own_track(path: Path) -> Track:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrackError(f"The track file {path} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrackError(f"The track file {path} is not valid TOML: {error}.") from error
    track = track_from(content, where=str(path), folder=path.parent)
    if track.id in track_ids() and track.hash != load_track(track.id).hash:
        raise TrackError(
            f"{path}: the id {track.id} is that of a released track, which says otherwise; choose another."
        )
    return track


def _folder() -> Any:
    return resources.files("robustboard.bench.tracks")


def _released(name: str) -> dict[str, Any]:
    """What a file of the folder says, on top of its layers, on top of the track that it is a later version of."""
    said = tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    content: dict[str, Any] = {}
    if "base" in said:
        content = _released(said.pop("base"))
        content["title"] = f"{content['title']}, version {name.rpartition('@')[2]}"
    for layer in said.pop("layers", ()):
        content = merged(content, _released(layer))
    return merged(content, said)


def _full_id(base: str) -> str:
    return base.replace("@", "-full@")


def select(track: Track, dataset: Dataset) -> Examples:
    """The examples that the track judges: the n of smallest content hash, exact repeats of an image counted once.

    Raises:
        DataError: if the data set is not the track's, or its images are not those that the track was released with.
    """
    _require_match(track, dataset)
    test = dataset.test
    seen: dict[str, int] = {}
    # Of equal images with different labels the smallest label stays, so that the order of the data cannot matter.
    for place in sorted(range(len(test)), key=lambda i: (test.hashes[i], test.labels[i])):
        seen.setdefault(test.hashes[place], place)
    order = np.array(list(seen.values())[: None if track.n == "all" else track.n], dtype=np.int64)
    examples = Examples(
        test.images[order],
        test.labels[order],
        tuple(test.hashes[place] for place in order),
        order,
        # Copies of a named data set differ in their order, so that the hash decides. The caller's file is the data set
        # itself: there the reference attack draws as it does when it is run on the file directly.
        np.argsort(order) if dataset.name == ARRAYS else np.arange(len(order)),
        dataset.classes,
        dataset.class_names,
    )
    if track.images_sha256 is not None and examples.sha256 != track.images_sha256:
        raise DataError(
            f"The {len(examples)} chosen images of {dataset.name} are not those of {track.id} "
            f"(sha256 {examples.sha256[:12]}..., not {track.images_sha256[:12]}...); use an unchanged copy, and where "
            "images are JPEG files the pinned version of Pillow."
        )
    return examples


def resolve(track: Track, dataset: Dataset) -> Track:
    """The track with the hash of its examples filled in, which makes `Track.hash` final.

    Raises:
        DataError: as `select`.
    """
    return track.model_copy(update={"images_sha256": select(track, dataset).sha256})


def training_data(track: Track, dataset: Dataset) -> TrainingData:
    """What a defense may see: training and validation images, drawn by content hash, none equal to a test image.

    Raises:
        DataError: if there is no training part, or it is too small for the track's sizes.
    """
    _require_match(track, dataset)
    if dataset.train is None:
        raise DataError(
            f"The data of {track.id} has no training part; add train_images and train_labels to the npz file, or score "
            "a trained model."
        )
    train, tests = dataset.train, set(dataset.test.hashes)
    allowed = [place for place, key in enumerate(train.hashes) if key not in tests]
    settings = track.training
    drawn = sorted(
        allowed, key=lambda i: (derive_seed(settings.seed, "split", train.hashes[i]), train.hashes[i], train.labels[i])
    )
    size = settings.validation
    held = math.floor(size * len(drawn)) if isinstance(size, Fraction) else size
    wanted = len(drawn) - held if settings.train == "all" else settings.train
    if held < 1 or wanted < 1 or held + wanted > len(drawn):
        raise DataError(
            f"{track.id} wants {wanted} training and {held} validation images, but {dataset.name} has {len(drawn)} "
            "training images that are not test images; set training.train and training.validation to fit."
        )
    return TrainingData(
        dataset.name, _split(train, drawn[held : held + wanted]), _split(train, drawn[:held]), dataset.classes
    )


def _split(images: ImageSet, places: list[int]) -> Split:
    return Split(torch.from_numpy(as_floats(images.images[places])), torch.from_numpy(images.labels[places]))


def _require_match(track: Track, dataset: Dataset) -> None:
    wanted = track.dataset if isinstance(track.dataset, str) else ARRAYS
    if dataset.name != wanted:
        raise DataError(f"{track.id} is a track on {wanted}, not on {dataset.name}.")
