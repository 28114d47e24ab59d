"""A coordinator after two sums of one update: other passes, groups, or a gate that refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedward.aggregation.planned import planned_session
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.narrow import narrowed
from fedward.client.training import TrainRequest
from fedward.errors import DataError, ModelError, SiteCode
from fedward.plan_aggregation import Aggregation
from fedward.plan_gate import Gate
from fedward.tuning.vector import dimension, replace_vector
from tests.client.desk import LAYOUT, PLAN, RUN, START, Desk

SKETCH = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="sketch"))
GATED = dataclasses.replace(PLAN, gate=Gate(data="x"))
READY, REFUSED, STALE = SiteCode.READY, SiteCode.PROTOCOL_ABORTED, SiteCode.REFUSED_STALE


def at(number: int, session: int = 1, attempt: int = 1) -> Attempt:
    return Attempt(run=RUN, round=number, session=session, attempt=attempt)


@pytest.fixture
def make_desk(tmp_path):
    desks = list[Desk]()

    def make(**options: Any) -> Desk:
        desks.append(Desk(tmp_path / str(len(desks)), **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.close()


def everybody(desk: Desk, attempt: Attempt) -> None:
    assert {desk.task(attempt, site) for site in desk.agents} == {READY}


# --- a part of the update, and no other


def test_a_session_for_more_than_the_plan_s_share_is_refused(make_desk):
    half = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="fedavg", coordinates=0.5))
    desk = make_desk(plan=half)
    everybody(desk, at(1))
    whole = {"message": desk.tally(at(1)).request()}  # the desk plans for all numbers
    assert desk.ask("hello", at(1), 0, whole)[0] is REFUSED
    hashed = task_hash(START, half.hash(), "fedavg")
    size = dimension(LAYOUT) // 2
    asked = planned_session(half, desk.roster, at(1), task_hash=hashed, dimension=size)
    message = {"message": Tally(parameters=asked, roster=desk.roster).request()}
    assert desk.ask("hello", at(1), 1, message)[0] is SiteCode.DONE, "control"


# --- one update, one first pass


def test_an_aborted_first_pass_and_the_next_never_both_get_the_update(make_desk):
    """The next attempt may have it, because nothing of it had left; then the first one is over."""
    desk = make_desk(plan=SKETCH)
    everybody(desk, at(1))
    tally, todo = desk.session(at(1), until="masked")
    everybody(desk, at(1, attempt=2))
    assert [len(trainer.requests) for trainer in desk.trainers] == [1] * 3, "the same update"
    for site, message in todo.items():
        assert desk.ask("masked", at(1), site, {"message": message})[0] is REFUSED
        assert desk.ask("second", at(1, session=2), site, {"sum": b"", "basis": b""})[0] is REFUSED
    result = desk.session(at(1, attempt=2))[0].result()
    assert result.cohort == (0, 1, 2)
    assert [desk.ledger(site).spent(RUN) for site in range(3)] == [1] * 3
    assert tally.parameters.attempt != result.parameters.attempt


def test_once_the_second_pass_has_begun_no_letter_of_the_first_is_answered(make_desk):
    desk = make_desk(plan=SKETCH)
    everybody(desk, at(1))
    before, todo = desk.session(at(1), until="unmask")
    task = desk.task_parts()
    desk.exchange(before, at(1), "unmask", todo)
    parts = {"sum": before.result().words.tobytes(), "basis": b""}
    assert desk.ask("second", at(1, session=2), 0, parts)[0] is READY
    for action in ("hello", "shares", "masked", "consistency", "unmask"):
        message = {"message": todo[0]}
        assert desk.ask(action, at(1), 0, message)[0] is REFUSED
    assert desk.ask("task", at(1), 0, task)[0] is STALE
    assert len(desk.trainers[0].requests) == 1
    assert desk.ask("unmask", at(1), 1, {"message": todo[1]})[0] is SiteCode.DONE, "control"


@pytest.mark.parametrize("fails", [False, True])
def test_an_update_is_gone_once_another_training_has_begun(make_desk, fails):
    """What a training that fails has left behind, as personal parts, is charged to nobody."""
    desk = make_desk()
    everybody(desk, at(1))
    _, todo = desk.session(at(1), until="masked")
    if fails:
        desk.trainers[0].error = DataError("gone")
        assert desk.task(at(1, session=2), 0) is not READY
    code = desk.ask("masked", at(1), 0, {"message": todo[0]})[0]
    assert code is (REFUSED if fails else SiteCode.DONE)
    assert desk.ledger(0).spent(RUN) == (not fails)


# --- a gate that refuses, or says so


def test_rounds_called_refused_are_charged_like_any_and_end_with_the_plan(make_desk):
    desk = make_desk(plan=GATED)
    for number in (1, 2, 3):
        said = {} if number == 1 else {"refused": canonical_json([1, number - 1])}
        for site in range(3):
            assert desk.task(at(number), site, **said) is READY
        desk.session(at(number))
        assert [desk.ledger(site).spent(RUN) for site in range(3)] == [number] * 3
    assert desk.task(at(4), 0, refused=canonical_json([1, 3])) is REFUSED, "no round beyond"
    again = {"refused": canonical_json([1, 2])}
    assert desk.task(at(3, session=2), 0, **again) is READY, "the spare one"
    for site in (1, 2):
        desk.task(at(3, session=2), site, **again)
    desk.session(at(3, session=2))
    assert desk.task(at(3, session=3), 0, **again) is SiteCode.REFUSED_BUDGET
    drawn = [(each.attempt.order, each.draw) for each in desk.trainers[0].requests]
    assert len(set(drawn)) == 4, "fresh noise and rounding each time"


# --- ranks


def test_a_layout_larger_than_its_adapter_is_refused_before_anything_is_that_large():
    name = "base_model.model.q_proj.lora_{}.weight"
    small = ((name.format("A"), (4, 3)), (name.format("B"), (5, 4)))
    large = ((name.format("A"), (4, 2**58)), (name.format("B"), (2**58, 4)))
    tuner = dataclasses.replace(PLAN.tuner, arguments={"r": 4, "lora_alpha": 8}, ranks={"a": 2})
    request = TrainRequest(
        plan=dataclasses.replace(SKETCH, tuner=tuner),
        attempt=at(1),
        draw=0,
        adapter=replace_vector(b"\x02\0\0\0\0\0\0\0{}", small, np.zeros(32, dtype=np.float32)),
        layout=small,
    )
    assert dimension(narrowed(request, 2).layout) == 16, "control"
    with pytest.raises(ModelError, match="is not float32 of shape"):
        narrowed(dataclasses.replace(request, layout=large), 2)
