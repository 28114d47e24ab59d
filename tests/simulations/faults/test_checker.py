"""For each invariant a planted bug that breaks it, and that the checker names."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from fedward.aggregation.published import SumResult
from fedward.aggregation.site_session import SiteSession
from fedward.client import status, trainer_service
from fedward.client.agent import Agent
from fedward.client.journal import Journal
from fedward.client.memory import SiteMemory
from fedward.server.store import RunStore
from fedward.simulations.faults.disk import SiteDisk
from fedward.simulations.faults.laboratory import run_schedule
from fedward.simulations.faults.schedule import Fault, Kind
from fedward.tuning.vector import replace_vector

Patch = pytest.MonkeyPatch


def spend_late(patch: Patch) -> None:
    """An update counts as sent only when the next letter comes."""
    owed, mark, answer = list[Callable[[], None]](), SiteMemory.mark_spent, Agent.answer

    def late(self, records):
        while owed:
            owed.pop()()
        return answer(self, records)

    patch.setattr(SiteMemory, "mark_spent", lambda s, a: owed.append(lambda: mark(s, a)))
    patch.setattr(Agent, "answer", late)


def count_the_absent(patch: Patch) -> None:
    """The coordinator says that everybody is in the sum."""
    patch.setattr(SumResult, "cohort", property(lambda _: (0, 1, 2, 3)))


def round_otherwise(patch: Patch) -> None:
    """The adapter is off by its last bit."""

    def wrong(before, layout, vector, moments=None):
        return replace_vector(before, layout, np.nextafter(vector, np.float32(9)), moments)

    patch.setattr("fedward.server.rounds.replace_vector", wrong)


def write_files_later(patch: Patch) -> None:
    """A blob is written when the one after it is asked for."""
    put, owed = RunStore.put_blob, list[bytes]()

    def later(self, data):
        name = put(self, data)
        (self._blobs / name).unlink()
        for before in owed:
            put(self, before)
        owed[:] = [data]
        return name

    patch.setattr(RunStore, "put_blob", later)


def find_all_stale(patch: Patch) -> None:
    """A site takes every task for an old one."""
    patch.setattr(SiteMemory, "newest", lambda *_: (99, 1, 1))


def forget_answers(patch: Patch) -> None:
    """The journal does not get what was answered."""
    record = Journal.record
    patch.setattr(
        Journal, "record", lambda s, what, facts=None: what == "answered" or record(s, what, facts)
    )


def log_the_text(patch: Patch) -> None:
    """The trainer's log gets a library's own words."""
    patch.setattr(trainer_service, "safe_repr", str)


def believe_for_ever(patch: Patch) -> None:
    """The last sign of life counts however old it is."""
    patch.setattr(status, "FRESH_SECONDS", 1e9)


def mask_again(patch: Patch) -> None:
    """A site that is asked again masks another input under the same keys."""
    masked, answer, seen = SiteSession.masked, Agent.answer, list[SiteSession]()

    def another(self, envelopes, words):
        header, vector = masked(self, envelopes, words)
        seen.append(self)
        return header, vector + np.uint32(seen.count(self) - 1)

    def forgetful(self, records):
        self._answers.clear()
        return answer(self, records)

    patch.setattr(SiteSession, "masked", another)
    patch.setattr(Agent, "answer", forgetful)


MASKED = Fault(kind=Kind.LOST, party="site-3", stage="masked", round=1)
PLANTED: dict[str, tuple[Callable[[Patch], None], Fault | None]] = {
    "I1": (spend_late, None),
    "I2": (count_the_absent, MASKED),
    "I3": (round_otherwise, None),
    "I4": (write_files_later, None),
    "I5": (find_all_stale, None),
    "I6": (forget_answers, None),
    "I7": (log_the_text, Fault(kind=Kind.CHOKE, party="trainer-1", point="trainer.asked")),
    "I8": (
        believe_for_ever,
        Fault(kind=Kind.KILL, party="site-1", point="agent.trained", seconds=90.0),
    ),
    "I9": (mask_again, dataclasses.replace(MASKED, kind=Kind.TWICE, seconds=0.1)),
}


@functools.cache
def holds(schedule: tuple[Fault, ...]) -> bool:
    """Nothing planted, nothing found; most bugs need no fault at all."""
    return not run_schedule(schedule).violations


@pytest.mark.parametrize("invariant", list(PLANTED))
def test_a_planted_bug_is_found(monkeypatch, invariant):
    plant, fault = PLANTED[invariant]
    schedule = () if fault is None else (fault,)
    assert holds(schedule)
    plant(monkeypatch)
    broken = run_schedule(schedule)
    assert invariant in {found.invariant for found in broken.violations}, broken.transcript()


def test_an_update_that_is_never_spent_is_found(monkeypatch):
    monkeypatch.setattr(SiteMemory, "mark_spent", lambda *_: None)
    assert "I1" in {found.invariant for found in run_schedule(()).violations}


KILLED_THEN_POWERLESS = (
    Fault(kind=Kind.KILL, party="site-1", point="chain.sync", stage="task", visit=3),
    Fault(kind=Kind.POWER, party="site-1", point="agent.letter", stage="hello", round=1),
)
"""Killed before its reservation is synced, started again, asked again; then the power goes."""


def test_what_a_killed_process_left_unsynced_is_synced_at_the_start(monkeypatch):
    """Found with this schedule: the site told a line of its ledger that a power loss then took."""
    outcome = run_schedule(KILLED_THEN_POWERLESS)
    assert outcome.history.fired == ["chain.sync", "agent.letter"]
    assert not outcome.violations, outcome.transcript()
    note = SiteDisk.note
    monkeypatch.setattr(
        SiteDisk, "note", lambda self, point: note(self, point.replace("opened", "open"))
    )
    broken = run_schedule(KILLED_THEN_POWERLESS)
    assert "I6" in {found.invariant for found in broken.violations}, broken.transcript()
