"""A training's state survives a kill at any moment: it is the old one or the new one, never half of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustboard.defenses.checkpoints import CheckpointStore
from robustboard.errors import OutputError


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "er")
    state = {"epochs": 3, "model": {"weight": torch.arange(4.0)}, "notes": ["a", 0.5]}
    store.save("run", state)
    loaded = store.load("run")
    assert loaded is not None
    assert torch.equal(loaded.pop("model")["weight"], torch.arange(4.0))
    assert loaded == {"epochs": 3, "notes": ["a", 0.5]}


def test_names_do_not_mix_and_the_last_state_wins(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save("a", {"step": 1})
    store.save("b", {"step": 2})
    store.save("a", {"step": 3})
    assert (store.load("a"), store.load("b"), store.load("c")) == ({"step": 3}, {"step": 2}, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_without_a_folder_nothing_is_kept() -> None:
    store = CheckpointStore()
    store.save("run", {"step": 1})
    assert store.load("run") is None


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "truncated"])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: bytes | None) -> None:
    store = CheckpointStore(tmp_path)
    store.save("run", {"weight": torch.zeros(1000)})
    path = tmp_path / "run.pt"
    path.write_bytes(path.read_bytes()[:900] if damage is None else damage)
    assert store.load("run") is None


def test_a_failed_write_keeps_the_old_state(tmp_path: Path) -> None:
    """Killed half-way through writing, the store still holds what it held."""
    store = CheckpointStore(tmp_path)
    store.save("run", {"step": 1})

    class Killed(BaseException):
        def __reduce__(self) -> str | tuple[object, ...]:
            raise self

    with pytest.raises(Killed):
        store.save("run", {"step": 2, "bomb": Killed()})
    assert store.load("run") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        CheckpointStore(tmp_path / "file").save("run", {"step": 1})
