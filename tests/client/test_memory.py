"""What a site must not forget is there when its process comes back."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from fedward.aggregation.transcript import Outcome
from fedward.attempt import Attempt
from fedward.client.memory import KeptTask, SiteMemory
from fedward.errors import LedgerError, LedgerRolledBack
from fedward.identity import Identity, Member, Roster
from fedward.messages import Receipt, countersign
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.chain import Chain
from fedward.privacy.ledger import Ledger

IDENTITY, COORDINATOR = Identity(bytes(32)), Identity(bytes([9]) * 32)
FIRST = Attempt(run="r", round=1)
ADAPTER = b"an adapter\nof two lines"
SESSION, ONE, OTHER = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
OUTCOME = Outcome(session=SESSION, survivors=(0, 2, 3), survivors_hash=ONE)


ROSTER = Roster(
    epoch=3,
    coordinator=COORDINATOR.public_key,
    members=(Member(id=0, name="a", public_key=IDENTITY.public_key),),
)


def task(attempt: Attempt, adapter: bytes = ADAPTER) -> KeptTask:
    return KeptTask(attempt=attempt, adapter=adapter, roster=ROSTER)


def opened_ledger(folder: Path) -> Ledger:
    return Ledger.open(folder / "ledger.jsonl", IDENTITY, epsilon=100.0, delta=1e-5)


@pytest.fixture
def ledger(tmp_path):
    ledger = opened_ledger(tmp_path)
    event = SampledGaussian(noise_multiplier=5.0, sampling_rate=1.0, steps=1)
    ledger.open_run("r", bytes(32), event, 2)
    yield ledger
    ledger.close()


@pytest.fixture
def reopen(tmp_path, ledger):
    """Opens the memory; the one before, as if its process had died, is let go first."""
    held: list[SiteMemory] = []

    def again():
        for memory in held:
            memory.close()
        held.append(SiteMemory.open(tmp_path / "memory.jsonl", IDENTITY, ledger))
        return held[-1]

    yield again
    for memory in held:
        memory.close()


def test_a_new_memory_knows_nothing(reopen):
    memory = reopen()
    assert memory.newest("r") is None
    assert memory.signed(SESSION) is None


def test_everything_is_there_after_a_crash(reopen):
    memory = reopen()
    memory.begin(FIRST)
    memory.begin(Attempt(run="r", round=2, attempt=3))
    memory.begin(Attempt(run="other", round=7))
    memory.remember_signed(OUTCOME)
    memory.remember_released(SESSION)
    memory = reopen()
    assert memory.newest("r") == (2, 1, 3)
    assert memory.newest("other") == (7, 1, 1)
    assert memory.signed(SESSION) == ONE
    assert memory.signed(OTHER) is None


def test_the_cohort_that_was_signed_is_that_of_the_newest_attempt(reopen):
    memory = reopen()
    memory.begin(FIRST)
    assert memory.cohort(FIRST) is None
    memory.remember_signed(OUTCOME)
    assert memory.cohort(FIRST) == (0, 2, 3)
    memory, again = reopen(), Attempt(run="r", round=1, attempt=2)
    assert memory.cohort(FIRST) == (0, 2, 3)
    memory.begin(again)
    assert memory.cohort(FIRST) is memory.cohort(again) is None
    memory = reopen()
    assert memory.cohort(FIRST) is memory.cohort(again) is None


def test_a_run_s_last_task_is_kept(reopen):
    memory, second = reopen(), Attempt(run="r", round=2, attempt=3)
    assert memory.last_task("r") is None
    memory.keep_task(task(FIRST, b"old"))
    memory.keep_task(task(second))
    assert reopen().last_task("r") == task(second)
    assert reopen().last_task("q") is None


def test_of_many_runs_those_used_last_are_kept(reopen, tmp_path):
    memory = reopen()
    for number, run in enumerate("abcda"):
        memory.keep_task(task(Attempt(run=run, round=1)))
        os.utime(memory._task_file(run), ns=(number, number))  # file systems' clocks may be coarse
    memory.keep_task(task(Attempt(run="e", round=1)))
    kept = [run for run in "abcde" if memory.last_task(run) is not None]
    assert kept == ["a", "c", "d", "e"]
    assert len(list((tmp_path / "tasks").iterdir())) == 4


def test_a_task_that_was_changed_on_the_disk_is_refused(reopen):
    memory = reopen()
    memory.keep_task(task(FIRST))
    path = memory._task_file("r")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerError, match="remove it"):
        memory.last_task("r")


def test_a_task_that_nobody_touched_is_not_read_again(reopen, monkeypatch):
    memory = reopen()
    memory.keep_task(task(FIRST))
    monkeypatch.setattr("fedward.client.memory.open_sealed", None)
    assert memory.last_task("r") == task(FIRST)
    with pytest.raises(TypeError):
        reopen().last_task("r")


def test_sent_is_spent_in_the_ledger_in_the_same_instant(reopen, ledger):
    memory = reopen()
    ledger.reserve(FIRST)
    assert ledger.spent("r") == 0
    memory.mark_spent(FIRST)
    assert ledger.spent("r") == 1


def test_nothing_is_sent_without_a_reservation(reopen, ledger):
    with pytest.raises(LedgerError, match="holds no reservation"):
        reopen().mark_spent(FIRST)
    assert ledger.spent("r") == 0


def test_an_altered_memory_is_refused(reopen, tmp_path):
    memory = reopen()
    memory.begin(FIRST)
    memory.close()
    path = tmp_path / "memory.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"order":[1,1,1]', b'"order":[0,1,1]'))
    with pytest.raises(LedgerError, match="line 1 was changed"):
        reopen()


def test_a_ledger_is_no_memory(tmp_path, ledger):
    with pytest.raises(LedgerError):
        SiteMemory.open(tmp_path / "ledger.jsonl", IDENTITY, ledger)
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "ledger.jsonl").read_bytes())
    with pytest.raises(LedgerError, match="not signed by this site's key"):
        SiteMemory.open(tmp_path / "copy.jsonl", IDENTITY, ledger)


def spend(ledger: Ledger, attempt: Attempt) -> None:
    ledger.reserve(attempt)
    ledger.mark_sent(attempt)


def receipt_for(ledger: Ledger) -> Receipt:
    return countersign(COORDINATOR, IDENTITY.public_key, ledger.head)


def test_an_entry_of_a_newer_version_is_refused(reopen, ledger, tmp_path):
    reopen().close()
    with Chain(tmp_path / "memory.jsonl", IDENTITY, purpose="fedward memory") as chain:
        chain.append({"kind": "released", "session": "00"})
    reopen().close()
    with Chain(tmp_path / "memory.jsonl", IDENTITY, purpose="fedward memory") as chain:
        chain.append({"kind": "promised", "session": "00"})
    with pytest.raises(LedgerError, match="'promised'; a newer version wrote it"):
        reopen()


def test_a_ledger_restored_alone_is_noticed_on_start(reopen, ledger, tmp_path):
    old = (tmp_path / "ledger.jsonl").read_bytes()
    spend(ledger, FIRST)
    reopen().keep_receipt(receipt_for(ledger))
    reopen().close()  # control: the same ledger
    ledger.close()
    (tmp_path / "ledger.jsonl").write_bytes(old)
    with (
        contextlib.closing(opened_ledger(tmp_path)) as restored,
        pytest.raises(LedgerRolledBack, match="line 2 is missing: 3 lines were once acknowledged"),
    ):
        SiteMemory.open(tmp_path / "memory.jsonl", IDENTITY, restored)


def test_only_the_newest_receipt_is_kept(reopen, ledger, tmp_path):
    memory = reopen()
    first = receipt_for(ledger)
    memory.keep_receipt(first)
    spend(ledger, FIRST)
    second = receipt_for(ledger)
    memory.keep_receipt(second)
    for known in (first, second):
        memory.keep_receipt(known)
    lines = (tmp_path / "memory.jsonl").read_text().splitlines()
    kept = [json.loads(line)["entry"] for line in lines]
    assert [entry["seq"] for entry in kept] == [1, 3]
    # What is kept is the coordinator's own word, for whoever has to be shown it.
    Receipt(seq=3, signature=kept[1]["signature"]).check(
        COORDINATOR.public_key, IDENTITY.public_key, kept[1]["head"]
    )
