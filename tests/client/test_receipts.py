"""What a letter's receipt makes a site do, and what its answers tell of its ledger."""

import dataclasses
import json

import pytest

from fedward.attempt import Attempt
from fedward.errors import DataError, SiteCode
from fedward.messages import Receipt, countersign, open_letter, seal_letter
from tests.client.desk import RUN, SITES, Desk

FIRST, SECOND = Attempt(run=RUN, round=1), Attempt(run=RUN, round=2)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def asked(desk: Desk, attempt: Attempt, receipt: Receipt | None) -> SiteCode | None:
    """What site 0 answers to the open round's task with a receipt."""
    sealed = desk.letter("task", attempt, 0, desk.task_parts())
    letter = open_letter(sealed, desk.identity.public_key, "coordinator")
    letter = dataclasses.replace(letter, receipt=receipt)
    reply = desk.agents[0].answer(seal_letter(letter, desk.identity, "coordinator"))
    return open_letter(reply, desk.roster.key(0), "site").code


def receipts_kept(desk: Desk) -> list[int]:
    entries = (desk.folder / "0" / "memory.jsonl").read_text().splitlines()
    found = [json.loads(line)["entry"] for line in entries]
    return [entry["seq"] for entry in found if entry["kind"] == "receipt"]


def test_a_receipt_for_its_own_line_is_kept(desk):
    desk.round(1)
    receipt = countersign(desk.identity, desk.keys[0].public_key, desk.ledger(0).head)
    assert asked(desk, SECOND, receipt) is SiteCode.READY
    assert receipts_kept(desk) == [3]
    desk.restart(0)


@pytest.mark.parametrize("wrong", ["another hash", "too far", "another site", "another key", "hex"])
def test_a_wrong_receipt_is_refused_and_forgotten(desk, wrong):
    """A coordinator can always leave a site out; it cannot lock it for others or for later."""
    desk.round(1)
    seq, head = desk.ledger(0).head
    key, identity = desk.keys[0].public_key, desk.identity
    receipts = {
        "another hash": countersign(identity, key, (seq, "0" * 64)),
        "too far": countersign(identity, key, (seq + 1, head)),
        "another site": countersign(identity, desk.keys[1].public_key, (seq, head)),
        "another key": countersign(desk.keys[1], key, (seq, head)),
        "hex": Receipt(seq=seq, signature="no hex"),
    }
    assert asked(desk, SECOND, receipts[wrong]) is SiteCode.REFUSED_LEDGER
    assert receipts_kept(desk) == []
    assert len(desk.trainers[0].requests) == 1
    assert desk.ledger(0).head == (seq, head)
    desk.restart(0)
    assert asked(desk, SECOND, None) is SiteCode.READY, "control"


def test_every_answer_names_the_ledgers_newest_line(desk):
    for site in range(SITES):
        _, answer = desk.ask("task", FIRST, site, desk.task_parts())
        assert answer.lines == (desk.ledger(site).head,)
    _, todo = desk.session(FIRST, until="masked")
    _, answer = desk.ask("masked", FIRST, 0, {"message": todo[0]})
    assert answer.lines == (desk.ledger(0).head,) == ((3, desk.ledger(0).line(3)),)


def test_what_an_answer_tells_of_the_ledger_does_not_depend_on_the_data(desk):
    """The number counts letters: training that fails leaves as many lines as training that works.

    The hash is salted, so it tells nothing at all.
    """
    desk.trainers[1].error = DataError("CANARY")
    lines = [desk.ask("task", FIRST, site, desk.task_parts())[1].lines for site in range(SITES)]
    assert [[seq for seq, _ in line] for line in lines] == [[2], [2], [2]]
    assert len({head for ((_, head),) in lines}) == SITES
