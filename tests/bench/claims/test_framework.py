"""Claims: numbers carry intervals, results are stored whole with their rule, and a changed verdict is a finding."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from robustboard.bench.claims import catalog, command, store
from robustboard.bench.claims.claim import (
    VERDICTS,
    Measurement,
    PaperClaim,
    PaperNumber,
    mean,
    number,
    paired_difference,
    share,
)
from robustboard.bench.claims.laboratory import Laboratory
from robustboard.errors import DefenseError, OutputError, RecordError
from robustboard.leaderboard.statistics import wilson


def claim(limit: float = 0.5, identity: str = "method-effect") -> PaperClaim:
    return PaperClaim(
        identity,
        "method",
        "The effect is there.",
        (PaperNumber("effect", 0.9, "table 1"),),
        "digits",
        f"Reproduced from {limit} on.",
        lambda laboratory: {"effect": number("effect", 0.7 + laboratory.seed, 10)},
        lambda found: "reproduced" if found["effect"].value >= limit else "not reproduced",
    )


def test_shares_have_wilson_intervals() -> None:
    flags = torch.arange(200) < 150
    found = share("kept", flags)
    assert (found.value, found.n) == (0.75, 200)
    assert (found.low, found.high) == wilson(150, 200)


def test_paired_differences_use_the_pairing() -> None:
    """Ten examples gained and none lost of a hundred: the interval is far from zero, as unpaired ones are not."""
    before = np.arange(100) < 50
    after = np.arange(100) < 60
    found = paired_difference("gain", after, before)
    assert found.value == pytest.approx(10)
    half = 1.96 * 100 * math.sqrt(0.1 * 0.9 / 99)
    assert (found.low, found.high) == pytest.approx((10 - half, 10 + half), rel=1e-3)
    assert found.unit == "points"


def test_a_mean_of_one_run_stands_alone() -> None:
    one, three = mean("time", [2.0], unit="seconds"), mean("time", [1.0, 2.0, 3.0])
    assert one.low == one.high == 2.0
    assert three.low == pytest.approx(2 - 1.96 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"value": math.nan}, {"low": 0.6}, {"n": 0}, {"unit": "furlongs"}, {"under": "moonlight"}, {"high": math.inf}],
    ids=str,
)
def test_a_measurement_that_is_none_is_refused(wrong: dict[str, object]) -> None:
    good = {"what": "x", "value": 0.5, "n": 4, "low": 0.4, "high": 0.6}
    assert Measurement(**good).unit == "share"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x:"):
        Measurement(**(good | wrong))  # type: ignore[arg-type]


def test_a_result_comes_back_as_it_was_saved(tmp_path) -> None:
    laboratory = Laboratory(tmp_path, seed=0)
    result = command.verify(claim(), laboratory, out=tmp_path)
    again = store.load_result(tmp_path / "method-effect.json")
    assert again == result
    assert again.measurements["effect"] == number("effect", 0.7, 10)
    assert again.rule == claim().rule
    assert again.made_with["torch"] == torch.__version__


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b'{"claim": 3}'])
def test_a_damaged_result_is_one_sentence(tmp_path, content) -> None:
    path = tmp_path / "method-effect.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"malformed: .*\.$"):
        store.load_result(path)


def test_a_result_that_cannot_be_written_is_one_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        command.verify(claim(), Laboratory(tmp_path), out=tmp_path / "file")


def test_a_rule_that_does_not_read_its_measurements_keeps_nothing(tmp_path) -> None:
    broken = dataclasses.replace(claim(), judge=lambda found: found["nothing"])
    with pytest.raises(KeyError):
        command.verify(broken, Laboratory(tmp_path), out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_changed_verdict_is_said(tmp_path, monkeypatch) -> None:
    before = command.verify(claim(), Laboratory(tmp_path, seed=0), out=tmp_path)
    monkeypatch.setattr(command, "committed", lambda _: before)
    same = command.verify(claim(), Laboratory(tmp_path, seed=1), out=tmp_path)
    assert command.disagreements([claim()], {"method-effect": same}) == []
    other = command.verify(claim(limit=9.0), Laboratory(tmp_path, seed=9), out=tmp_path)
    (sentence,) = command.disagreements([claim(limit=9.0)], {"method-effect": other})
    assert "is now 'reproduced'; the committed result says 'not reproduced'" in sentence


def test_a_claim_is_printed_with_all_its_numbers(capsys, tmp_path) -> None:
    result = command.verify(claim(), Laboratory(tmp_path), out=tmp_path)
    command.show(claim(), result, Console(width=60, color_system=None))
    said = capsys.readouterr().out
    for words in (
        "method-effect  reproduced",
        "effect: 0.9 (table 1)",
        "effect: 0.7, n = 10",
        "Reproduced from 0.5 on.",
    ):
        assert words in said
    assert max(map(len, said.splitlines())) <= 60
    command.show(claim(), None, Console(width=60, color_system=None))
    assert "not measured yet" in capsys.readouterr().out


def test_claims_are_chosen_by_id_or_by_method() -> None:
    everything = catalog.chosen([])
    assert {one.defense for one in everything} >= set(catalog.METHODS)
    assert [one.id for one in catalog.chosen([everything[0].id])] == [everything[0].id]
    assert {one.defense for one in catalog.chosen(["rift"])} == {"rift"}
    with pytest.raises(DefenseError, match="There is no claim 'nonsense'"):
        catalog.chosen(["nonsense"])


def test_claims_are_complete() -> None:
    """Ids are unique and begin with the method; the texts that a reader needs are there."""
    claims = catalog.all_claims()
    assert len({one.id for one in claims}) == len(claims) >= 15
    for one in claims:
        assert one.id.startswith(f"{one.defense}-")
        assert one.statement.endswith(".")
        assert one.rule.endswith(".")
        assert one.data
        assert one.paper
        assert all(paper.source for paper in one.paper)


@pytest.mark.parametrize("one", catalog.all_claims(), ids=lambda one: one.id)
def test_committed_results_follow_today_s_rule(one: PaperClaim) -> None:
    """A rule was not changed after its measurement, and the measurement still reads."""
    result = store.committed(one)
    assert result is not None, f"run robustboard claims --verify {one.id}"
    assert result.claim == one.id
    assert result.rule == one.rule
    assert one.judge(result.measurements) in VERDICTS
    assert result.made_with["command"].startswith(f"robustboard claims --verify {one.id} ")
    assert json.dumps(store.as_json(one, result))


def test_every_committed_result_belongs_to_a_claim() -> None:
    ids = {one.id for one in catalog.all_claims()}
    folder = Path(store.__file__).parent / "results"
    assert {path.stem for path in folder.glob("*.json")} == ids
