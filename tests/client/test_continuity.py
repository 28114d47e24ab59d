"""From round to round a site follows the sums: no fork is taken, and no gap without a word."""

import dataclasses
import os
import shutil
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from fedward.aggregation.packing import pack
from fedward.aggregation.planned import planned_session
from fedward.aggregation.schemes import next_vector
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.approval import approve
from fedward.client.last_round import published_mean
from fedward.client.memory import SiteMemory
from fedward.errors import SiteCode
from fedward.identity import Identity, Member
from fedward.privacy.noise import SecureStream
from fedward.tuning.vector import dimension, replace_vector, vector_of
from fedward.typed_toml import dump
from tests.client.desk import LAYOUT, PLAN, RUN, SITES
from tests.client.test_hostile_coordinator import MANUAL, Field


@pytest.fixture
def field(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # durability is tested elsewhere
    field = Field(tmp_path, policy=MANUAL)
    yield field
    field.close()


def at(number: int, attempt: int = 1) -> Attempt:
    return Attempt(run=RUN, round=number, attempt=attempt)


def bent(field: Field) -> bytes:
    """The open round's adapter with one coordinate one unit in the last place away."""
    vector = vector_of(field.adapter, LAYOUT)
    vector[3] = np.nextafter(vector[3], np.float32(9))
    return replace_vector(field.adapter, LAYOUT, vector)


def unchecked(field: Field) -> list[Any]:
    return [entry["rounds"] for entry in field.journal() if entry["what"] == "sums not checked"]


def test_an_honest_run_leaves_nothing_unchecked_through_every_restart(field):
    for number in (1, 2, 3):
        field.round(number)
        field.restart(0)
    assert unchecked(field) == []


@pytest.mark.parametrize("change", ["many come", "one is replaced"])
def test_who_comes_and_goes_between_rounds_changes_nothing_of_the_last_sum(field, change):
    """The grid of a sum is made for the sites there were, and whoever left was in it."""
    field.round(1)
    there = field.roster.members
    keys = [Identity(bytes([100 + number]) * 32).public_key for number in range(30)]
    come = [Member(id=9 + n, name=f"new{n}", public_key=key) for n, key in enumerate(keys)]
    members = (*there, *come) if change == "many come" else (*there[:-1], come[0])
    field.roster = dataclasses.replace(field.roster, epoch=2, members=members)
    field.restart(0)
    code = field.task(at(2), 0, adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "not what the published sum gives")
    assert field.task(at(2), 0) is SiteCode.READY
    assert unchecked(field) == []


@pytest.mark.parametrize("signed", [False, True])
def test_an_attempt_that_was_missed_may_have_had_a_newer_roster(field, monkeypatch, signed):
    """Twelve sites have another grid than three; what this site has signed has the old one."""
    assert field.task(at(1), 0) is SiteCode.READY
    come = [Member(id=9 + n, name=f"new{n}", public_key=bytes([50 + n]) * 32) for n in range(9)]
    old, members = field.roster, (*field.roster.members, *come)
    field.roster = dataclasses.replace(old, epoch=2, members=members)
    field.restart(0)
    parameters, other = (
        planned_session(PLAN, roster, at(1, 2), task_hash=bytes(32), dimension=dimension(LAYOUT))
        for roster in (field.roster, old)
    )
    assert parameters.grid != other.grid
    update = np.full(parameters.dimension, 0.1, dtype=np.float32)
    cohort = (1, 2, 9)
    words = [pack(update, np.zeros(0), parameters, SecureStream(bytes(32))) for _ in cohort]
    total = np.add.reduce(words, dtype=np.uint32).tobytes()
    mean = published_mean(total, parameters, cohort, PLAN)
    assert np.abs(mean - update).max() < 1e-6
    vector = next_vector(vector_of(field.adapter, LAYOUT), mean)
    field.adapter = replace_vector(field.adapter, LAYOUT, vector)
    cohorts = canonical_json(list(cohort))
    field.previous = {"sum": total, "cohort": cohorts, "attempt": b"2"}
    reason = "not what the published sum gives"
    if signed:
        reason = "ids of the roster"
        monkeypatch.setattr(SiteMemory, "cohort", lambda *_: cohort)
    code = field.task(at(2), 0, adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, reason)
    assert (field.task(at(2), 0) is SiteCode.READY) == (not signed)
    assert unchecked(field) == []


@pytest.mark.parametrize("restarted", [False, True])
def test_another_adapter_is_refused_after_a_restart_as_before(field, restarted):
    field.round(1)
    if restarted:
        field.restart(0)
    code = field.task(at(2), 0, adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "not what the published sum gives")
    assert field.task(at(2), 0) is SiteCode.READY, "control: the honest one"


def test_twin_a_site_that_forgets_takes_the_fork_after_a_restart(field, monkeypatch):
    field.round(1)
    monkeypatch.setattr(SiteMemory, "last_task", lambda self, run: None)
    field.restart(0)
    assert field.task(at(2), 0, adapter=bent(field)) is SiteCode.READY


@pytest.mark.parametrize("restarted", [False, True])
def test_the_cohort_that_was_signed_binds_after_a_restart_as_before(field, restarted):
    """Another number of sites would be another mean of the same sum."""
    field.round(1)
    if restarted:
        field.restart(0)
    memory = field.files[0][1]
    signed = memory.cohort(at(1))
    assert signed == tuple(range(SITES))
    memory._cohorts[RUN] = (0, 1, 3)  # as if it had signed this one
    code = field.task(at(2), 0)
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "not the one this site signed")
    memory._cohorts[RUN] = signed
    assert field.task(at(2), 0) is SiteCode.READY, "control"


@pytest.mark.parametrize("restarted", [False, True])
def test_two_adapters_for_one_round_are_refused(field, restarted):
    assert field.task(at(1), 0) is SiteCode.READY
    if restarted:
        field.restart(0)
    code = field.task(at(1, 2), 0, adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "changed between two attempts")
    assert field.task(at(1, 2), 0) is SiteCode.READY, "control: the same again"


def test_the_adapter_counts_though_the_training_failed(field):
    field.trainers[0].error = RuntimeError("out of memory")
    assert field.task(at(1), 0) is SiteCode.TRAINING_FAILED
    field.trainers[0].error = None
    code = field.task(at(1, 2), 0, adapter=bent(field))
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "changed between two attempts")


def test_a_task_of_a_round_before_is_refused_though_its_session_was_never_entered(field):
    """The memory of sessions does not know yet of round 3; the last task does."""
    field.round(1)
    assert field.task(at(3), 0) is SiteCode.READY
    code = field.task(at(2), 0)
    field.refused(code, SiteCode.PROTOCOL_ABORTED, "a newer task")


def test_a_skipped_round_is_in_the_journal(field):
    """The coordinator goes from round 1 to 3 with an adapter that no sum gives."""
    field.round(1)
    assert field.task(at(3), 0, adapter=bent(field)) is SiteCode.READY
    assert unchecked(field) == [[1, 2]]


def test_a_policy_may_refuse_what_could_not_be_checked(field):
    strict = dataclasses.replace(field.policy, every_sum=True)
    folder = field.site(0)
    folder.policy.write_text(dump(strict))
    approve(folder, PLAN, who="jo", now=datetime(2026, 5, 2, tzinfo=UTC))
    field.restart(0)
    field.round(1)
    code = field.task(at(3), 0)
    field.refused(code, SiteCode.REFUSED_POLICY, "rounds [1, 2] were not checked")
    assert unchecked(field) == [[1, 2]]
    assert len(field.trainers[0].requests) == 1, "nothing was trained"
    assert field.task(at(2), 0) is SiteCode.READY, "control: the round that follows"


def test_a_run_that_begins_in_its_middle_is_in_the_journal(field):
    assert field.task(at(2), 0, adapter=bent(field)) is SiteCode.READY
    assert unchecked(field) == [[1, 1]]


def test_what_is_missing_on_the_disk_is_said_and_what_was_changed_is_refused(field):
    field.round(1)
    tasks = field.site(0).root / "tasks"
    path = next(tasks.iterdir())
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    field.refused(field.task(at(2), 0), SiteCode.REFUSED_BUDGET, "not what this site wrote")
    shutil.rmtree(tasks)
    assert field.task(at(2), 0) is SiteCode.READY
    assert unchecked(field) == [[1, 1]]
