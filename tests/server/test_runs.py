"""The book of runs: states, idempotence, order, restarts."""

import dataclasses
import threading
from pathlib import Path

import pytest

from fedward.errors import InvalidValue, RoundError
from fedward.server.runs import NoSuchRun, RunBook, RunState
from fedward.tuning.vector import Layout
from tests.client import desk

PLAN = desk.PLAN
LAYOUT: Layout = (("w", (2, 3)),)


@pytest.fixture
def book(tmp_path: Path) -> RunBook:
    now = iter(range(1000))
    return RunBook(tmp_path, clock=lambda: float(next(now)))


def submit(book: RunBook, *names: str) -> None:
    for name in names:
        book.submit(name, PLAN, b"start", LAYOUT)


def test_a_submitted_run_is_queued_and_kept(book, tmp_path):
    submit(book, "r")
    run = RunBook(tmp_path).get("r")
    assert (run.plan, run.start, run.layout) == (PLAN, b"start", LAYOUT)
    assert (run.state, run.reason) == (RunState.QUEUED, "")


def test_the_same_run_again_changes_nothing_and_another_is_refused(book):
    submit(book, "r")
    before = book.change("r", RunState.RUNNING)
    submit(book, "r")
    assert book.get("r") == before
    for plan, start, layout in (
        (dataclasses.replace(PLAN, seed=1), b"start", LAYOUT),
        (PLAN, b"other", LAYOUT),
        (PLAN, b"start", (("w", (3, 2)),)),
    ):
        with pytest.raises(RoundError, match="take another --name"):
            book.submit("r", plan, start, layout)


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 129])
def test_a_name_that_is_none_is_refused(book, name):
    with pytest.raises(InvalidValue):
        submit(book, name)


ALLOWED = {
    "queued": {"running", "paused", "aborted"},
    "running": {"paused", "finished", "aborted"},
    "paused": {"queued", "aborted"},
    "finished": set[str](),
    "aborted": set[str](),
}
PATHS = {
    "queued": (),
    "running": (RunState.RUNNING,),
    "paused": (RunState.PAUSED,),
    "finished": (RunState.RUNNING, RunState.FINISHED),
    "aborted": (RunState.ABORTED,),
}


@pytest.mark.parametrize("start", ALLOWED)
@pytest.mark.parametrize("end", ALLOWED)
def test_every_pair_of_states(book, start, end):
    submit(book, "r")
    for state in PATHS[start]:
        book.change("r", state)
    before = book.get("r")
    if start == end:
        assert book.change("r", RunState(end), "again") == before
    elif end in ALLOWED[start]:
        run = book.change("r", RunState(end), "why")
        assert (run.state, run.reason) == (RunState(end), "why")
        assert run.changed > before.changed
    else:
        with pytest.raises(RoundError, match=f"is {start}"):
            book.change("r", RunState(end))
        assert book.get("r") == before


def test_the_next_is_what_runs_and_then_what_waits_longest(book):
    assert book.next() is None
    submit(book, "a", "b", "c")
    assert book.next() == "a"
    book.change("b", RunState.RUNNING)
    assert book.next() == "b"  # after a restart it goes on
    assert book.next(besides={"b"}) == "a"
    assert book.next(besides={"a", "b"}) == "c"
    assert book.next(besides={"a", "b", "c"}) is None
    book.change("b", RunState.PAUSED)
    book.change("a", RunState.PAUSED)
    book.change("a", RunState.QUEUED)
    assert book.next() == "c"  # who is resumed waits behind
    book.change("c", RunState.ABORTED)
    assert book.next() == "a"


def test_an_unknown_run_is_named_with_those_that_are_known(book):
    with pytest.raises(NoSuchRun, match=r"'x'; runs: none"):
        book.get("x")
    submit(book, "a")
    with pytest.raises(NoSuchRun, match=r"runs: a"):
        book.change("x", RunState.PAUSED)
    assert [run.name for run in book.all()] == ["a"]


def test_many_threads_make_one_change(book):
    submit(book, "r")
    threads = [threading.Thread(target=book.change, args=("r", RunState.RUNNING)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert book.get("r").changed == 1.0
