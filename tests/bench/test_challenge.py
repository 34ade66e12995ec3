"""Challenges against real records: a defense that is trained and scored here, and a submission.

No attack of the protocol leaves an easy target undecided, so the records are told to forget: what the protocol broke is
made undecided, or even certified, and the protocol's own images are the challenge.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustboard.bench import challenge as challenges
from robustboard.bench import places, tracking
from robustboard.bench import score as scoring
from robustboard.bench.challenge import Request, lowered_table, run_challenge, write_targets
from robustboard.bench.perturbed_file import read_perturbed, write_perturbed
from robustboard.bench.process import WorkerProcess
from robustboard.bench.recall import bring_back, locate, recall_entrant, recall_examples
from robustboard.bench.request import Request as Score
from robustboard.bench.score import score_defense
from robustboard.errors import ChallengeError, DefenseError, GateError, ModelError, OutputError, RecordError, TrackError
from robustboard.leaderboard.outcomes import check_outcomes
from robustboard.leaderboard.ranking import boards
from robustboard.leaderboard.record import Record, derive_metrics, load, save

TRACK = """
id = "small-linf@1"
dataset = "digits"
threat = {norm = "linf", eps = "1/10"}
n = 24
bounds = {methods = ["ibp"]}
audit = {certified_sample = 1, smallest_margins = 0}
corruptions = {names = ["contrast"], severities = [1]}
training = {train = 600, validation = 60}
"""


@pytest.fixture(scope="module", autouse=True)
def worker() -> Iterator[WorkerProcess]:
    """One real process for all models of this file: starting it is most of what a challenge costs here."""
    with WorkerProcess() as shared, pytest.MonkeyPatch.context() as patch:
        patch.setattr(challenges, "WorkerProcess", lambda **_: nullcontext(shared))
        patch.setattr(places, "WorkerProcess", lambda **_: shared)
        patch.setattr(shared, "close", lambda: None)
        yield shared
        patch.undo()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker) -> Path:
    """A run directory of the standard defense."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "track.toml").write_text(TRACK)
    score_defense(
        Score(
            defense="standard",
            track=folder / "track.toml",
            threads=1,
            run_dir=folder / "run",
            overrides={"epochs": 3},
            attack_seeds=1,
        )
    )
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run directory, to change."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def forget(run: Path, rows: list[int], **settled: Any) -> Record:
    """Rewrite the run's record as if nothing had broken these rows; `settled` is set on them."""
    record = load(run / "record")
    outcomes = record.outcomes
    attacks = ["pgd", "apgd_ce", "apgd_t", "fab_t", "square"]
    outcomes.loc[rows, attacks] = True
    outcomes.loc[rows, "broken_by"] = pd.NA
    outcomes.loc[rows, "verdict"] = "undecided"
    for column, value in settled.items():
        outcomes.loc[rows, column] = value
    metrics = derive_metrics(outcomes, bound_methods=record.bound_methods)
    return save(record.model_copy(update={"metrics": metrics, "outcomes_sha256": None}), outcomes, run / "record")


def broken(run: Path) -> list[int]:
    return np.flatnonzero(load(run / "record").outcomes["verdict"] == "broken").tolist()


def test_a_record_of_the_track_keeps_its_spread_over_attack_seeds(finished):
    spread = load(finished / "record").attack_spread
    assert spread is not None
    robust = load(finished / "record").metrics["robust"]
    first, _ = spread.model_dump()["values"]
    assert (spread.n, spread.seeds, first) == (24, (0, 1), robust.value)
    with np.load(finished / "seed-breaks.npz") as stored:
        assert len(stored["index"]) == spread.would_break


def test_images_that_hold_lower_the_record_and_leave_the_old_one(run):
    chosen = broken(run)[:3]
    assert len(chosen) == 3, "the data must hold examples to break"
    before = forget(run, chosen)
    old = {path: path.read_bytes() for path in (run / "record").iterdir()}
    found = run_challenge(Request(run, run / "adversarial.npz"))
    assert (found.lowered, found.held, found.misclassified) == (3, len(broken(run)) + 3, 0)
    assert found.after is not None
    assert found.folder == run / f"challenged-{found.file_sha256[:12]}-{before.outcomes_sha256[:12]}"
    assert {path: path.read_bytes() for path in (run / "record").iterdir()} == old

    after = load(found.folder)
    assert after == found.after
    check_outcomes(after.outcomes)
    assert after.outcomes.loc[chosen, "broken_by"].tolist() == ["challenge"] * 3
    lost = before.metrics["robust"].value - after.metrics["robust"].value
    assert lost == pytest.approx(3 / 24)
    assert after.metrics["certified"] == before.metrics["certified"]
    sha256 = hashlib.sha256((run / "adversarial.npz").read_bytes()).hexdigest()
    (entered,) = after.challenges
    assert (entered.file_sha256, entered.lowered, entered.replaces) == (sha256, 3, before.outcomes_sha256)
    assert sha256 in after.notes[-1]
    assert f"{found.held} of {found.given}" in after.notes[-1]
    (board,) = boards([before, after])
    assert [entry.record for entry in board.entries] == [after]


def test_a_lowered_record_is_the_runs_record_from_then_on(run):
    first, second = broken(run)[:2]
    forget(run, [first, second])
    recalled = recall_examples(load(run / "record"))
    stored = read_perturbed(run / "adversarial.npz", recalled.examples, recalled.track.threat)
    for row in (first, second):
        place = stored.rows == row
        path = run / f"{row}.npz"
        write_perturbed(path, stored.rows[place], stored.images[place], recalled.examples.hashes)
        # The record's own folder is named each time, and yet the second break adds to the first.
        found = run_challenge(Request(run / "record", path))
        assert found.lowered == 1
        assert found.folder is not None
        images = read_perturbed(found.folder / "adversarial.npz", recalled.examples, recalled.track.threat)
        assert row in images.rows
    assert len(load(found.folder).challenges) == 2
    assert locate(run).folder == found.folder
    again = run_challenge(Request(run, run / "adversarial.npz"))
    assert (again.lowered, again.after) == (0, None)


def test_one_file_lowers_records_that_share_a_parent_each_in_a_folder_of_its_own(run, tmp_path, monkeypatch):
    """Outside run directories lowered records lie side by side; the second must not replace the first's."""
    real, chosen, found = bring_back, broken(run)[:2], []
    # A record alone has no weights; the model is brought back from the run that it was copied from.
    monkeypatch.setattr(
        challenges, "bring_back", lambda worker, located, *rest: real(worker, replace(located, run=run), *rest)
    )
    for place, count in enumerate((1, 2)):
        folder = tmp_path / "records" / str(place)
        forget(run, chosen[:count])
        shutil.copytree(run / "record", folder)
        found.append(run_challenge(Request(folder, run / "adversarial.npz")))
    assert [one.lowered for one in found] == [1, 2]
    assert len({one.folder for one in found}) == 2
    for one in found:
        assert load(one.folder) == one.after
    with pytest.raises(OutputError, match="holds another record"):
        run_challenge(Request(tmp_path / "records" / "1", run / "adversarial.npz", out=found[0].folder))
    assert load(found[0].folder) == found[0].after


def test_a_run_directory_is_no_place_for_a_lowered_record(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    forget(run, broken(run)[:1])
    (tmp_path / "training" / "checkpoints").mkdir(parents=True)
    for out in (run, tmp_path / "training"):
        with pytest.raises(OutputError, match="is a run directory; name a new one with --out"):
            run_challenge(Request(run, run / "adversarial.npz", out=out))
    assert (run / "adversarial.npz").read_bytes() == before[run / "adversarial.npz"]


def test_scoring_again_takes_the_earlier_record_away_before_its_files_change(run, monkeypatch):
    """A run that is killed in between has no record, in place of one that is about other weights and images."""
    (run / "seed-breaks.npz").touch()

    def killed(path, write):
        raise KeyboardInterrupt(path)

    monkeypatch.setattr(scoring, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt, match=r"model\.safetensors"):
        scoring._store(run, b"other weights", None, None, None)
    with pytest.raises(RecordError, match="There is no record in"):
        locate(run)
    assert not (run / "seed-breaks.npz").exists()


def test_the_same_challenge_writes_the_same_bytes(run, tmp_path):
    forget(run, broken(run)[:2])
    for name in ("one", "two"):
        run_challenge(Request(run, run / "adversarial.npz", out=tmp_path / name))
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_breaking_a_certified_example_is_a_contradiction_and_writes_nothing(run):
    (row, *_) = broken(run)
    forget(run, [row], certified=True, certified_by="ibp", margin_lower=0.1, verdict="certified")
    before = sorted(run.rglob("*"))
    with pytest.raises(
        GateError, match=r"^Gate: the challenge breaks example [0-9a-f]{12}, certified by ibp"
    ) as caught:
        run_challenge(Request(run, run / "adversarial.npz"))
    assert caught.value.exit_code == 1
    assert sorted(run.rglob("*")) == before


def test_images_that_do_not_hold_change_nothing(run):
    rows = np.flatnonzero(load(run / "record").outcomes["clean"])
    recalled = recall_examples(load(run / "record"))
    clean = recalled.examples.floats()[rows]
    write_perturbed(run / "clean.npz", rows, clean, recalled.examples.hashes)
    before = sorted(run.rglob("*"))
    found = run_challenge(Request(run, run / "clean.npz"))
    assert (found.given, found.held, found.after) == (len(rows), 0, None)
    assert sorted(run.rglob("*")) == before


def test_a_file_of_nothing_is_refused(run):
    recalled = recall_examples(load(run / "record"))
    write_perturbed(run / "none.npz", [], np.empty((0, 1, 8, 8), np.float32), recalled.examples.hashes)
    with pytest.raises(ChallengeError, match="has no images"):
        run_challenge(Request(run, run / "none.npz"))


def test_without_its_checkpoints_a_defense_comes_back_from_its_weights(run, monkeypatch):
    """Trained on other data the network has other weights; the stored ones are put into it."""
    shutil.rmtree(run / "checkpoints")
    real = recall_entrant

    def other(record, recalled, *, manifest=None):
        seeds = {**record.seeds, "training": 7}
        return real(record.model_copy(update={"seeds": seeds}), recalled, manifest=manifest)

    monkeypatch.setattr(challenges, "recall_entrant", other)
    found = run_challenge(Request(run, run / "adversarial.npz"))
    assert found.held == found.given == found.known
    (run / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ModelError, match="not the model that the record was made with"):
        run_challenge(Request(run, run / "adversarial.npz"))


def test_a_model_that_answers_otherwise_than_the_record_is_refused(run, monkeypatch):
    real = bring_back

    def other(worker, located, entrant, progress):
        brought = real(worker, located, entrant, progress)
        reversed_names = {}
        for name, value in load_weights(located.run / "model.safetensors").items():
            reversed_names[name] = -value
        worker.restore(reversed_names)
        return brought

    monkeypatch.setattr(challenges, "bring_back", other)
    with pytest.raises(ModelError, match="otherwise than the record says"):
        run_challenge(Request(run, run / "adversarial.npz"))


def load_weights(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load as read

    return read(path.read_bytes())


def test_the_targets_are_the_undecided_examples(run, tmp_path):
    rows = broken(run)[:3]
    record = forget(run, rows)
    count = write_targets(run, tmp_path / "targets.npz")
    write_targets(run / "record", tmp_path / "again.npz")
    assert (tmp_path / "targets.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    recalled = recall_examples(record)
    with np.load(tmp_path / "targets.npz", allow_pickle=False) as written:
        assert set(written["index"]) >= set(rows)
        assert tuple(written["example"]) == record.targets
        assert len(written["labels"]) == count == len(record.targets)
        np.testing.assert_array_equal(written["images"], recalled.examples.floats()[written["index"]])
        assert (str(written["norm"]), str(written["eps"])) == ("linf", "1/10")
    found = run_challenge(Request(run, tmp_path / "targets.npz"))
    assert (found.given, found.held) == (count, 0), "the clean images are a valid file that breaks nothing"


def test_a_submission_is_challenged_with_its_own_files(make_submission, quadrant_track, tmp_path):
    manifest = make_submission()
    score_defense(Score(defense=str(manifest), track=quadrant_track, threads=1, run_dir=tmp_path / "run"))
    run = tmp_path / "run"
    images = run / "adversarial.npz"
    row = broken(run)[0]
    forget(run, [row])
    with pytest.raises(TrackError, match="name its TOML with --track"):
        run_challenge(Request(run, images))
    with pytest.raises(DefenseError, match=r"name its defense\.toml with --defense"):
        run_challenge(Request(run, images, track=str(quadrant_track)))
    found = run_challenge(Request(run, images, track=str(quadrant_track), defense=manifest))
    assert found.lowered == 1

    weights = dict(np.load(manifest.parent / "weights.npz"))
    np.savez(manifest.parent / "weights.npz", **{name: value * 2 for name, value in weights.items()})
    with pytest.raises(ModelError, match="not the record's"):
        run_challenge(Request(run / "record", images, track=str(quadrant_track), defense=manifest))
    (manifest.parent / "model.py").write_text((manifest.parent / "model.py").read_text() + "\n# changed\n")
    with pytest.raises(DefenseError, match="names other code"):
        run_challenge(Request(run / "record", images, track=str(quadrant_track), defense=manifest))


def test_another_track_is_refused(run, tmp_path):
    (tmp_path / "other.toml").write_text(TRACK.replace("1/10", "1/20"))
    with pytest.raises(TrackError, match="is not the one that the record was made on"):
        run_challenge(Request(run, run / "adversarial.npz", track=str(tmp_path / "other.toml")))


def test_a_folder_without_a_record_is_one_sentence(tmp_path):
    with pytest.raises(RecordError, match="There is no record in"):
        locate(tmp_path)


def test_lowering_a_table_touches_the_undecided_examples_alone(finished):
    outcomes = load(finished / "record").outcomes
    tried = np.ones(len(outcomes), dtype=bool)
    table = lowered_table(outcomes, tried, tried & outcomes["clean"].to_numpy() & ~outcomes["certified"].to_numpy())
    undecided = (outcomes["verdict"] == "undecided").to_numpy()
    assert (table.loc[undecided, "verdict"] == "broken").all()
    assert table.loc[~undecided, "challenge"].isna().all()
    pd.testing.assert_frame_equal(table.loc[~undecided, outcomes.columns], outcomes.loc[~undecided])


def test_the_commands_print_json_that_says_what_happened(run, capsys, tmp_path):
    from typer.testing import CliRunner

    from robustboard.bench.cli import app

    forget(run, broken(run)[:1])
    result = CliRunner().invoke(
        app, ["challenge", str(run), str(run / "adversarial.npz"), "--out", str(tmp_path / "low"), "--json"]
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["lowered"] == 1
    assert said["robust_before"] - said["robust_after"] == pytest.approx(1 / 24)
    compared = CliRunner().invoke(app, ["compare", str(run / "record"), str(tmp_path / "low"), "--json"])
    said = json.loads(compared.stdout)
    assert (said["n"], said["only_first"], said["only_second"], said["p_value"]) == (24, 1, 0, 1.0)


def test_a_lowered_record_reaches_the_store(run, tmp_path):
    """A board made from the store must not go on showing what a challenge has undone."""
    from typer.testing import CliRunner

    from robustboard.bench.cli import app

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    forget(run, broken(run)[:1])
    before = load(run / "record")
    tracking.log_record(before, run / "record", uri=uri, images=np.zeros((24, 1, 8, 8), np.float32), training=())
    done = CliRunner().invoke(app, ["challenge", str(run), str(run / "adversarial.npz"), "--mlflow", uri])
    assert done.exit_code == 0, done.output
    (board,) = boards(tracking.read_records(uri))
    (entry,) = board.entries
    assert len(entry.record.challenges) == 1
    assert entry.record.metrics["robust"].value == pytest.approx(before.metrics["robust"].value - 1 / 24)
