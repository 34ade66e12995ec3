"""The order of a board, its tie groups, and who stays out of it."""

from __future__ import annotations

import random
from collections.abc import Callable

from robustboard.leaderboard.ranking import boards, compare
from robustboard.leaderboard.record import Record, in_force

Build = Callable[..., Record]


def test_a_board_ranks_by_robust_and_keeps_doubtful_records_apart(small_board: list[Record]) -> None:
    (board,) = boards(small_board)
    assert [entry.record.defense.name for entry in board.entries] == ["pgd-at", "trades", "crown-ibp", "standard"]
    assert [entry.rank for entry in board.entries] == [1, 2, 3, 4]
    assert [record.defense.name for record in board.apart] == ["distillation"]
    assert all(entry.low <= entry.rank <= entry.high for entry in board.entries)
    assert board.shared == 360


def test_the_order_of_records_does_not_matter(small_board: list[Record]) -> None:
    shuffled = random.Random(0).sample(small_board, len(small_board))
    assert boards(shuffled) == boards(small_board)


def test_a_tie_group_ends_where_the_paired_test_tells_the_next_from_its_first(small_board: list[Record]) -> None:
    (board,) = boards(small_board)
    assert [entry.tie_group for entry in board.entries] == [1, 1, 2, 3]
    first, second, third, _ = (entry.record for entry in board.entries)
    assert compare(first, second).p_value >= 0.05 > compare(first, third).p_value


def test_equal_accuracies_share_a_rank(scored: Build) -> None:
    (board,) = boards([scored("one"), scored("two"), scored("three", {"hold": 0.3, "proven": 0.1})])
    assert [(entry.rank, entry.low, entry.high) for entry in board.entries] == [(1, 1, 2), (1, 1, 2), (3, 3, 3)]
    assert [entry.record.defense.name for entry in board.entries][2] == "three"


def test_comparison_pairs_by_content_not_by_position(scored: Build) -> None:
    whole, part = scored("whole", {"n": 60}), scored("part", {"n": 60})
    assert compare(whole, part) == (0, 0, 1.0)
    fewer = scored("fewer", {"n": 40, "hold": 0.9, "clean": 0.95})
    outcomes = [record.outcomes.set_index("example")["verdict"] for record in (whole, fewer)]
    held = [verdict.isin(["certified", "undecided"]).reindex(outcomes[1].index) for verdict in outcomes]
    paired = compare(whole, fewer)
    assert paired.only_first == (held[0] & ~held[1]).sum()
    assert paired.only_second == (~held[0] & held[1]).sum()


def test_every_protocol_has_a_board_of_its_own(scored: Build) -> None:
    other = {"id": "digits-linf@1", "hash": "ab" * 32, "content": {}}
    found = boards([scored("a"), scored("b", track=other)])
    assert [board.track_hash for board in found] == ["3f" * 32, "ab" * 32]


def test_the_variants_of_a_track_stand_behind_it(scored: Build) -> None:
    ids = ["digits-linf@1", "digits-linf@2", "digits-linf-fast@1", "mnist-linf@1"]
    records = [scored("a", track={"id": name, "hash": "ab" * 32, "content": {}}) for name in reversed(ids)]
    assert [board.track_id for board in boards(records)] == ids


def test_no_records_make_no_boards() -> None:
    assert boards([]) == []


def test_a_lowered_record_takes_the_place_of_the_one_that_was_challenged(scored: Build) -> None:
    before, other = scored("one"), scored("two")
    challenge = {"file_sha256": "ab" * 32, "given": 9, "held": 9, "lowered": 9, "replaces": before.outcomes_sha256}
    after = scored("one", {"hold": 0.5}, challenges=[challenge])
    (board,) = boards([before, other, after])
    assert [entry.record for entry in board.entries] == [other, after]
    (alone,) = boards([before, other])
    assert {entry.record.defense.name for entry in alone.entries} == {"one", "two"}


def test_of_records_that_were_lowered_side_by_side_the_one_that_broke_most_stands(scored: Build) -> None:
    """One of them was challenged again and is still the lesser; each alone would be listed."""

    def challenged(before: Record, hold: float) -> Record:
        entered = {"file_sha256": "ab" * 32, "given": 9, "held": 9, "lowered": 9, "replaces": before.outcomes_sha256}
        return scored("one", {"hold": hold}, challenges=[*before.challenges, entered])

    base = scored("one")
    left, right = challenged(base, 0.65), challenged(base, 0.5)
    again = challenged(left, 0.6)
    for records in ([base, left, right, again], [again, right, left, base]):
        assert in_force(records) == [right]
    assert in_force([base, left, again]) == [again]
