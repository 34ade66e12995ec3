"""A worker that is lost: who is asked again and how often, and what the record and the progress bar say of it."""

from __future__ import annotations

import threading

import pytest

from robustboard.bench.journal import Journal
from robustboard.bench.operations import Reply
from robustboard.bench.pool import Pool
from robustboard.bench.remote import Workers
from robustboard.bench.retrying import RETRIES, Losses, Retrying
from robustboard.errors import LostWorkerError, ModelError, NoRoomError


class Scripted:
    """A worker that does what a script says, which all workers of a test share: a number of forwards, or an error."""

    device = "cpu"

    def __init__(self, script, group, made):
        self.jobs = 1
        self.script, self.asked, self.closed = script, [], False
        made.append(self)
        group.add(self)

    def call(self, operation, params, arrays, *, on_forwards=None):
        self.asked.append(operation)
        step = self.script.pop(0) if self.script else 0
        if isinstance(step, tuple):
            forwards, error = step
            on_forwards(forwards)
            raise error
        if isinstance(step, Exception):
            raise step
        if on_forwards is not None:
            on_forwards(step)
        return Reply({}, {}, 0.0, step, 0)

    def end(self):
        self.closed = True

    def close(self):
        self.closed = True


def gone(how="ended by SIGKILL during attack", *, silent=False):
    return LostWorkerError("The model's process was ended by SIGKILL during attack.", how=how, silent=silent)


class Bench:
    """A retrying session on scripted workers, and all that it made."""

    def __init__(self, *script):
        self.made, self.losses, self.workers = [], Losses(), Workers()
        self.script = list(script)
        self.session = Retrying(lambda group: Scripted(self.script, group, self.made), self.workers, self.losses)


def test_what_was_asked_is_asked_again_of_a_new_one():
    bench = Bench(0, gone(), 7)
    bench.session.call("check", {}, {})
    bench.session.fill = lambda worker: worker.asked.append("fill")
    assert bench.session.call("attack", {}, {}).forwards == 0
    assert [one.asked for one in bench.made] == [["check", "attack"], ["fill", "check", "attack"]]
    assert [one.closed for one in bench.made] == [True, False]
    assert bench.losses.notes() == (
        "A process of the model was lost 1 time (ended by SIGKILL during attack) and its work was asked again of a new "
        "one; no verdict depends on it.",
    )


@pytest.mark.parametrize("lesson", ["fill", "check"])
def test_who_could_not_be_taught_is_not_asked(lesson):
    """A lesson that fails in another way ends the new worker; the next question goes to one that knows everything."""
    bench = Bench(0, gone(), *([ModelError("Odd.")] if lesson == "check" else []))
    bench.session.call("check", {}, {})
    faults = [ModelError("Odd.")] if lesson == "fill" else []

    def fill(worker):
        if faults:
            raise faults.pop()
        worker.asked.append("fill")

    bench.session.fill = fill
    with pytest.raises(ModelError):
        bench.session.call("attack", {}, {})
    bench.session.call("attack", {}, {})
    assert [one.closed for one in bench.made] == [True, True, False]
    assert bench.made[2].asked == ["fill", "check", "attack"]


@pytest.mark.parametrize(("silent", "tries"), [(False, 1 + RETRIES), (True, 2)])
def test_patience_ends_and_says_after_how_many(silent, tries):
    bench = Bench(*[gone(silent=silent) for _ in range(9)])
    with pytest.raises(LostWorkerError, match=rf"SIGKILL during attack, {tries} times in a row\.$"):
        bench.session.call("attack", {}, {})
    assert len(bench.made) == tries
    assert all(one.closed for one in bench.made)


def test_losses_of_different_questions_do_not_add_up():
    bench = Bench(*[step for _ in range(5) for step in (gone(), 0)])
    for _ in range(5):
        bench.session.call("attack", {}, {})
    assert "lost 5 times" in bench.losses.notes()[0]


def test_what_a_live_model_says_is_never_asked_twice():
    bench = Bench(ModelError("NaN."))
    with pytest.raises(ModelError):
        bench.session.call("attack", {}, {})
    assert len(bench.made) == 1
    assert bench.losses.notes() == ()


def test_who_is_ended_on_purpose_is_not_replaced():
    bench = Bench(0, gone())
    bench.session.call("attack", {}, {})
    bench.workers.end()
    assert bench.made[0].closed
    with pytest.raises(LostWorkerError):
        bench.session.call("attack", {}, {})
    assert len(bench.made) == 1


def test_closing_while_a_new_one_starts_ends_that_too():
    """Ctrl-C comes at any moment, such as between a loss and the replacement's first answer."""
    bench, starting, closed = Bench(gone(), gone()), threading.Event(), threading.Event()
    make = bench.session._start

    def start(group):
        if bench.made:
            starting.set()
            closed.wait(10)
        return make(group)

    bench.session._start = start
    errors = []

    def ask():
        try:
            bench.session.call("attack", {}, {})
        except LostWorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert starting.wait(10)
    bench.session.close()
    closed.set()
    thread.join(10)
    assert len(errors) == 1
    assert [one.closed for one in bench.made] == [True, True]


def test_the_bar_does_not_move_twice_for_the_same_work():
    bench, told = Bench((30, gone()), (20, gone()), 50), []
    bench.session.call("attack", {}, {}, on_forwards=told.append)
    assert told == [30, 20]


def test_the_note_survives_a_run_that_is_killed(tmp_path):
    for name in ("first", "second"):
        bench = Bench(gone(how=name), 0)
        with Journal(tmp_path / "journal.bin", {}) as journal:
            bench.losses.kept_in(journal)
            journal.keep(name.encode(), bench.session.call("attack", {}, {}))
    assert "lost 2 times (1 x first; 1 x second)" in bench.losses.notes()[0]
    late = Losses()
    with Journal(tmp_path / "journal.bin", {}) as journal:
        late.kept_in(journal)
    assert late.notes() == bench.losses.notes()


def test_a_journal_of_nothing_but_a_note_goes(tmp_path):
    bench = Bench(gone(), 0)
    with Journal(tmp_path / "journal.bin", {}) as journal:
        bench.losses.kept_in(journal)
        bench.session.call("attack", {}, {})
    assert not (tmp_path / "journal.bin").exists()


def test_a_pool_goes_on_with_a_replaced_member():
    first, second = Bench(0, gone(), 0), Bench(0)
    pool = Pool([first.session, second.session])
    pool.call("check", {}, {})
    for _ in range(4):
        pool.call("attack", {}, {})
    assert first.made[1].asked[0] == "check"
    assert len(second.made) == 1


def without_room(bench):
    """The first loss of this bench is for good."""
    make = bench.session._start

    def start(group):
        if bench.made:
            raise NoRoomError("No room.")
        return make(group)

    bench.session._start = start
    return bench


def test_a_pool_goes_on_without_a_member_that_cannot_be_replaced():
    first, second = without_room(Bench(0, gone())), Bench(0)
    pool = Pool([first.session, second.session])
    pool.call("check", {}, {})
    for _ in range(3):
        pool.call("attack", {}, {})
    pool.call("check", {}, {})
    assert first.made[0].asked == ["check", "attack"]
    assert second.made[0].asked == ["check", "attack", "attack", "attack", "check"]


@pytest.mark.parametrize("operation", ["check", "attack"])
def test_without_the_last_member_everybody_who_waits_hears_of_it(operation):
    pool = Pool([without_room(Bench(gone())).session for _ in range(2)])
    errors = []

    def ask():
        try:
            pool.call("attack", {}, {})
        except NoRoomError as error:
            errors.append(error)

    with pytest.raises(NoRoomError, match="no room for others"):
        pool.call(operation, {}, {})
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 3
