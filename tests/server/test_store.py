"""The coordinator's events survive anything, count once, and show tampering."""

import sqlite3

import pytest

from fedward.attempt import Attempt
from fedward.errors import RoundError
from fedward.server.store import BEGINNING, Phase, RunStore

FIRST = Attempt(run="r", round=1)


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path)
    yield store
    store.close()


def test_events_come_back_in_order(store, tmp_path):
    store.record(FIRST, Phase.STARTED, {"plan": "p"})
    store.record(FIRST, Phase.READY, site=3)
    again = RunStore(tmp_path)
    found = [(e.phase, e.site, e.payload) for e in again.events("r")]
    again.close()
    assert found == [(Phase.STARTED, -1, b'{"plan":"p"}'), (Phase.READY, 3, b"null")]


def test_the_same_event_counts_once(store):
    for _ in range(2):
        store.record(FIRST, Phase.READY, {"x": 1}, site=3)
    assert len(store.events("r")) == 1


def test_the_same_event_with_other_facts_is_refused(store):
    store.record(FIRST, Phase.READY, {"x": 1}, site=3)
    with pytest.raises(RoundError, match="other facts"):
        store.record(FIRST, Phase.READY, {"x": 2}, site=3)


def test_who_goes_on_from_a_mark_gets_what_is_new(store):
    store.record(FIRST, Phase.STARTED)
    events, mark = store.events_after("r", BEGINNING)
    assert [e.phase for e in events] == [Phase.STARTED]
    assert store.events_after("r", mark) == ([], mark)
    store.record(Attempt(run="other", round=1), Phase.STARTED)
    store.record(FIRST, Phase.READY, site=3)
    events, later = store.events_after("r", mark)
    assert [e.phase for e in events] == [Phase.READY]
    assert store.events_after("other", mark)[1] == later
    assert later.seq == 3


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE event SET hash = x'31' WHERE seq = 2",
        "DELETE FROM event WHERE seq >= 2",
        "UPDATE event SET payload = x'31' WHERE seq = 3",
        "UPDATE event SET seq = 9 WHERE seq = 2",
    ],
)
def test_a_change_after_a_mark_or_of_the_marked_event_is_noticed(store, tmp_path, change):
    for number in (1, 2):
        store.record(Attempt(run="r", round=number), Phase.STARTED)
    mark = store.events_after("r", BEGINNING)[1]
    store.record(Attempt(run="r", round=3), Phase.STARTED)
    with sqlite3.connect(tmp_path / "runs.sqlite") as db:
        db.execute(change)
    db.close()
    with pytest.raises(RoundError, match="broken"):
        store.events_after("r", mark)


def test_runs_are_apart(store):
    store.record(FIRST, Phase.STARTED)
    assert store.events("another") == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE event SET payload = x'31' WHERE seq = 2",
        "UPDATE event SET site = 9 WHERE seq = 2",
        "DELETE FROM event WHERE seq = 2",
    ],
)
def test_a_changed_event_is_noticed(store, tmp_path, change):
    for number in (1, 2, 3):
        store.record(Attempt(run="r", round=number), Phase.STARTED)
    with sqlite3.connect(tmp_path / "runs.sqlite") as db:
        db.execute(change)
    db.close()
    with pytest.raises(RoundError, match="broken"):
        store.events("r")


def test_blobs_come_back_and_damage_is_noticed(store, tmp_path):
    name = store.put_blob(b"adapter")
    assert store.put_blob(b"adapter") == name
    assert store.blob(name) == b"adapter"
    (tmp_path / "blobs" / name).write_bytes(b"adaptor")
    with pytest.raises(RoundError, match="damaged"):
        store.blob(name)
    store.put_blob(b"adapter")  # again, which writes nothing
    with pytest.raises(RoundError, match="damaged"):
        store.blob(name)
    with pytest.raises(RoundError, match="missing"):
        store.blob("0" * 64)
