"""Records: what the schema refuses, and that no interruption or damage on disk goes unnoticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robustboard.errors import OutputError, RecordError
from robustboard.leaderboard.record import (
    AttackSpread,
    Audit,
    Challenge,
    Record,
    attach,
    load,
    load_all,
    make_record,
    parse_record,
    save,
)
from robustboard.leaderboard.statistics import sandwich_interval

Build = Callable[..., Record]
Content = Callable[..., dict[str, Any]]
Table = Callable[..., pd.DataFrame]


def test_a_saved_record_is_loaded_as_it_was(scored: Build, tmp_path: Path) -> None:
    record = scored()
    saved = save(record, record.outcomes, tmp_path / "digits" / "pgd-at")
    again = load(tmp_path / "digits" / "pgd-at")
    assert again == saved == record
    pd.testing.assert_frame_equal(again.outcomes, record.outcomes)
    assert sorted(path.name for path in (tmp_path / "digits" / "pgd-at").iterdir()) == [
        "outcomes.parquet",
        "record.json",
    ]


def test_saving_twice_writes_the_same_bytes(scored: Build, tmp_path: Path) -> None:
    record = scored()
    for name in ("one", "two"):
        save(record, record.outcomes, tmp_path / name)
    for name in ("record.json", "outcomes.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_attached_table_cannot_be_changed_behind_its_hash(scored: Build) -> None:
    record = scored()
    mine = record.outcomes
    mine.loc[0, "label"] = 5
    assert record.outcomes.loc[0, "label"] == 0


def test_a_record_without_its_table_says_so(make_content: Content, make_table: Table) -> None:
    with pytest.raises(RecordError, match="no outcome table attached"):
        _ = make_record(make_content(make_table())).outcomes


SPREAD = {"n": 50, "seeds": [0, 1], "values": [0.5, 0.5], "min": 0.5, "max": 0.5, "sd": 0.0, "would_break": 0}
CHALLENGE = {"file_sha256": "ab" * 32, "given": 3, "held": 2, "lowered": 1, "replaces": "cd" * 32}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"rank": 1}, "rank"),
    "infinite seconds": ({"cost": {"pgd": {"seconds": float("inf")}}}, "cost.pgd.seconds"),
    "negative count": ({"parameters": -1}, "parameters"),
    "text for a number": ({"parameters": "166406"}, "parameters"),
    "not a hash": ({"checkpoint_sha256": "abc"}, "checkpoint_sha256"),
    "markup for a name": ({"defense": {"name": "<script>"}}, "defense.name"),
    "endless title": ({"defense": {"title": "a" * 10_000}}, "defense.title"),
    "unknown kind": ({"defense": {"kind": "magic"}}, "defense.kind"),
    "impossible year": ({"defense": {"year": 20188}}, "defense.year"),
    "endless note": ({"notes": ["a" * 10_000]}, "notes.0"),
    "swamped diagnostics": ({"diagnostics": {"trace": ["a" * 1000] * 200}}, "free-form content"),
    "number that is none": ({"diagnostics": {"loss": [float("nan")]}}, "finite"),
    "no reason": ({"status": "suspicious"}, "must give its reasons"),
    "missing metric": ({"metrics": {}}, "the metric clean is missing"),
    "spread that does not follow": ({"attack_spread": {**SPREAD, "sd": 0.5}}, "min, max and sd"),
    "spread without the protocol's seed": ({"attack_spread": {**SPREAD, "seeds": [1, 2]}}, "begin with 0"),
    "challenge that held more than it gave": ({"challenges": [{**CHALLENGE, "held": 9}]}, "at most all can hold"),
    "challenge that lowered nothing": ({"challenges": [{**CHALLENGE, "lowered": 0}]}, "challenges.0.lowered"),
    "other schema": ({"schema_version": 2}, "schema_version"),
    "climbing track id": ({"track": {"id": "../../etc", "hash": "3f" * 32, "content": {}}}, "track.id"),
}


@pytest.mark.parametrize("case", WRONG)
def test_content_outside_the_schema_is_one_sentence(case: str, make_content: Content, make_table: Table) -> None:
    changes, words = WRONG[case]
    with pytest.raises(RecordError, match=r"^The record cannot be built: [^\n]+\.$") as caught:
        make_record(make_content(make_table(), **changes))
    assert words in str(caught.value)


def test_a_contradiction_cannot_be_published_as_ok(make_content: Content, make_table: Table) -> None:
    audit = Audit.tally(broken_bounded=5, certified_attacked=5, contradictions=1)
    assert audit.upper_limit is None
    with pytest.raises(RecordError, match="contradiction cannot be ok"):
        make_record(make_content(make_table(), audit=audit))


def test_the_audit_limit_is_three_over_n() -> None:
    assert Audit.tally(broken_bounded=100, certified_attacked=200).upper_limit == 0.01
    assert Audit.tally(broken_bounded=1, certified_attacked=0).upper_limit == 1.0
    assert Audit.tally(broken_bounded=0, certified_attacked=0).upper_limit is None
    with pytest.raises(ValueError, match="three over the number of crossings"):
        Audit(broken_bounded=100, certified_attacked=200, upper_limit=0.001)


@pytest.mark.parametrize(
    ("paper", "linked"),
    [
        ("https://arxiv.org/abs/1706.06083", True),
        ("http://example.org/a?b=c", True),
        ("javascript:alert(1)", False),
        ("JavaScript:alert(1)", False),
        ("java\nscript:alert(1)", False),
        ("data:text/html,x", False),
        ("//example.org", False),
        ("https://", False),
        ("https://[", False),
        (" https://example.org", False),
        ("https://example.org/\u202egpj", False),
        ("Madry et al., ICLR 2018", False),
    ],
)
def test_only_a_plain_web_address_becomes_a_link(paper: str, linked: bool, scored: Build) -> None:
    defense = scored(defense={"paper": paper}).defense
    assert defense.paper_url == (paper if linked else None)


def test_metrics_must_be_those_of_the_table(make_content: Content, make_table: Table) -> None:
    record = make_record(make_content(make_table(seed=1)))
    with pytest.raises(RecordError, match="does not follow from its outcome table"):
        attach(record, make_table(seed=2, hold=0.5))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "record.json cannot be read"),
    "no table": (lambda f: (f / "outcomes.parquet").unlink(), "outcomes.parquet is missing"),
    "cut table": (
        lambda f: (f / "outcomes.parquet").write_bytes((f / "outcomes.parquet").read_bytes()[:-9]),
        "sha256 differs",
    ),
    "not JSON": (lambda f: (f / "record.json").write_text("{"), "not a valid record"),
    "not text": (lambda f: (f / "record.json").write_bytes(b"\xff\xfe"), "not a valid record"),
    "NaN": (
        lambda f: (f / "record.json").write_text((f / "record.json").read_text().replace("31.25", "NaN")),
        "cost.train.seconds",
    ),
    "raised number": (
        lambda f: edit(f / "record.json", lambda c: c["metrics"]["robust"].update(value=0.8, high=0.9)),
        "metric 'robust' that does not follow",
    ),
    "foreign metric": (
        lambda f: edit(f / "record.json", lambda c: c["metrics"].update(autoattack=c["metrics"]["clean"])),
        "metric 'autoattack' that does not follow",
    ),
    "huge file": (lambda f: os.truncate(f / "record.json", 5 << 20), "larger than 4 MiB"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_result_is_one_sentence(case: str, scored: Build, tmp_path: Path) -> None:
    record = scored()
    save(record, record.outcomes, tmp_path / "r")
    spoil, words = DAMAGE[case]
    spoil(tmp_path / "r")
    with pytest.raises(RecordError) as caught:
        load(tmp_path / "r")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


class Killed(BaseException):
    """Stands for the process ending between two steps."""


@pytest.mark.parametrize("survived", range(8))
def test_an_interrupted_replacement_leaves_the_old_result_or_the_new_one(
    survived: int, scored: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, third = (scored(shares={"seed": seed, "hold": hold}) for seed, hold in ((1, 0.8), (2, 0.6), (3, 0.5)))
    folder = tmp_path / "r"
    save(old, old.outcomes, folder)
    (folder / "notes.txt").write_text("mine")
    steps = 0

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            if steps == survived:
                raise Killed
            steps += 1
            return original(*arguments, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", step(Path.replace))
        patch.setattr(os, "fsync", step(os.fsync))
        # A killed process cleans nothing up.
        patch.setattr("robustboard.leaderboard.record.shutil.rmtree", lambda *_, **__: None)
        try:
            save(new, new.outcomes, folder)
        except Killed:
            assert load_all(tmp_path) in ([old], [new])
        else:
            pytest.fail("a replacement has more steps than this test interrupts")
        steps = 0
        # A second replacement, interrupted at the same place, must not lose what the first one left.
        left = load(folder)
        try:
            save(third, third.outcomes, folder)
        except Killed:
            assert load_all(tmp_path) in ([left], [third])
    assert save(third, third.outcomes, folder) == load(folder) == third
    assert (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "outcomes.parquet", "record.json"]


def test_a_folder_that_cannot_be_written_is_one_sentence(scored: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record = scored()
    with pytest.raises(OutputError, match="cannot be written"):
        save(record, record.outcomes, tmp_path / "file" / "r")


def test_load_all_orders_by_content_and_refuses_a_copy(scored: Build, tmp_path: Path) -> None:
    for folder, name in (("z", "aaa"), ("a", "mmm"), ("deep/er", "bbb")):
        record = scored(name)
        save(record, record.outcomes, tmp_path / folder)
    assert [record.defense.name for record in load_all(tmp_path)] == ["aaa", "bbb", "mmm"]
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert len(load_all(tmp_path)) == 3, "the same result twice counts once"
    assert [record.defense.name for record in load_all(tmp_path, ignore={"a", "copy"})] == ["aaa", "bbb"]


def test_load_all_without_records_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no record\.json anywhere under"):
        load_all(tmp_path)
    with pytest.raises(RecordError, match="There is no folder"):
        load_all(tmp_path / "nowhere")


def test_json_is_read_back_to_the_same_text(scored: Build) -> None:
    text = scored().to_json()
    assert parse_record(text).to_json() == text


def test_the_true_robust_accuracy_lies_in_the_sandwich_interval(scored: Build) -> None:
    record = scored()
    counts = [round(record.metrics[name].value * record.n) for name in ("certified", "robust")]
    assert record.true_robust == sandwich_interval(*counts, record.n)


def test_the_targets_of_a_record_are_its_undecided_examples(scored: Build) -> None:
    record = scored()
    by_example = record.outcomes.set_index("example")["verdict"]
    assert set(record.targets) == set(by_example.index[by_example == "undecided"])
    assert len(record.targets) == round(record.metrics["undecided"].value * record.n) > 0


def test_a_spread_and_a_challenge_survive_the_disk(scored: Build, tmp_path: Path) -> None:
    record = scored(attack_spread=SPREAD, challenges=[CHALLENGE])
    save(record, record.outcomes, tmp_path)
    again = load(tmp_path)
    assert again == record
    assert [again.attack_spread, *again.challenges] == [AttackSpread(**SPREAD), Challenge(**CHALLENGE)]


def test_a_record_from_before_spreads_and_challenges_is_still_read(scored: Build) -> None:
    text = json.loads(scored().to_json())
    del text["attack_spread"], text["challenges"]
    assert parse_record(json.dumps(text)).challenges == ()
