"""The outcome table: one row an example, and the arithmetic that turns its columns into a verdict.

Every number on the board is computed from this table, so it is checked as a whole before anything is derived: an
example that is both certified and broken, or a verdict that does not follow from the columns, is refused.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from robustboard.errors import RecordError

ATTACKS: Final = ("pgd", "apgd_ce", "apgd_t", "fab_t", "square")
"""The cascade's attacks, in the order they run."""
REFERENCE: Final = "autoattack"
"""The column of the reference engine: whether an example survived all of AutoAttack."""
FAST: Final = "fast"
"""The column of the fast attack, in tables of tracks whose attack it is."""
COMPLETE: Final = "complete"
"""The column of complete verification, in tables of runs that had it: whether it found no counter-example."""
CHALLENGE: Final = "challenge"
"""The column of other people's adversarial examples, in tables that a challenge was entered in and in no others."""
VERDICTS: Final = ("misclassified", "broken", "certified", "undecided")

_ALWAYS_THERE: Final = (*ATTACKS, REFERENCE)
_PROTOCOL_ATTACKS: Final = (*_ALWAYS_THERE, FAST, COMPLETE)
_ALL_ATTACKS: Final = (*_PROTOCOL_ATTACKS, CHALLENGE)
# The names that are left out here are those of means, in the metrics.
_CONDITION: Final = r"(?!(?:robust|standard-15|rift-18)/)([a-z0-9][a-z0-9_-]{0,39})/([1-9][0-9]?)"
_CORRUPTION: Final = re.compile(f"corruption/{_CONDITION}")
_ROBUST_CORRUPTION: Final = re.compile(f"robust_corruption/{_CONDITION}")
_MOST_ROWS: Final = 200_000
_MOST_COLUMNS: Final = 2_000
_HASH: Final = re.compile(r"[0-9a-f]{16,64}")
_METHOD: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")
_FIXED: Final[dict[str, str]] = {
    "example": "text",
    "index": "int64",
    "label": "int64",
    "clean": "bool",
    **dict.fromkeys(_ALWAYS_THERE, "nullable boolean"),
    "broken_by": "nullable text",
    "certified": "bool",
    "certified_by": "nullable text",
    "margin_lower": "nullable float64",
    "verdict": "text",
}
_OPTIONAL: Final[dict[str, str]] = dict.fromkeys((FAST, COMPLETE, CHALLENGE), "nullable boolean")
_ARROW: Final[dict[str, pa.DataType]] = {
    "text": pa.string(),
    "nullable text": pa.string(),
    "int64": pa.int64(),
    "bool": pa.bool_(),
    "nullable boolean": pa.bool_(),
    "nullable float64": pa.float64(),
}


def verdicts(outcomes: pd.DataFrame) -> pd.Series:
    """The verdict of each example, from its clean, attack and certificate columns alone.

    An example that is both certified and broken reads `broken` here; `contradictions` names those.

    >>> verdicts(pd.DataFrame({"clean": [False, True, True], "certified": [False, True, False]})).tolist()
    ['misclassified', 'certified', 'undecided']
    """
    clean, certified = outcomes["clean"].to_numpy(bool), outcomes["certified"].to_numpy(bool)
    settled = np.select([~clean, broken(outcomes), certified], list(VERDICTS[:3]), VERDICTS[3])
    return pd.Series(settled, index=outcomes.index, dtype="string")


def broken(outcomes: pd.DataFrame, attacks: Iterable[str] = _ALL_ATTACKS) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which examples at least one of `attacks` broke, boolean (N,); a null breaks nothing."""
    result = np.zeros(len(outcomes), dtype=bool)
    for attack in attacks:
        if attack in outcomes:
            result |= ~outcomes[attack].fillna(value=True).to_numpy(bool)
    return result


def contradictions(outcomes: pd.DataFrame) -> list[str]:
    """The content hashes of examples that are both certified and broken: a bug wherever one exists."""
    both = outcomes["certified"].to_numpy(bool) & (broken(outcomes) | outcomes["broken_by"].notna().to_numpy(bool))
    return outcomes.loc[both, "example"].tolist()


def corruption_columns(outcomes: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of accuracy under each corruption by its name, severities ascending."""
    return _by_name(outcomes, _CORRUPTION)


def robust_corruption_columns(outcomes: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of attacked corrupted images by the corruption's name, severities ascending; null is not attacked."""
    return _by_name(outcomes, _ROBUST_CORRUPTION)


def _by_name(outcomes: pd.DataFrame, pattern: re.Pattern[str]) -> dict[str, list[str]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for column in outcomes.columns:
        if match := pattern.fullmatch(column):
            found.setdefault(match[1], []).append((int(match[2]), column))
    return {name: [column for _, column in sorted(found[name])] for name in sorted(found)}


def check_outcomes(outcomes: pd.DataFrame) -> None:
    """Refuse a table that does not follow the schema or contradicts itself.

    Raises:
        RecordError: one sentence, naming up to five examples where it is about examples.
    """
    _check_columns(outcomes)
    _check_values(outcomes)
    if both := contradictions(outcomes):
        raise RecordError(
            f"{_examples(both)} both certified and broken, which cannot be: look for the bug in a bound, an attack or "
            "the model before publishing anything."
        )
    clean, certified = outcomes["clean"].to_numpy(bool), outcomes["certified"].to_numpy(bool)
    attacked = outcomes[[attack for attack in _ALL_ATTACKS if attack in outcomes]].notna().any(axis=1).to_numpy(bool)
    by_attack, by_method = outcomes["broken_by"].notna().to_numpy(bool), outcomes["certified_by"].notna().to_numpy(bool)
    _refuse(outcomes, ~clean & attacked, "misclassified yet attacked; a misclassified example is never attacked.")
    _refuse(outcomes, ~clean & (certified | by_method), "misclassified yet certified; only correct ones can be.")
    _refuse(outcomes, by_method != certified, "inconsistent: certified_by must be set exactly where certified is true.")
    margin = outcomes["margin_lower"].to_numpy(float)
    _refuse(outcomes, certified & ~(margin > 0), "certified without a positive margin_lower.")
    first = _first_breaker(outcomes)
    named = outcomes["broken_by"].astype(object).where(by_attack, "").to_numpy()
    _refuse(outcomes, first != named, "inconsistent: broken_by must name the first attack whose column is false.")
    wrong = (outcomes["verdict"].astype(object) != verdicts(outcomes).astype(object)).to_numpy(bool)
    _refuse(outcomes, wrong, "given a verdict that does not follow from the other columns.")
    undecided = clean & ~certified & ~by_attack
    for attack in [attack for attack in _PROTOCOL_ATTACKS if attack in outcomes]:
        ran = outcomes[attack].notna().to_numpy(bool)
        if ran.any():
            _refuse(outcomes, undecided & ~ran, f"undecided although {attack} ran on others and not on them.")
    _check_robust_corruption(outcomes)


def to_parquet(outcomes: pd.DataFrame) -> bytes:
    """The table as Parquet, rows by `index` and columns in the schema's order: equal tables give equal bytes.

    The bytes also depend on the pyarrow version, which writes its name into the file.
    """
    ordered = outcomes.sort_values("index", kind="stable")
    corruptions = [column for columns in corruption_columns(outcomes).values() for column in columns]
    attacked = [column for columns in robust_corruption_columns(outcomes).values() for column in columns]
    optional = {name: kind for name, kind in _OPTIONAL.items() if name in ordered}
    kinds = _FIXED | optional | dict.fromkeys(corruptions, "bool") | dict.fromkeys(attacked, "nullable boolean")
    arrays = {name: pa.Array.from_pandas(ordered[name], type=_ARROW[kind]) for name, kind in kinds.items()}
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink, compression="zstd", version="2.6", store_schema=False)
    return sink.getvalue()


def from_parquet(content: bytes, *, name: str = "The outcome table") -> pd.DataFrame:
    """Read what `to_parquet` wrote, with the schema's dtypes; `name` is what the errors call it.

    Raises:
        RecordError: if the bytes are not Parquet, are of more rows or columns than any track has, or hold values that
            the schema's dtypes cannot.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        _check_size(file.metadata, name)
        # The file's own account of pandas dtypes and index columns is a stranger's word; the schema's dtypes count.
        table: pd.DataFrame = file.read().to_pandas(ignore_metadata=True)
        for column in table.columns:
            kind = _kind(str(column))
            if kind == "nullable boolean":
                table[column] = table[column].astype("boolean")
            elif kind.endswith("text"):
                table[column] = table[column].astype("string")
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise RecordError(f"{name} cannot be read as Parquet, so it is damaged or something else.") from error
    return table


def _check_size(promised: pq.FileMetaData, name: str) -> None:
    """Refuse before reading: a few kilobytes of Parquet can hold millions of equal rows."""
    rows = max(promised.num_rows, sum(promised.row_group(place).num_rows for place in range(promised.num_row_groups)))
    if rows > _MOST_ROWS or promised.num_columns > _MOST_COLUMNS:
        raise RecordError(
            f"{name} has {rows} rows and {promised.num_columns} columns; no track needs more than {_MOST_ROWS} and "
            f"{_MOST_COLUMNS}."
        )


def _check_columns(outcomes: pd.DataFrame) -> None:
    if len(outcomes) == 0:
        raise RecordError("The outcome table has no rows; an evaluation has at least one example.")
    names = [str(column) for column in outcomes.columns]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecordError(f"The outcome table has the column {repeated[0]!r} twice.")
    if missing := [name for name in _FIXED if name not in names]:
        raise RecordError(f"The outcome table lacks the column {', '.join(missing)}.")
    named, patterns = _FIXED | _OPTIONAL, (_CORRUPTION, _ROBUST_CORRUPTION)
    if unknown := [n for n in names if n not in named and not any(pattern.fullmatch(n) for pattern in patterns)]:
        raise RecordError(
            f"The outcome table has the unknown column {unknown[0]!r}; besides the fixed ones, columns are called "
            "corruption/<name>/<severity> or robust_corruption/<name>/<severity>."
        )
    for name in names:
        kind = _kind(name)
        if not _is_kind(outcomes[name], kind):
            raise RecordError(f"The column {name!r} must be {kind}, not {outcomes[name].dtype}.")


def _kind(name: str) -> str:
    return (_FIXED | _OPTIONAL).get(name, "nullable boolean" if _ROBUST_CORRUPTION.fullmatch(name) else "bool")


def _check_robust_corruption(outcomes: pd.DataFrame) -> None:
    """The same examples are attacked under every condition, and none holds where it was misclassified to begin with."""
    columns = [column for columns in robust_corruption_columns(outcomes).values() for column in columns]
    for column in columns:
        plain = column.removeprefix("robust_")
        if plain not in outcomes:
            raise RecordError(f"The outcome table has the column {column!r} but not {plain!r}.")
        held = outcomes[column].fillna(value=False).to_numpy(bool)
        _refuse(outcomes, held & ~outcomes[plain].to_numpy(bool), f"{column} although {plain} is false.")
    if columns:
        attacked = outcomes[columns].notna()
        some, every = attacked.any(axis=1).to_numpy(bool), attacked.all(axis=1).to_numpy(bool)
        if not some.any():
            raise RecordError("The outcome table has attacks on corrupted images of no example.")
        _refuse(outcomes, some & ~every, "attacked under some corruptions and not under others.")


def _is_kind(column: pd.Series, kind: str) -> bool:
    match kind:
        case "int64" | "bool":
            return column.dtype == np.dtype(kind)
        case "nullable boolean":
            return isinstance(column.dtype, pd.BooleanDtype)
        case "nullable float64":
            return column.dtype == np.dtype("float64")
        case _:
            present = column.dropna()
            all_text = isinstance(column.dtype, pd.StringDtype) or all(isinstance(value, str) for value in present)
            return all_text and (kind == "nullable text" or len(present) == len(column))


def _check_values(outcomes: pd.DataFrame) -> None:
    if (duplicated := outcomes["index"].duplicated()).any():
        raise RecordError(
            f"The index {outcomes.loc[duplicated, 'index'].iloc[0]} stands for two rows; it must be unique."
        )
    if (outcomes[["index", "label"]].to_numpy() < 0).any():
        raise RecordError("The columns index and label must not be negative.")
    for example in outcomes["example"]:
        if not _HASH.fullmatch(example):
            raise RecordError(f"The example {example[:80]!r} is not a content hash of hexadecimal digits.")
    for method in outcomes["certified_by"].dropna().unique():
        if not _METHOD.fullmatch(method):
            raise RecordError(f"certified_by names {method[:80]!r}, which is no method's name.")
    if np.isinf(outcomes["margin_lower"].to_numpy(float)).any():
        raise RecordError("The column margin_lower is infinite somewhere; a margin that is not known is null.")


def _first_breaker(outcomes: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    first = np.full(len(outcomes), "", dtype=object)
    for attack in reversed(_ALL_ATTACKS):
        first[broken(outcomes, [attack])] = attack
    return first


def _refuse(outcomes: pd.DataFrame, rows: np.ndarray[tuple[int], np.dtype[np.bool_]], sentence: str) -> None:
    if rows.any():
        raise RecordError(f"{_examples(outcomes.loc[rows, 'example'].tolist())} {sentence}")


def _examples(hashes: list[str]) -> str:
    named = ", ".join(example[:12] for example in hashes[:5])
    more = f" and {len(hashes) - 5} more" if len(hashes) > 5 else ""
    return (
        f"{'The example' if len(hashes) == 1 else 'The examples'} {named}{more} {'is' if len(hashes) == 1 else 'are'}"
    )
