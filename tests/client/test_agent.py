"""A coordinator that is not honest gets a code and nothing else, and no patient pays for it."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open

from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.agent import Agent
from fedward.errors import (
    ConfigurationError,
    DataError,
    FedwardError,
    IdentityError,
    ModelError,
    PrivacyError,
    ProtocolError,
    SiteCode,
)
from fedward.identity import Identity
from fedward.messages import Letter, open_letter, seal_letter
from fedward.plan_aggregation import Aggregation
from fedward.tuning.vector import moments_of, replace_vector, vector_of
from tests.client.desk import LAYOUT, PLAN, POLICY, RUN, SITES, START, Desk, other_plan, replaced

FIRST = Attempt(run=RUN, round=1)
SECOND = Attempt(run=RUN, round=2)
CANARY = "CANARY Mrs Smith, HIV"


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def spent(desk: Desk, site: int = 0) -> int:
    return desk.ledger(site).spent(RUN)


def test_honest_rounds_are_answered_and_spent_once_each(desk):
    for number in (1, 2, 3):
        desk.round(number)
    assert [spent(desk, site) for site in range(SITES)] == [3, 3, 3]
    assert vector_of(desk.adapter, LAYOUT).dtype == np.float32


@pytest.mark.parametrize("when", ["letter", "signature"])
def test_an_unsigned_letter_gets_no_answer(desk, when):
    sealed = desk.letter("task", FIRST, 0, desk.task_parts())
    if when == "letter":
        del sealed["letter"]
    else:
        replaced(sealed, signature=bytes(64))
    with pytest.raises(IdentityError):
        desk.agents[0].answer(sealed)


def test_a_letter_signed_by_a_site_is_not_the_coordinators(desk):
    letter = Letter(action="task", attempt=FIRST, site=0, parts=desk.task_parts())
    for sender in ("coordinator", "site"):
        with pytest.raises(IdentityError):
            desk.agents[0].answer(seal_letter(letter, desk.keys[1], sender))
    with pytest.raises(IdentityError):
        desk.agents[0].answer(seal_letter(letter, desk.identity, "site"))


def test_a_letter_for_another_site_is_refused(desk):
    sealed = desk.letter("task", FIRST, 1, desk.task_parts())
    with pytest.raises(IdentityError, match="a letter for site 1 came to site 0"):
        desk.agents[0].answer(sealed)
    assert desk.trainers[0].requests == []


def test_an_altered_part_is_refused(desk):
    sealed = desk.letter("task", FIRST, 0, desk.task_parts())
    other = desk.letter("task", FIRST, 0, desk.task_parts(adapter=b"another"))
    sealed["letter"]["part.adapter"] = other["letter"]["part.adapter"]
    with pytest.raises(IdentityError, match="not the ones its sender signed"):
        desk.agents[0].answer(sealed)


def test_the_same_letter_again_gets_the_same_bytes_and_no_second_training(desk):
    letter = desk.letter("task", FIRST, 0, desk.task_parts())
    one = desk.agents[0].answer(copy.deepcopy(letter))
    two = desk.agents[0].answer(copy.deepcopy(letter))
    assert one is two
    assert len(desk.trainers[0].requests) == 1


def test_a_masked_update_asked_for_twice_is_one_update(desk):
    for site in range(SITES):
        desk.task(FIRST, site)
    _, todo = desk.session(FIRST, until="masked")
    one, two = (desk.ask("masked", FIRST, 0, {"message": todo[0]})[1] for _ in range(2))
    assert one.part("words") == two.part("words")
    assert spent(desk) == 1


def test_a_replayed_task_is_stale(desk):
    old = desk.letter("task", FIRST, 0, desk.task_parts())
    desk.round(1)
    desk.round(2)
    answer = open_letter(desk.agents[0].answer(old), desk.roster.key(0), "site")
    assert answer.code is SiteCode.REFUSED_STALE
    desk.restart(0)
    assert desk.task(FIRST, 0) is SiteCode.REFUSED_STALE
    assert desk.task(SECOND, 0) is SiteCode.REFUSED_STALE
    assert spent(desk) == 2


@pytest.mark.parametrize("action", ["hello", "shares", "masked", "consistency", "unmask"])
def test_a_session_without_its_task_is_refused(desk, action):
    desk.round(1)
    code, answer = desk.ask(action, SECOND, 0, {"message": b"x"})
    assert code is SiteCode.PROTOCOL_ABORTED
    assert answer.parts == {}


def test_another_adapter_than_the_sum_gives_is_refused(desk):
    desk.round(1)
    vector = vector_of(desk.adapter, LAYOUT)
    vector[3] = np.nextafter(vector[3], np.float32(9))  # one unit in the last place
    bent = replace_vector(desk.adapter, LAYOUT, vector)
    assert desk.task(SECOND, 0, adapter=bent) is SiteCode.PROTOCOL_ABORTED
    assert len(desk.trainers[0].requests) == 1, "nothing was trained"
    assert desk.ledger(0).remaining(RUN) == 3, "and nothing reserved"
    assert desk.task(SECOND, 0) is SiteCode.READY, "control: the honest one"


def test_other_moments_than_the_sum_gives_are_refused(tmp_path):
    plan = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="fedavg", optimizer="momentum"))
    desk = Desk(tmp_path, plan=plan)
    desk.round(1)
    vector, moments = vector_of(desk.adapter, LAYOUT), moments_of(desk.adapter)
    first = {"first": moments["first"] + np.float32(0.001)}
    bent = replace_vector(desk.adapter, LAYOUT, vector, first)
    assert desk.task(SECOND, 0, adapter=bent) is SiteCode.PROTOCOL_ABORTED
    assert desk.task(SECOND, 0) is SiteCode.READY, "control: the honest one"
    desk.close()


def test_a_first_round_that_starts_with_moments_is_refused(tmp_path):
    """The next adapter follows from them, so they would put in any adapter."""
    plan = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="fedavg", optimizer="momentum"))
    desk = Desk(tmp_path, plan=plan)
    loaded = replace_vector(
        START, LAYOUT, vector_of(START, LAYOUT), {"first": np.full(10, 1000, dtype=np.float32)}
    )
    assert desk.task(FIRST, 0, adapter=loaded) is SiteCode.PROTOCOL_ABORTED
    assert desk.task(FIRST, 0) is SiteCode.READY, "control: the honest one"
    desk.close()


def test_a_run_beside_it_does_not_end_the_recomputing(tmp_path):
    desk = Desk(tmp_path, policy=dataclasses.replace(POLICY, max_epsilon=80.0))
    desk.round(1)
    assert desk.task(Attempt(run="beside", round=1), 0, adapter=START) is SiteCode.READY
    bent = replace_vector(desk.adapter, LAYOUT, vector_of(desk.adapter, LAYOUT) + np.float32(1))
    assert desk.task(SECOND, 0, adapter=bent) is SiteCode.PROTOCOL_ABORTED
    assert desk.task(SECOND, 0) is SiteCode.READY, "control: the honest one"
    desk.close()


@pytest.mark.parametrize(
    "cohort", [b"[0,1]", b"[0,1,7]", b"[1,0,2]", b"[0]", b"[]", b"{}", b"[[0],1,2]", b"[0,1,2"]
)
def test_another_cohort_than_the_one_it_signed_is_refused(desk, cohort):
    desk.round(1)
    code = desk.task(SECOND, 0, cohort=cohort)
    assert code in {SiteCode.PROTOCOL_ABORTED, SiteCode.TRAINING_FAILED}
    assert len(desk.trainers[0].requests) == 1


@pytest.mark.parametrize("number", [b"0", b"1", b"true", b"x", b"[2]", b"2.0", b"99999999999"])
def test_a_sum_of_an_attempt_that_never_counted_is_refused(desk, number):
    desk.round(1, attempt=2)
    code, _ = desk.ask("task", SECOND, 0, {**desk.task_parts(), "attempt": number})
    assert code in {SiteCode.PROTOCOL_ABORTED, SiteCode.REFUSED_PLAN}
    assert len(desk.trainers[0].requests) == 1
    assert desk.task(SECOND, 0) is SiteCode.READY, "control: the honest one"


@pytest.mark.parametrize("total", [b"", b"123", bytes(4), bytes(4 * 11)])
def test_a_sum_of_another_size_is_refused(desk, total):
    desk.round(1)
    code = desk.task(SECOND, 0, sum=total)
    assert code in {SiteCode.PROTOCOL_ABORTED, SiteCode.TRAINING_FAILED}


@pytest.mark.parametrize("part", ["plan", "layout", "sum", "cohort", "attempt"])
def test_a_task_without_one_of_its_parts_is_refused(desk, part):
    desk.round(1)
    parts = desk.task_parts()
    del parts[part]
    code, answer = desk.ask("task", SECOND, 0, parts)
    assert (code, answer.parts) == (SiteCode.PROTOCOL_ABORTED, {})


def test_a_task_without_an_adapter_is_for_who_can_make_it_from_the_sum(desk):
    desk.round(1)
    parts = desk.task_parts()
    del parts["adapter"]
    desk.agents[1]._memory._task_file(RUN).unlink()  # a disk that lost it
    assert desk.ask("task", SECOND, 1, parts)[0] is SiteCode.PROTOCOL_ABORTED
    assert desk.ask("task", SECOND, 0, parts)[0] is SiteCode.READY
    assert desk.trainers[0].requests[-1].adapter == desk.adapter
    assert desk.task(Attempt(run=RUN, round=2, attempt=2), 1) is SiteCode.READY, "told in full"


def test_a_changed_plan_is_refused_within_a_run(desk):
    desk.round(1)
    assert desk.task(SECOND, 0, plan=other_plan()) is SiteCode.REFUSED_BUDGET
    assert len(desk.trainers[0].requests) == 1


def test_another_run_must_fit_beside_the_first(desk):
    """The whole budget is promised to the first run: a second one is refused, not squeezed in."""
    desk.round(1)
    assert desk.task(Attempt(run="another", round=1), 0) is SiteCode.REFUSED_BUDGET


def test_a_site_killed_in_its_training_needs_no_adapter_when_it_is_asked_again(desk):
    desk.round(1)
    second = Attempt(run=RUN, round=2)
    parts = {name: part for name, part in desk.task_parts().items() if name != "adapter"}
    for _ in range(2):
        assert desk.ask("task", second, 0, parts)[0] is SiteCode.READY
        desk.restart(0)
    for site in range(SITES):
        assert desk.task(second, site) is SiteCode.READY
    desk.session(second)
    assert desk.ledger(0).spent(RUN) == 2


def test_another_adapter_for_a_second_attempt_is_refused(desk):
    assert desk.task(FIRST, 0) is SiteCode.READY
    bent = replace_vector(START, LAYOUT, np.ones(10, dtype=np.float32))
    again = Attempt(run=RUN, round=1, attempt=2)
    assert desk.task(again, 0, adapter=bent) is SiteCode.PROTOCOL_ABORTED
    assert desk.task(again, 0) is SiteCode.READY, "control: the same one"


def test_an_attempt_that_sent_nothing_costs_nothing_and_keeps_its_update(desk):
    for number in (1, 2, 3):
        assert desk.task(Attempt(run=RUN, round=1, attempt=number), 0) is SiteCode.READY
    assert len(desk.trainers[0].requests) == 1
    assert spent(desk) == 0


def test_after_sent_a_new_attempt_needs_a_new_update_and_a_spare_round(desk):
    for number in (1, 2, 3, 4):
        now = Attempt(run=RUN, round=1, attempt=number)
        assert all(desk.task(now, site) is SiteCode.READY for site in range(SITES))
        desk.session(now, until="consistency")
    draws = [request.draw for request in desk.trainers[0].requests]
    assert draws == [0, 1, 2, 3]
    assert desk.task(Attempt(run=RUN, round=1, attempt=5), 0) is SiteCode.REFUSED_BUDGET
    assert len(desk.trainers[0].requests) == 4


@pytest.mark.parametrize("until", ["hello", "shares", "masked", "consistency", "unmask"])
def test_a_site_killed_in_a_session_never_sends_another_masked_update_in_it(desk, until):
    for site in range(SITES):
        desk.task(FIRST, site)
    _, todo = desk.session(FIRST, until=until)
    before = spent(desk)
    desk.restart(0)
    code, answer = desk.ask(until, FIRST, 0, {"message": todo[0]})
    assert (code, answer.parts) == (SiteCode.PROTOCOL_ABORTED, {})
    assert spent(desk) == before == (until in {"consistency", "unmask"})
    again = Attempt(run=RUN, round=1, attempt=2)
    assert desk.task(again, 0) is SiteCode.READY
    assert desk.trainers[0].requests[-1].draw == before, "fresh noise exactly if one was sent"


def test_other_parameters_than_the_sites_own_end_its_session(desk):
    """A smaller cohort, another grid or task: the site derives them all from the plan."""
    for site in range(SITES):
        desk.task(FIRST, site)
    honest = desk.tally(FIRST).request()
    for key, value in (("minimum", 4), ("colluders", 1), ("task_hash", "00" * 32)):
        fields = {**json.loads(honest), key: value}
        code, _ = desk.ask("hello", FIRST, 1, {"message": canonical_json(fields)})
        assert code is SiteCode.PROTOCOL_ABORTED
    assert desk.ask("hello", FIRST, 0, {"message": honest})[0] is SiteCode.DONE, "control"


def test_a_site_that_missed_a_round_takes_part_again(desk):
    desk.round(1)
    desk.restart(0)
    desk.round(2)
    assert [spent(desk, site) for site in range(SITES)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError(CANARY), SiteCode.DATA_UNUSABLE),
        (ModelError(CANARY), SiteCode.TRAINING_FAILED),
        (ConfigurationError(CANARY), SiteCode.REFUSED_PLAN),
        (PrivacyError(CANARY), SiteCode.INTERNAL),
        (ProtocolError(CANARY), SiteCode.PROTOCOL_ABORTED),
        (ValueError(CANARY), SiteCode.TRAINING_FAILED),
        (KeyError(CANARY), SiteCode.TRAINING_FAILED),
        (RuntimeError(CANARY), SiteCode.TRAINING_FAILED),
        (MemoryError(CANARY), SiteCode.TRAINING_FAILED),
        (AssertionError(CANARY), SiteCode.TRAINING_FAILED),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), SiteCode.TRAINING_FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_leaves_as_a_code_without_its_text(desk, caplog, error, code):
    desk.trainers[0].error = error
    sealed = desk.agents[0].answer(desk.letter("task", FIRST, 0, desk.task_parts()))
    answer = open_letter(sealed, desk.roster.key(0), "site")
    assert answer.code is code
    assert answer.parts == {}
    crossed = sealed.config_records["letter"]["header"]
    assert b"CANARY" not in crossed
    # A library's words, which may quote a record, stay out of the site's own log as well.
    assert ("CANARY" in caplog.text) == isinstance(error, FedwardError)


def test_what_no_library_raises_is_a_bug_and_is_seen(desk):
    desk.trainers[0].error = StopIteration("a bug")
    with pytest.raises(StopIteration):
        desk.task(FIRST, 0)


def test_answers_of_one_kind_are_all_of_one_size(desk):
    """What was wrong must not be told by the length of the answer."""
    sizes = set()
    for number, error in enumerate((DataError("x"), DataError("y" * 999)), start=1):
        desk.trainers[0].error = error
        now = Attempt(run=RUN, round=1, attempt=number)
        sealed = desk.agents[0].answer(desk.letter("task", now, 0, desk.task_parts()))
        sizes.add(len(sealed.config_records["letter"]["header"]))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "error", [DataError(CANARY), ModelError(CANARY), ValueError(CANARY), AssertionError(CANARY)]
)
def test_how_an_evaluation_went_stays_at_the_site(desk, caplog, error):
    """It is an exact statement about patients: the answer is the same whatever came out."""
    desk.task(FIRST, 0)
    desk.trainers[0].error = error
    code, answer = desk.ask("evaluate", FIRST, 0, desk.task_parts())
    assert (code, answer.parts) == (SiteCode.DONE, {})
    assert "CANARY" not in caplog.text


def test_nothing_is_evaluated_under_a_plan_that_the_ledger_does_not_know(desk):
    code, _ = desk.ask("evaluate", FIRST, 0, desk.task_parts())
    assert code is SiteCode.REFUSED_PLAN
    desk.task(FIRST, 0)
    code, _ = desk.ask("evaluate", FIRST, 0, desk.task_parts(plan=other_plan()))
    assert code is SiteCode.REFUSED_PLAN


def test_an_agent_has_the_key_that_the_roster_names(desk):
    ledger, memory = desk.files[0]
    with pytest.raises(IdentityError, match="not the one in the roster"):
        Agent(
            site=0,
            identity=Identity(bytes([77]) * 32),
            roster=desk.roster,
            policy=desk.policy,
            ledger=ledger,
            memory=memory,
            trainer=desk.trainers[0],
        )


@pytest.mark.parametrize(
    "plan",
    [
        b"{}",
        b"not json",
        PLAN.to_json() + b" ",
        PLAN.to_json().replace(b'"count":3', b'"count":4'),
        PLAN.to_json().replace(b'"epsilon":8.0', b'"epsilon":9.0'),
        PLAN.to_json().replace(b'"epsilon":8.0', b'"epsilon":0.0'),
        PLAN.to_json().replace(b'"epsilon":8.0', b'"epsilon":Infinity'),
        PLAN.to_json().replace(b'"minimum":3', b'"minimum":2'),
        PLAN.to_json().replace(b'"a' + b"a" * 63, b'"b' + b"a" * 63),
    ],
)
def test_a_plan_that_is_none_or_beyond_the_policy_is_refused(desk, plan):
    code, answer = desk.ask("task", FIRST, 0, {**desk.task_parts(), "plan": plan})
    assert code in {SiteCode.REFUSED_PLAN, SiteCode.REFUSED_POLICY}
    assert answer.parts == {}
    assert desk.ledger(0).head[0] == 0, "the ledger never heard of it"


def test_the_start_is_what_it_says(tmp_path):
    """Control of the desk: its first adapter is a file that safetensors reads."""
    (tmp_path / "start.safetensors").write_bytes(START)
    with safe_open(tmp_path / "start.safetensors", "np") as file:
        assert set(file.keys()) == {"a", "b"}
