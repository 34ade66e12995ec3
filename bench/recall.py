"""From a record back to what it is about: its run directory, its examples, and the very model that was judged.

A built-in defense comes back from its run directory: the finished training in `checkpoints/`, or the same training
again, and otherwise the weights in `model.safetensors` put into the network that such a training makes. A submission
comes back from its own folder. Either way the sha256 of the weights must be that of the record.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_safetensors

from robustboard.bench.datasets import ARRAYS, Dataset, data_folders, load_dataset
from robustboard.bench.entrants import Brought, Entrant, SubmittedEntrant, find_entrant
from robustboard.bench.protocol import Examples, Track, load_track, resolve, select, track_from
from robustboard.bench.remote import Worker
from robustboard.defenses.adapter import Progress
from robustboard.errors import DefenseError, ModelError, RecordError, TrackError
from robustboard.leaderboard.record import RECORD_FILE, Record, broke_most, load


@dataclass(frozen=True)
class Located:
    """A record on disk.

    Attributes:
        record: with its outcome table.
        folder: where it is.
        run: its run directory, if it is in one.
    """

    record: Record
    folder: Path
    run: Path | None


@dataclass(frozen=True, eq=False)
class Recalled:
    """What a record was scored on.

    Attributes:
        track: the resolved track, with the record's hash.
        examples: its examples, row for row those of the outcome table.
        dataset: where they come from.
    """

    track: Track
    examples: Examples
    dataset: Dataset


def locate(path: Path) -> Located:
    """Find the record that a run directory or a record's own folder holds.

    In a run directory, it is the one in `record/`, or the last of those that challenges put in its place.

    Raises:
        RecordError: if there is none, or it is malformed.
    """
    if (path / RECORD_FILE).is_file():
        parent = path.absolute().parent
        inside = any((parent / name).exists() for name in ("checkpoints", "model.safetensors", "adversarial.npz"))
        return Located(load(path), path, parent if inside else None)
    if not (path / "record" / RECORD_FILE).is_file():
        raise RecordError(
            f"There is no record in {path}; give a run directory, or a folder that holds {RECORD_FILE} and its table."
        )
    return last(Located(load(path / "record"), path / "record", path))


def last(located: Located) -> Located:
    """The record that challenges put in the place of one in a run directory, or that one itself.

    Where several follow from it, because it was challenged side by side, the one in force counts; see `in_force`.

    Raises:
        RecordError: if a record of the run directory is malformed.
    """
    if located.run is None:
        return located
    folders = [path.parent for path in sorted(located.run.glob(f"*/{RECORD_FILE}"))]
    following = [Located(load(folder), folder, located.run) for folder in folders]
    following = [one for one in following if _follows(one.record, located.record)]
    return min(following, key=lambda one: broke_most(one.record), default=located)


def _follows(record: Record, earlier: Record) -> bool:
    """Whether challenges led from the one to the other."""
    same = (record.track.hash, record.checkpoint_sha256) == (earlier.track.hash, earlier.checkpoint_sha256)
    return same and any(challenge.replaces == earlier.outcomes_sha256 for challenge in record.challenges)


def recall_examples(
    record: Record, *, track: str | Path | None = None, data_dirs: Sequence[Path] = (), download: bool = False
) -> Recalled:
    """The examples of a record's track, checked against its outcome table.

    Args:
        record: with its outcome table.
        track: the id or the path of its track, needed where the data are the user's own file.
        data_dirs: folders to look for data in.
        download: whether to download data that is in none of them.

    Raises:
        TrackError: if the track is another than the record's.
        RecordError: if the outcome table is about other examples.
        DataError: if the data are missing.
    """
    content = record.track.content
    if track is None:
        if content.get("dataset") == ARRAYS:
            raise TrackError(f"{record.track.id} judges images from a file of yours; name its TOML with --track.")
        loaded = track_from(content, where=f"the track of {record.defense.name}'s record")
    else:
        n = content.get("n")
        loaded = load_track(track)
        loaded = loaded.limited(n) if isinstance(n, int) else loaded
        attacks = content.get("attacks")
        loaded = loaded.hurried() if isinstance(attacks, dict) and attacks.get("ensemble") == "fast" else loaded
    dataset = load_dataset(loaded.dataset, data_dirs=data_folders(tuple(data_dirs)), download=download)
    resolved, examples = resolve(loaded, dataset), select(loaded, dataset)
    if resolved.hash != record.track.hash:
        raise TrackError(
            f"The track {resolved.id} ({resolved.hash[:12]}) is not the one that the record was made on, "
            f"{record.track.id} ({record.track.hash[:12]})."
        )
    outcomes = record.outcomes
    if not (
        np.array_equal(outcomes["index"].to_numpy(), np.arange(len(examples)))
        and outcomes["example"].tolist() == list(examples.hashes)
        and np.array_equal(outcomes["label"].to_numpy(), examples.labels)
    ):
        raise RecordError("The record's outcome table is not about its track's examples, in their order.")
    return Recalled(resolved, examples, dataset)


def recall_entrant(record: Record, recalled: Recalled, *, manifest: Path | None = None) -> Entrant:
    """What a record scored, ready to enter a worker.

    Args:
        record: the record.
        recalled: its track and data.
        manifest: a submission's defense.toml.

    Raises:
        DefenseError: if it was neither trained here nor submitted, or a submission's files are not given or not those
            that were scored.
    """
    if manifest is not None:
        submitted = SubmittedEntrant(manifest)
        if submitted.code_sha256 != record.code_sha256:
            raise DefenseError(f"{manifest} names other code than the record was made with (its sha256 differs).")
        return submitted
    if record.code_sha256 is not None:
        raise DefenseError(f"{record.defense.name} is a submission; name its defense.toml with --defense.")
    if "training" not in record.seeds:
        raise DefenseError(
            f"{record.defense.name} was neither trained by the command line nor submitted, so its model is not to be "
            "had from the record."
        )
    return find_entrant(
        record.defense.name, record.hyper, recalled.track, recalled.dataset, seed=record.seeds["training"]
    )


def bring_back(worker: Worker, located: Located, entrant: Entrant, progress: Progress) -> Brought:
    """Bring the model that a record is about into the worker; its run directory is read and left as it is.

    Raises:
        ModelError: if what comes back is not that model.
    """
    wanted = located.record.checkpoint_sha256
    with tempfile.TemporaryDirectory(prefix="robustboard-") as scratch:
        if located.run is not None and (located.run / "checkpoints").is_dir():
            shutil.copytree(located.run / "checkpoints", Path(scratch) / "checkpoints")
        brought = entrant.enter(worker, Path(scratch), progress)
    if brought.checkpoint_sha256 == wanted:
        return brought
    stored = None if located.run is None else located.run / "model.safetensors"
    if isinstance(entrant, SubmittedEntrant) or stored is None or not stored.is_file():
        raise ModelError(
            f"The weights of {located.record.defense.name} that can be had here have the sha256 "
            f"{brought.checkpoint_sha256[:12]}, not the record's {wanted[:12]}; keep the run directory with its model."
        )
    content = stored.read_bytes()
    if hashlib.sha256(content).hexdigest() != wanted:
        raise ModelError(f"{stored} is not the model that the record was made with (its sha256 differs).")
    try:
        reply = worker.restore(from_safetensors(content))
    except SafetensorError as error:
        raise ModelError(f"{stored} cannot be read as weights: {error}.") from error
    return Brought(reply.count("parameters"), wanted, content)
