"""Two records side by side: what is shared, what is refused, and the numbers against those of the outcome tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from robustboard.errors import RecordError
from robustboard.leaderboard.comparison import SHARES, compare_records
from robustboard.leaderboard.record import Record

Build = Callable[..., Record]


@pytest.mark.parametrize("share", SHARES)
def test_the_shares_are_those_of_the_shared_examples(scored: Build, share: str) -> None:
    whole, fewer = scored("whole", {"n": 60}), scored("fewer", {"n": 40, "hold": 0.9, "clean": 0.95, "seed": 3})
    found = compare_records(whole, fewer, share=share)
    verdicts = [record.outcomes.set_index("example")["verdict"] for record in (whole, fewer)]
    held = [verdict.reindex(verdicts[1].index).isin(SHARES[share]) for verdict in verdicts]
    assert found.n == 40
    assert (found.first, found.second) == (held[0].mean(), held[1].mean())
    assert found.only_first == (held[0] & ~held[1]).sum()
    assert found.difference == pytest.approx(found.first - found.second)
    assert found.low <= found.difference <= found.high
    assert fewer.metrics[share].value == found.second


def test_swapping_the_records_turns_the_difference_round(scored: Build) -> None:
    one, two = scored("one", {"hold": 0.8}), scored("two", {"hold": 0.6, "seed": 4})
    there, back = compare_records(one, two), compare_records(two, one)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p_value == back.p_value


def test_records_of_different_tracks_do_not_compare(scored: Build) -> None:
    other = scored("two", track={"id": "digits-linf@1", "hash": "ab" * 32, "content": {}})
    with pytest.raises(RecordError, match=r"different tracks, .*3f3f3f.*abababab"):
        compare_records(scored("one"), other)


def test_an_unknown_share_is_one_sentence(scored: Build) -> None:
    with pytest.raises(RecordError, match="choose from clean, robust, certified"):
        compare_records(scored("one"), scored("two"), share="pgd")
