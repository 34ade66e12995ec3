"""The outcome table: what the schema refuses, and that what it accepts survives the disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustboard.errors import RecordError
from robustboard.leaderboard.outcomes import (
    check_outcomes,
    contradictions,
    corruption_columns,
    from_parquet,
    to_parquet,
    verdicts,
)

Table = Callable[..., pd.DataFrame]


def first(frame: pd.DataFrame, verdict: str) -> int:
    return int(np.flatnonzero(frame["verdict"] == verdict)[0])


def set_at(frame: pd.DataFrame, kind: str, /, **values: object) -> pd.DataFrame:
    row = first(frame, kind)
    for column, value in values.items():
        frame.loc[row, column] = value
    return frame


def test_a_consistent_table_is_accepted(make_table: Table) -> None:
    for reference in (False, True):
        frame = make_table(reference=reference)
        check_outcomes(frame)
        assert set(frame["verdict"]) == {"misclassified", "broken", "certified", "undecided"}


def _challenged(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(challenge=pd.array([pd.NA] * len(frame), dtype="boolean"))


def test_a_challenge_is_the_last_to_break_and_need_not_try_every_example(make_table: Table) -> None:
    """A table without challenges has the bytes it always had; one with them comes back from the disk as it was."""
    frame = make_table()
    entered = set_at(_challenged(frame), "undecided", challenge=False, broken_by="challenge", verdict="broken")
    check_outcomes(entered)
    back = from_parquet(to_parquet(entered))
    pd.testing.assert_series_equal(back["challenge"], entered["challenge"])
    assert "challenge" not in from_parquet(to_parquet(frame))
    row = first(frame, "undecided")
    earlier = entered.copy()
    earlier.loc[row, "pgd"] = False
    with pytest.raises(RecordError, match="broken_by must name the first"):
        check_outcomes(earlier)


BROKEN_TABLES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no rows": (lambda f: f.iloc[:0], "no rows"),
    "missing column": (lambda f: f.drop(columns="pgd"), "lacks the column pgd"),
    "unknown column": (lambda f: f.assign(corruption_fog=True), "unknown column 'corruption_fog'"),
    "severity zero": (lambda f: f.assign(**{"corruption/fog/0": True}), "unknown column"),
    "wrong integer": (lambda f: f.assign(label=f["label"].astype("int32")), "'label' must be int64, not int32"),
    "floats for flags": (lambda f: f.assign(clean=f["clean"].astype(float)), "'clean' must be bool"),
    "plain bools for an attack": (lambda f: f.assign(pgd=True), "'pgd' must be nullable boolean"),
    "null corruption": (
        lambda f: f.assign(**{"corruption/contrast/1": pd.array([pd.NA] * len(f), dtype="boolean")}),
        "'corruption/contrast/1' must be bool",
    ),
    "duplicate index": (lambda f: f.assign(index=np.int64(3)), "index 3 stands for two rows"),
    "negative label": (lambda f: f.assign(label=np.int64(-1)), "must not be negative"),
    "not a hash": (lambda f: f.assign(example="<script>"), "not a content hash"),
    "infinite margin": (lambda f: set_at(f, "certified", margin_lower=np.inf), "margin_lower is infinite"),
    "wrong verdict": (lambda f: set_at(f, "undecided", verdict="certified"), "a verdict that does not follow"),
    "unheard-of verdict": (lambda f: set_at(f, "undecided", verdict="fine"), "a verdict that does not follow"),
    "certified and broken": (lambda f: set_at(f, "certified", pgd=False), "both certified and broken"),
    "attacked though misclassified": (lambda f: set_at(f, "misclassified", pgd=True), "misclassified yet attacked"),
    "certified though misclassified": (
        lambda f: set_at(f, "misclassified", certified=True, certified_by="ibp"),
        "misclassified yet certified",
    ),
    "certified by nobody": (lambda f: set_at(f, "certified", certified_by=pd.NA), "certified_by must be set exactly"),
    "certifier of an undecided one": (lambda f: set_at(f, "undecided", certified_by="ibp"), "certified_by must be set"),
    "markup for a method": (lambda f: set_at(f, "certified", certified_by="<b>"), "no method's name"),
    "certified at margin zero": (lambda f: set_at(f, "certified", margin_lower=0.0), "without a positive margin"),
    "broken by nobody": (lambda f: set_at(f, "broken", broken_by=pd.NA), "broken_by must name the first"),
    "broken by another": (lambda f: set_at(f, "broken", broken_by="square"), "broken_by must name the first"),
    "breaker of an unbroken one": (lambda f: set_at(f, "undecided", broken_by="pgd"), "broken_by must name the first"),
    "challenged though misclassified": (
        lambda f: set_at(_challenged(f), "misclassified", challenge=True),
        "misclassified yet attacked",
    ),
    "challenged though certified": (
        lambda f: set_at(_challenged(f), "certified", challenge=False),
        "both certified and broken",
    ),
    "challenged and still undecided": (
        lambda f: set_at(_challenged(f), "undecided", challenge=False),
        "broken_by must name the first",
    ),
    "plain bools for a challenge": (lambda f: f.assign(challenge=True), "'challenge' must be nullable boolean"),
    "skipped an attack": (lambda f: set_at(f, "undecided", square=pd.NA), "undecided although square ran on others"),
}


def at_chosen(frame: pd.DataFrame, column: str, value: object, *, correct: bool) -> pd.DataFrame:
    """Set `column` for the first example whose corrupted image was attacked and classified as `correct` says."""
    plain = frame[column.removeprefix("robust_")]
    row = int(np.flatnonzero(frame[column].notna() & (plain == correct))[0])
    frame.loc[row, column] = value
    return frame


ROBUST = "robust_corruption/contrast/2"
BROKEN_ATTACKS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "plain bools": (lambda f: f.assign(**{ROBUST: True}), f"'{ROBUST}' must be nullable boolean"),
    "without the accuracy": (
        lambda f: f.drop(columns="corruption/contrast/2"),
        f"has the column '{ROBUST}' but not 'corruption/contrast/2'",
    ),
    "of nobody": (
        lambda f: f.assign(
            **{c: pd.array([pd.NA] * len(f), dtype="boolean") for c in f if c.startswith("robust_corruption/")}
        ),
        "attacks on corrupted images of no example",
    ),
    "of others under each": (lambda f: at_chosen(f, ROBUST, pd.NA, correct=True), "attacked under some corruptions"),
    "holds what was lost": (
        lambda f: at_chosen(f, ROBUST, True, correct=False),
        f"is {ROBUST} although corruption/contrast/2 is false",
    ),
    "the name of a mean": (lambda f: f.assign(**{"corruption/rift-18/1": True}), "unknown column"),
}


@pytest.mark.parametrize("case", BROKEN_ATTACKS)
def test_contradictory_attacks_on_corrupted_images_are_refused(case: str, make_table: Table) -> None:
    spoil, words = BROKEN_ATTACKS[case]
    check_outcomes(make_table(attacked=30))
    with pytest.raises(RecordError) as caught:
        check_outcomes(spoil(make_table(attacked=30)))
    assert words in str(caught.value)


@pytest.mark.parametrize("case", BROKEN_TABLES)
def test_a_contradictory_table_is_refused_in_one_sentence(case: str, make_table: Table) -> None:
    spoil, words = BROKEN_TABLES[case]
    with pytest.raises(RecordError) as caught:
        check_outcomes(spoil(make_table()))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_at_most_five_contradicting_examples_are_named(make_table: Table) -> None:
    frame = make_table()
    certified = frame["certified"].to_numpy()
    frame.loc[certified, "pgd"] = False
    assert contradictions(frame) == frame.loc[certified, "example"].tolist()
    with pytest.raises(RecordError, match=rf"and {certified.sum() - 5} more are both certified and broken"):
        check_outcomes(frame)


def test_no_corruption_and_no_bounds_make_a_valid_table(make_table: Table) -> None:
    frame = make_table(proven=0.0)
    check_outcomes(frame[[column for column in frame if not column.startswith("corruption/")]])


def test_parquet_returns_the_same_table_with_its_dtypes(make_table: Table) -> None:
    for frame in (make_table(), make_table(attacked=20)):
        back = from_parquet(to_parquet(frame))
        check_outcomes(back)
        pd.testing.assert_frame_equal(back[list(frame)], frame)


def test_columns_that_are_all_null_survive_parquet(make_table: Table) -> None:
    frame = make_table(clean=0.0, hold=0.0, proven=0.0)
    back = from_parquet(to_parquet(frame))
    check_outcomes(back)
    assert back["pgd"].isna().all()


def test_equal_tables_give_equal_bytes_whatever_their_order(make_table: Table) -> None:
    frame = make_table(attacked=20)
    shuffled = frame.sample(frac=1, random_state=1)[list(reversed(frame.columns))]
    assert to_parquet(shuffled) == to_parquet(frame)


def test_severities_are_ordered_as_numbers(make_table: Table) -> None:
    frame = make_table().assign(**{"corruption/fog/10": True, "corruption/fog/9": True})
    assert corruption_columns(frame)["fog"] == ["corruption/fog/9", "corruption/fog/10"]


def test_damaged_parquet_is_one_sentence(make_table: Table) -> None:
    for content in (b"", b"not parquet", to_parquet(make_table())[:-50]):
        with pytest.raises(RecordError, match="cannot be read as Parquet"):
            from_parquet(content)


def test_a_break_outranks_a_certificate_in_the_verdict() -> None:
    frame = pd.DataFrame({"clean": [True], "certified": [True], "pgd": pd.array([False], dtype="boolean")})
    assert verdicts(frame).tolist() == ["broken"]


def with_complete(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of a run with complete verification: one of the open examples is broken by it, one certified."""
    column = pd.array([pd.NA] * len(frame), dtype="boolean")
    open_ = np.flatnonzero(frame["verdict"] == "undecided")
    column[open_] = True
    column[open_[0]] = False
    frame["complete"] = column
    frame.loc[open_[0], ["broken_by", "verdict"]] = ["complete", "broken"]
    frame.loc[open_[1], ["certified", "certified_by", "verdict"]] = [True, "complete-mip", "certified"]
    frame.loc[open_[1], "margin_lower"] = 0.01
    return frame


def test_a_table_may_have_a_column_of_complete_verification(make_table: Table) -> None:
    plain, frame = make_table(), with_complete(make_table())
    check_outcomes(frame)
    again = from_parquet(to_parquet(frame))
    assert again["complete"].dtype == "boolean"
    pd.testing.assert_frame_equal(again[sorted(again)], frame[sorted(again)])
    assert "complete" not in from_parquet(to_parquet(plain))


def test_complete_verification_ran_on_all_that_stayed_open(make_table: Table) -> None:
    frame = with_complete(make_table())
    frame.loc[first(frame, "undecided"), "complete"] = pd.NA
    with pytest.raises(RecordError, match="undecided although complete ran on others"):
        check_outcomes(frame)


def _column(name: str, values: Callable[[int], list[object]]) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.column_names.index(name), name, pa.array(values(t.num_rows)))


def _pandas(metadata: dict[str, object]) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.replace_schema_metadata({b"pandas": json.dumps(metadata).encode()})


def _index_of(index: object) -> dict[str, object]:
    return {"index_columns": [index], "columns": [], "column_indexes": []}


LABEL = {"name": "label", "field_name": "label", "pandas_type": "x", "numpy_type": "y", "metadata": None}
MALFORMED: dict[str, Callable[[pa.Table], pa.Table]] = {
    "text for an attack": _column("pgd", lambda n: ["x"] * n),
    "numbers for an attack": _column("pgd", lambda n: [5] * n),
    "lists for an attack": _column("pgd", lambda n: [[1]] * n),
    "bytes for text": _column("example", lambda n: [b"\xff\xfe"] * n),
}
FOREIGN_METADATA: dict[str, dict[str, object]] = {
    "nothing": {},
    "an index column": _index_of("label"),
    "a range of no steps": _index_of({"kind": "range", "name": None, "start": 0, "stop": 5, "step": 0}),
    "no dtype": {"index_columns": [], "columns": [LABEL], "column_indexes": []},
}


def _rewritten(frame: pd.DataFrame, change: Callable[[pa.Table], pa.Table]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(to_parquet(frame)))), sink)
    return sink.getvalue()


@pytest.mark.parametrize("case", MALFORMED)
def test_columns_of_another_kind_are_one_sentence(case: str, make_table: Table) -> None:
    with pytest.raises(RecordError, match=r"^a cannot be read as Parquet"):
        from_parquet(_rewritten(make_table(), MALFORMED[case]), name="a")


@pytest.mark.parametrize("case", FOREIGN_METADATA)
def test_the_metadata_of_pandas_in_a_file_is_not_taken_at_its_word(case: str, make_table: Table) -> None:
    frame = make_table()
    found = from_parquet(_rewritten(frame, _pandas(FOREIGN_METADATA[case])))
    pd.testing.assert_frame_equal(found, from_parquet(to_parquet(frame)))


@pytest.mark.parametrize(("rows", "columns"), [(200_001, 1), (1, 2_001)])
def test_a_table_larger_than_any_track_is_refused_unread(rows: int, columns: int) -> None:
    """Equal rows take next to no room in the file."""
    sink = io.BytesIO()
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["a" * 60]))
    pq.write_table(pa.table({str(place): same for place in range(columns)}), sink, compression="zstd")
    with pytest.raises(RecordError, match=f"has {rows} rows and {columns} columns; no track needs more"):
        from_parquet(sink.getvalue())
