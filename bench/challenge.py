"""Challenges: somebody else's adversarial examples against a record, and the targets that are left for them.

Carlini and others, "On evaluating adversarial robustness" (2019), ask that defenses stay open to attack after they are
published. A challenge is a file of images. Those that hold break their examples; the record that follows from them
stands beside the old one and replaces it on a board. An image that breaks a certified example is a contradiction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from robustboard.bench.answers import Floats
from robustboard.bench.examiner import Examiner
from robustboard.bench.perturbed_file import Perturbed, read_perturbed, write_perturbed
from robustboard.bench.process import WorkerProcess
from robustboard.bench.recall import Located, Recalled, bring_back, last, locate, recall_entrant, recall_examples
from robustboard.bench.remote import LOAD_SECONDS
from robustboard.bench.verdicts import Flags
from robustboard.defenses.adapter import NoProgress, Progress
from robustboard.errors import ChallengeError, GateError, ModelError, OutputError, RecordError
from robustboard.files import replace_file
from robustboard.leaderboard.outcomes import CHALLENGE, verdicts
from robustboard.leaderboard.record import RECORD_FILE, Challenge, Record, derive_metrics, load, make_record, save


@dataclass(frozen=True)
class Request:
    """A challenge.

    Attributes:
        record: a run directory or a record's folder.
        images: the npz file.
        out: where a lowered record goes; by default beside the record.
        defense: a submission's defense.toml.
        track: the record's track, where its data are the user's own file.
        device: a torch device.
        threads: of the model's process.
        data_dirs: folders to look for data in.
        download: whether to download data that is in none of them.
        load_seconds: how long a submitted model may take to load.
    """

    record: Path
    images: Path
    out: Path | None = None
    defense: Path | None = None
    track: str | None = None
    device: str = "cpu"
    threads: int = 1
    data_dirs: tuple[Path, ...] = ()
    download: bool = False
    load_seconds: float = LOAD_SECONDS


@dataclass(frozen=True)
class Challenged:
    """What a challenge came to.

    Attributes:
        before: the record that was challenged.
        after: the lowered record; None where nothing was lowered.
        folder: where the lowered record is.
        given: how many images there were.
        held: how many of them change the class of a correctly classified example.
        known: how many of those are of examples that were broken before.
        misclassified: how many images are of examples that are wrong without any attack.
        file_sha256: of the npz file.
        images: the evaluated images of the lowered record, (N, C, H, W).
    """

    before: Record
    after: Record | None
    folder: Path | None
    given: int
    held: int
    known: int
    misclassified: int
    file_sha256: str
    images: Floats | None = None

    @property
    def lowered(self) -> int:
        """How many undecided examples are broken now."""
        return self.held - self.known


def run_challenge(request: Request, progress: Progress | None = None) -> Challenged:
    """Check a file of adversarial examples against a record, and lower the record when they hold.

    Of a record in a run directory, the last of those that challenges put in its place is challenged, so that every
    break adds to those before.

    Raises:
        GateError: if an image breaks a certified example; nothing is written.
        RobustBoardError: one sentence for whatever cannot be used.
    """
    watched = progress or NoProgress()
    watched.begin("data", 1)
    _require_no_run(request.out)
    located = last(locate(request.record))
    recalled = recall_examples(
        located.record, track=request.track, data_dirs=request.data_dirs, download=request.download
    )
    given = read_perturbed(request.images, recalled.examples, recalled.track.threat)
    if not len(given):
        raise ChallengeError(f"{request.images} has no images, so there is nothing to check.")
    entrant = recall_entrant(located.record, recalled, manifest=request.defense)
    watched.begin("the model's process", 1)
    with WorkerProcess(device=request.device, threads=request.threads, load_seconds=request.load_seconds) as worker:
        bring_back(worker, located, entrant, watched)
        examiner = Examiner(worker, recalled.track, recalled.examples, watched)
        outcomes = located.record.outcomes
        held = _held(examiner, outcomes, given)
    verdict = outcomes["verdict"].to_numpy(str)
    if (contradicted := held & (verdict == "certified")).any():
        rows = np.flatnonzero(contradicted)
        raise GateError(
            f"Gate: the challenge breaks {examiner.names(rows)}, certified by "
            f"{outcomes.loc[rows[0], 'certified_by']}; this is a bug in a bound or in the model wrapper. The record is "
            "in doubt, nothing was written, and both the file and the record should go to the project."
        )
    result = Challenged(
        before=located.record,
        after=None,
        folder=None,
        given=len(given),
        held=int(held.sum()),
        known=int((held & (verdict == "broken")).sum()),
        misclassified=int((verdict[given.rows] == "misclassified").sum()),
        file_sha256=given.sha256,
    )
    return _lower(request, located, recalled, given, held, result) if result.lowered else result


def _held(examiner: Examiner, outcomes: pd.DataFrame, given: Perturbed) -> Flags:
    """Which examples the images break, (N,); a misclassified example cannot be broken."""
    clean = outcomes["clean"].to_numpy(bool)
    wanted = np.zeros(len(outcomes), dtype=bool)
    wanted[given.rows] = True
    wanted &= clean
    found: Floats = examiner.images.copy()
    found[given.rows] = given.images
    held = np.zeros(len(outcomes), dtype=bool)
    examiner.progress.begin("challenge", int(wanted.sum()))
    for shard, rows in examiner.shards(wanted):
        right = examiner.predict("challenge", examiner.images[shard]) == examiner.labels[shard]
        if (different := right != clean[shard]).any():
            raise ModelError(
                f"The model classifies {examiner.names(shard[different])} otherwise than the record says, so it is not "
                "the model, or not the kind of machine, that the record was made with."
            )
        held[rows] = examiner.confirm("challenge", "The challenge", rows, found[rows])
        examiner.progress.advance(len(rows))
    return held


def lowered_table(outcomes: pd.DataFrame, tried: Flags, held: Flags) -> pd.DataFrame:
    """The outcome table after a challenge: `challenge` is false where an undecided example broke.

    Args:
        outcomes: the table before.
        tried: (N,), which examples had an image.
        held: (N,), which of those it broke.
    """
    table = outcomes.copy()
    undecided = (verdicts(table) == "undecided").to_numpy(bool)
    column = table[CHALLENGE] if CHALLENGE in table else pd.Series([pd.NA] * len(table), dtype="boolean")
    # What was settled before stays as it was: the challenge has nothing to add to it.
    column = column.mask(undecided & tried, other=True).mask(undecided & held, other=False)
    table[CHALLENGE] = column.astype("boolean")
    table["broken_by"] = table["broken_by"].mask(undecided & held, other=CHALLENGE).astype("string")
    table["verdict"] = verdicts(table)
    return table


def _lower(
    request: Request, located: Located, recalled: Recalled, given: Perturbed, held: Flags, result: Challenged
) -> Challenged:
    """Write the record that follows from a challenge, with the images that break its examples."""
    before = located.record
    if before.outcomes_sha256 is None:
        raise RecordError("The record does not say which outcome table it was made from.")
    # One file may lower many records, and records outside run directories may share a parent.
    name = f"challenged-{given.sha256[:12]}-{before.outcomes_sha256[:12]}"
    folder = request.out or (located.run or located.folder.absolute().parent) / name
    if (folder / RECORD_FILE).exists() and not _same(folder, before, given.sha256):
        raise OutputError(f"The folder {folder} holds another record; name a new one with --out.")
    tried = np.zeros(len(held), dtype=bool)
    tried[given.rows] = True
    outcomes = lowered_table(before.outcomes, tried, held)
    challenge = Challenge(
        file_sha256=given.sha256,
        given=result.given,
        held=result.held,
        lowered=result.lowered,
        replaces=before.outcomes_sha256,
    )
    note = (
        f"Lowered by a challenge: {result.held} of {result.given} images given held, {result.lowered} of them on "
        f"examples that were undecided (file with sha256 {given.sha256})."
    )
    after = make_record(
        before.model_dump()
        | {
            "metrics": derive_metrics(outcomes, bound_methods=before.bound_methods),
            "challenges": (*before.challenges, challenge),
            "notes": (*before.notes, note),
            "outcomes_sha256": None,
        }
    )
    newly = held & (before.outcomes["verdict"] == "undecided").to_numpy(bool)
    _store_images(folder, located, recalled, given, newly)
    after = save(after, outcomes, folder)
    return replace(result, after=after, folder=folder, images=recalled.examples.floats())


def _same(folder: Path, before: Record, sha256: str) -> bool:
    """Whether the record there came from the same file and the same record."""
    there = load(folder)
    if not there.challenges or there.checkpoint_sha256 != before.checkpoint_sha256:
        return False
    entered = there.challenges[-1]
    return (entered.file_sha256, entered.replaces) == (sha256, before.outcomes_sha256)


def _require_no_run(out: Path | None) -> None:
    """Refuse a run directory as the place of a lowered record, whose images would replace the run's."""
    if out is not None and any((out / name).exists() for name in ("checkpoints", "model.safetensors", "record")):
        raise OutputError(f"The folder {out} is a run directory; name a new one with --out.")


def _store_images(folder: Path, located: Located, recalled: Recalled, given: Perturbed, newly: Flags) -> None:
    """Keep the image of every break beside the record: those from before, where they are at hand, and the new."""
    images = {}
    for place in (located.folder, located.run):
        if place is not None and (place / "adversarial.npz").is_file():
            before = read_perturbed(place / "adversarial.npz", recalled.examples, recalled.track.threat)
            images = dict(zip(before.rows.tolist(), before.images, strict=True))
            break
    images |= {row: image for row, image in zip(given.rows.tolist(), given.images, strict=True) if newly[row]}
    rows = sorted(images)
    write_perturbed(folder / "adversarial.npz", rows, np.stack([images[row] for row in rows]), recalled.examples.hashes)


def write_targets(
    record: Path,
    out: Path,
    *,
    track: str | None = None,
    data_dirs: tuple[Path, ...] = (),
    download: bool = False,
) -> int:
    """Write the undecided examples of a record: images, labels, rows, content hashes, norm and eps; returns how many.

    Raises:
        RobustBoardError: one sentence for whatever cannot be used or written.
    """
    located = last(locate(record))
    recalled = recall_examples(located.record, track=track, data_dirs=data_dirs, download=download)
    examples = recalled.examples
    rows = np.flatnonzero((located.record.outcomes["verdict"] == "undecided").to_numpy(bool))
    threat = recalled.track.threat
    replace_file(
        out,
        lambda file: np.savez_compressed(
            file,
            images=examples.floats()[rows],
            labels=examples.labels[rows],
            index=rows,
            example=np.array([examples.hashes[row] for row in rows], dtype="<U64"),
            norm=np.array(threat.norm),
            eps=np.array(threat.text),
        ),
    )
    return len(rows)
