"""The ClientApp hands letters to the agent, and a stranger learns one fixed word."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedward.attempt import Attempt
from fedward.client.app import client_app
from fedward.errors import DataError, SiteCode
from fedward.messages import MESSAGE_TYPES, open_letter
from fedward.simulations.grid import LocalGrid
from tests.client.desk import RUN, Desk

FIRST = Attempt(run=RUN, round=1)
CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def send(desk: Desk, content: RecordDict, kind: str) -> Message:
    """One message through the site's ClientApp, over the in-process grid."""
    grid = LocalGrid({2: lambda: client_app(desk.agents[0])})
    try:
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, 2, "1")])
        return reply
    finally:
        grid.close()


@pytest.mark.parametrize("action", MESSAGE_TYPES)
def test_every_message_type_reaches_the_agent(desk, action):
    content = desk.letter(action, FIRST, 0, {**desk.task_parts(), "message": b"x"})
    reply = send(desk, content, MESSAGE_TYPES[action])
    answer = open_letter(reply.content, desk.roster.key(0), "site")
    assert answer.action == action
    expected = {"task": SiteCode.READY, "evaluate": SiteCode.REFUSED_PLAN}
    assert answer.code is expected.get(action, SiteCode.PROTOCOL_ABORTED)


@pytest.mark.parametrize("forged", [False, True])
def test_a_stranger_gets_one_fixed_word(desk, forged):
    content = desk.letter("task", FIRST, 0, desk.task_parts())
    if forged:
        content.config_records["letter"]["signature"] = bytes(64)
    else:
        content = RecordDict({"anything": ConfigRecord({"x": 1})})
    reply = send(desk, content, "train")
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.reason == SiteCode.REFUSED_SIGNATURE


def test_no_text_of_an_error_is_in_the_reply(desk):
    desk.trainers[0].error = DataError("CANARY")
    reply = send(desk, desk.letter("task", FIRST, 0, desk.task_parts()), "train")
    assert "CANARY" not in repr(reply.content)
    assert "CANARY" not in repr(reply.metadata)


def test_a_message_type_that_nobody_asked_for_is_unknown(desk):
    app = client_app(desk.agents[0])
    content = desk.letter("task", FIRST, 0, desk.task_parts())
    message = Message(content, 2, "query")
    with pytest.raises(ValueError, match="query"):
        app(message=message, context=CONTEXT)
