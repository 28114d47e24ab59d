"""A site in the second pass of a round: one update, one set of sites, once (scheme ``sketch``)."""

import dataclasses
import json

import numpy as np
import pytest

from fedward.aggregation.planned import planned_session
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import second_task_hash
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.last_round import read_committed
from fedward.errors import ProtocolError, SiteCode
from fedward.plan_aggregation import Aggregation
from tests.client.desk import PLAN, RUN, SITES, Desk

SKETCH = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="sketch"))
FIRST, SECOND = (Attempt(run=RUN, round=1, session=session) for session in (1, 2))
REFUSED = SiteCode.PROTOCOL_ABORTED


@pytest.fixture
def desk(tmp_path):
    """Sites without a LoRA layer: the basis is empty, and the second pass has no word."""
    made = Desk(tmp_path, plan=SKETCH)
    for site in range(SITES):
        assert made.task(FIRST, site) is SiteCode.READY
    yield made
    made.close()


def first_pass(desk: Desk) -> tuple[Tally, dict[str, bytes]]:
    """The first pass, and the parts of the second one's letter."""
    tally = desk.session(FIRST)[0]
    return tally, {"sum": tally.result().words.tobytes(), "basis": b""}


def second_tally(desk: Desk, tally: Tally, parts: dict[str, bytes]) -> Tally:
    assert tally._outcome is not None
    bound = (tally.parameters.task_hash, tally._outcome, parts["sum"], parts["basis"])
    parameters = planned_session(
        desk.plan,
        desk.roster,
        SECOND,
        task_hash=second_task_hash(*bound),
        dimension=0,
        cohort=tally._outcome.survivors,
    )
    return Tally(parameters=parameters, roster=desk.roster)


def code(desk: Desk, attempt: Attempt, parts: dict[str, bytes], site: int = 0) -> SiteCode | None:
    return desk.ask("second", attempt, site, parts)[0]


def test_a_second_pass_spends_what_the_first_has_spent(desk):
    tally, parts = first_pass(desk)
    assert [code(desk, SECOND, parts, site) for site in range(SITES)] == [SiteCode.READY] * SITES
    again = second_tally(desk, tally, parts)
    todo = dict.fromkeys(range(SITES), again.request())
    for action, close in (
        ("hello", again.close_hellos),
        ("shares", again.close_shares),
        ("masked", again.close_masked),
        ("consistency", again.close_consistency),
    ):
        desk.exchange(again, SECOND, action, todo)
        todo = close()
    desk.exchange(again, SECOND, "unmask", todo)
    assert again.result().cohort == tuple(range(SITES))
    for site in range(SITES):
        assert desk.ledger(site).spent(RUN) == 1
        assert desk.files[site][1].cohort(SECOND) == tuple(range(SITES))


@pytest.mark.parametrize("until", ["hello", "shares", "masked", "consistency", "unmask"])
def test_no_second_pass_before_the_first_one_s_sum_is_certified(desk, until):
    """Else two survivor sets, neither of them certified, could each get a second pass."""
    desk.session(FIRST, until=until)
    assert code(desk, SECOND, {"sum": bytes(40), "basis": b""}) is REFUSED


def test_a_site_that_was_restarted_holds_no_update(desk):
    _, parts = first_pass(desk)
    desk.restart(0)
    assert code(desk, SECOND, parts) is REFUSED
    assert code(desk, SECOND, parts, site=1) is SiteCode.READY, "control"


def test_an_update_enters_one_second_pass(desk):
    """Not another attempt, not another sum, and after a failure not even the same again."""
    _, parts = first_pass(desk)
    assert code(desk, SECOND, parts) is SiteCode.READY
    assert code(desk, SECOND, parts) is SiteCode.READY, "the same letter has the same answer"
    changed = {**parts, "sum": bytes(len(parts["sum"]))}
    other = dataclasses.replace(SECOND, attempt=2)
    for attempt, asked in ((SECOND, changed), (other, parts), (other, changed)):
        assert code(desk, attempt, asked) is REFUSED
    assert code(desk, SECOND, {**parts, "basis": b"\0"}, site=1) is REFUSED
    assert code(desk, SECOND, parts, site=1) is REFUSED, "it has let the update go"


@pytest.mark.parametrize("order", [(1, 2, 2), (1, 3, 1), (1, 4, 1), (2, 2, 1), (1, 1, 1)])
def test_a_second_pass_of_another_attempt(desk, order):
    _, parts = first_pass(desk)
    number, session, attempt = order
    wrong = Attempt(run=RUN, round=number, session=session, attempt=attempt)
    assert code(desk, wrong, parts) is REFUSED
    assert code(desk, SECOND, parts) is SiteCode.READY, "control: it was not for what is held"


@pytest.mark.parametrize("order", [(1, 1, 2), (1, 3, 2)])
def test_after_a_first_pass_another_task_has_another_update(desk, order):
    first_pass(desk)
    number, session, attempt = order
    again = Attempt(run=RUN, round=number, session=session, attempt=attempt)
    assert desk.task(again, 0) is SiteCode.READY
    one, other = desk.trainers[0].requests
    assert (one.attempt.session, one.draw) != (other.attempt.session, other.draw), "fresh noise"
    assert desk.ledger(0).remaining(RUN) == 2, "one of four is spent, one is held"
    assert code(desk, SECOND, {"sum": bytes(40), "basis": b""}) is REFUSED


def test_no_task_is_for_a_second_pass(desk):
    assert desk.task(SECOND, 0) is REFUSED
    assert desk.task(Attempt(run=RUN, round=1, session=3), 0) is SiteCode.READY, "control"


def test_only_the_scheme_has_second_passes(tmp_path):
    desk = Desk(tmp_path)
    for site in range(SITES):
        desk.task(FIRST, site)
    _, parts = first_pass(desk)
    assert code(desk, SECOND, parts) is REFUSED
    desk.close()


def test_a_sum_that_is_too_long_gets_no_second_pass(desk):
    first_pass(desk)
    words = np.full(10, 1 << 30, dtype=np.uint32)
    assert code(desk, SECOND, {"sum": words.tobytes(), "basis": b""}) is REFUSED


def test_other_sums_give_other_sessions(desk):
    """Sites that were shown two bases or sums never share a session."""
    tally, parts = first_pass(desk)
    for site in range(SITES):
        code(desk, SECOND, parts, site)
    honest = second_tally(desk, tally, parts).request()
    other = {**parts, "sum": (np.frombuffer(parts["sum"], np.uint32) + 1).tobytes()}
    forged = second_tally(desk, tally, other).request()
    assert desk.ask("hello", SECOND, 0, {"message": forged})[0] is REFUSED
    assert desk.ask("hello", SECOND, 1, {"message": honest})[0] is SiteCode.DONE, "control"
    fields = {**json.loads(honest), "cohort": [0, 1], "minimum": 3}
    assert desk.ask("hello", SECOND, 2, {"message": canonical_json(fields)})[0] is REFUSED


def test_which_second_pass_was_committed():
    assert read_committed(b"3", FIRST) == dataclasses.replace(FIRST, attempt=3)
    assert read_committed(b"[4,2]", FIRST).order == (1, 4, 2)
    later = dataclasses.replace(FIRST, session=3, attempt=2)
    for data in (b"1", b"[2,9]", b"[4]", b"[4,2,1]", b'["4",2]', b"[4,0]", b"[4,true]", b"{}"):
        with pytest.raises(ProtocolError):
            read_committed(data, later)
