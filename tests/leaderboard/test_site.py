"""The site's files: deterministic, complete, inert, and never half-written."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from robustboard.errors import OutputError, RecordError
from robustboard.leaderboard.outcomes import check_outcomes, from_parquet
from robustboard.leaderboard.record import Record, parse_record
from robustboard.leaderboard.site import build_site, render_site

Build = Callable[..., Record]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_records_in_any_order_give_the_same_bytes(small_board: list[Record], tmp_path: Path) -> None:
    build_site(small_board, tmp_path / "one")
    index = build_site(random.Random(1).sample(small_board, len(small_board)), tmp_path / "elsewhere" / "two")
    assert index == tmp_path / "elsewhere" / "two" / "index.html"
    assert files_of(tmp_path / "one") == files_of(tmp_path / "elsewhere" / "two")


def test_every_metric_is_written_with_its_interval(small_board: list[Record]) -> None:
    page = render_site(small_board)["index.html"].decode()
    for record in small_board:
        for name in ("clean", "pgd", "robust", "certified", "undecided", "corruption"):
            metric = record.metrics[name]
            interval = f"[{100 * metric.low:.1f}, {100 * metric.high:.1f}]"
            cell = f'<span class="v">{100 * metric.value:.1f}</span> <span class="i">{interval}</span>'
            assert cell in page, (record.defense.name, name)
    assert "AutoAttack</th>" not in page


def test_autoattack_is_a_column_where_it_was_run(scored: Build) -> None:
    page = render_site([scored("a", {"reference": True}), scored("b")])["index.html"].decode()
    assert "AutoAttack</th>" in page
    assert page.count("not run") == 1


def test_attacks_on_corrupted_images_are_a_column_where_they_were_made(scored: Build) -> None:
    attacked = scored("a", {"attacked": 20})
    page = render_site([attacked, scored("b")])["index.html"].decode()
    assert "Corrupted, robust</th>" in page
    assert f'<span class="v">{100 * attacked.metrics["corruption/robust"].value:.1f}</span>' in page
    assert page.count("not run") == 1
    assert "Corrupted, robust</th>" not in render_site([scored("b")])["index.html"].decode()


def test_how_numbers_move_is_said_where_it_was_measured(scored: Build) -> None:
    """Attack seeds and training seeds are kept apart; one training alone has no spread."""
    attacks = {"n": 50, "seeds": [0, 1], "values": [0.5, 0.75], "min": 0.5, "max": 0.75, "would_break": 0}
    spread = {**attacks, "sd": statistics.stdev([0.5, 0.75])}
    trained = [scored("a", {"hold": hold}, seeds={"training": seed}) for seed, hold in enumerate((0.7, 0.6))]
    page = render_site([*trained, scored("b", {"seed": 3}, attack_spread=spread)])["index.html"].decode()
    assert page.count("robust over 2 training seeds") == 2
    assert "robust under 2 attack seeds, on 50 of the examples" in page
    assert "50.0–75.0, sd 17.68 points" in page
    alone = render_site(trained[:1])["index.html"].decode()
    assert "training seeds" not in alone
    assert "attack seeds" not in alone


def test_bounds_that_did_not_run_are_not_printed_as_zero(scored: Build, make_table: Callable[..., object]) -> None:
    from robustboard.leaderboard.record import derive_metrics

    shares = {"proven": 0.0}
    metrics = derive_metrics(make_table(**shares))  # type: ignore[arg-type]
    page = render_site([scored("a", shares, bound_methods=(), metrics=metrics)])["index.html"].decode()
    assert re.search(r'<td[^>]*data-key="certified"><span class="cap">Certified</span><span class="v">not run', page)


def test_links_are_relative_and_lead_to_files(small_board: list[Record]) -> None:
    files = render_site(small_board)
    page = files["index.html"].decode()
    targets = re.findall(r'(?:href|src)="([^"]*)"', page)
    local = {target for target in targets if not target.startswith(("#", "https://", "data:"))}
    assert local == set(files) - {"index.html"}
    anchors = {target[1:] for target in targets if target.startswith("#")}
    assert anchors <= set(re.findall(r'\bid="([^"]+)"', page))


def test_identifiers_in_the_page_are_unique(small_board: list[Record], scored: Build) -> None:
    other = {"id": "digits-linf@1", "hash": "ab" * 32, "content": {}}
    page = render_site([*small_board, scored("pgd-at", track=other)])["index.html"].decode()
    found = re.findall(r'\bid="([^"]+)"', page)
    assert len(found) == len(set(found))


def test_downloads_hold_what_the_page_shows(small_board: list[Record]) -> None:
    files = render_site(small_board)
    lines = list(csv.DictReader(io.StringIO(files["data/digits-linf-1.csv"].decode())))
    assert [line["defense"] for line in lines] == ["pgd-at", "trades", "crown-ibp", "standard", "distillation"]
    assert [line["rank"] for line in lines] == ["1", "2", "3", "4", ""]
    assert float(lines[0]["robust"]) == small_board[0].metrics["robust"].value
    entries = json.loads(files["data/digits-linf-1.json"])["entries"]
    assert entries[0]["standing"]["rank"] == 1
    assert entries[-1]["standing"] is None
    assert {parse_record(json.dumps(entry["record"])).defense.name for entry in entries} == {
        record.defense.name for record in small_board
    }
    tables = [content for name, content in files.items() if name.endswith(".parquet")]
    assert len(tables) == 5
    for content in tables:
        check_outcomes(from_parquet(content))


def test_a_formula_in_a_title_is_text_in_the_csv(scored: Build) -> None:
    files = render_site([scored(defense={"title": "=HYPERLINK(1)"})])
    (line,) = csv.DictReader(io.StringIO(files["data/digits-linf-1.csv"].decode()))
    assert line["title"] == "'=HYPERLINK(1)"


def test_markup_and_bidirectional_controls_are_inert_everywhere(scored: Build) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202egnp.exe\x07'
    record = scored(
        defense={
            "title": attack,
            "summary": attack,
            "paper": "javascript:alert(1)",
            "authors": [attack],
            "architecture": attack,
            "license": attack,
            "claims": [{"metric": attack, "value": 0.5, "setting": attack, "source": attack}],
        },
        track={"id": "t@1", "hash": "ab" * 32, "content": {"title": attack, "threat": {"norm": attack}}},
        hyper={attack: attack},
        seeds={attack: 1},
        notes=[attack],
        reasons=[attack],
        status="invalid",
        diagnostics={attack: [attack]},
        cost={attack: {"seconds": 1.0}},
        environment={
            "python": attack, "torch": attack, "packages": {attack: attack}, "device": attack, "threads": 1,
            "platform": attack, "commit": attack, "dirty": True,
        },
    )  # fmt: skip
    page = render_site([record], title=attack)["index.html"].decode()
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert 'href="javascript' not in page
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page)


def test_the_policy_allows_the_inline_parts_by_hash_and_nothing_from_elsewhere(small_board: list[Record]) -> None:
    page = render_site(small_board)["index.html"].decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.search(r"<[^>]+\sstyle=|<[^>]+\son[a-z]+=", page), "the policy would block these"


def test_a_page_of_fifty_defenses_stays_light(scored: Build) -> None:
    records = [scored(f"defense-{place}", {"n": 50, "seed": place, "hold": 0.3 + place / 100}) for place in range(50)]
    assert len(render_site(records)["index.html"]) < 600_000


def test_building_again_replaces_the_site_whole(small_board: list[Record], tmp_path: Path) -> None:
    out = tmp_path / "site"
    build_site(small_board, out)
    build_site(small_board[:2], out)
    assert files_of(out) == render_site(small_board[:2])
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_build_leaves_the_old_site(
    small_board: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "site"
    build_site(small_board, out)
    before = files_of(out)
    written = 0

    def full(path: Path, content: bytes) -> int:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        with path.open("wb") as file:
            return file.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match="No space left on device"):
            build_site(small_board[:2], out)
    rename = Path.rename

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "site" and target == out and path.parent != out.parent and not (path / "back").exists():
            raise OSError(1, "Operation not permitted")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stuck)
        with pytest.raises(OutputError, match="Operation not permitted"):
            build_site(small_board[:2], out)
    assert files_of(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_somebody_else_is_not_replaced(small_board: list[Record], tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<title>mine</title>")
    with pytest.raises(OutputError, match="not a RobustBoard site"):
        build_site(small_board, tmp_path)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "site"):
        with pytest.raises(OutputError):
            build_site(small_board, out)
    assert (tmp_path / "index.html").read_text() == "<title>mine</title>"


def test_an_empty_folder_is_filled(small_board: list[Record], tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    assert build_site(small_board, tmp_path / "site").is_file()


def test_without_records_there_is_no_site(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="There are no records"):
        build_site([], tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_board_of_doubtful_records_alone_has_a_page(small_board: list[Record]) -> None:
    page = render_site(small_board[-1:])["index.html"].decode()
    assert "Half of the input gradients are exactly zero" in page
    assert 'class="chart"' not in page
