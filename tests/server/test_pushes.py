"""A member pushes its own reply through the public port, and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from fedward.server.pushes import _PUSHES, MOST_OBJECTS, Intake, is_own_reply


def reply(objects: int = 3, node: int = 7, **changes: Any) -> PushMessagesRequest:
    said: dict[str, Any] = {
        "src_node_id": 7,
        "dst_node_id": 1,
        "reply_to_message_id": "a",
        "message_id": "root",
    } | changes
    leaves = [ObjectTree(object_id=str(number)) for number in range(objects - 1)]
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[Message(metadata=Metadata(**said))],
        message_object_trees=[ObjectTree(object_id="root", children=leaves)],
    )


@pytest.mark.parametrize("objects", [1, 3, MOST_OBJECTS])
def test_a_reply_of_ones_own_may_be_pushed(objects):
    assert is_own_reply(reply(objects))


def two_messages() -> PushMessagesRequest:
    request = reply()
    request.messages_list.append(request.messages_list[0])
    return request


def no_tree() -> PushMessagesRequest:
    request = reply()
    del request.message_object_trees[:]
    return request


def branching() -> PushMessagesRequest:
    """Few bytes a level, and twice as many objects on each."""
    request, tree = reply(), ObjectTree(object_id="x")
    for _ in range(10):
        tree = ObjectTree(object_id="root", children=[tree, tree])
    request.message_object_trees[0].CopyFrom(tree)
    return request


REFUSED: dict[str, Callable[[], PushMessagesRequest]] = {
    "a letter to another": lambda: reply(reply_to_message_id=""),
    "in the coordinator's name": lambda: reply(src_node_id=1),
    "in another's name": lambda: reply(src_node_id=8),
    "below another root, so that there may be many": lambda: reply(message_id="b"),
    "for another": lambda: reply(node=8),
    "too many objects": lambda: reply(MOST_OBJECTS + 1),
    "too many below each other": branching,
    "two messages": two_messages,
    "no objects": no_tree,
    "nothing": PushMessagesRequest,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_nothing_else_may(name):
    assert not is_own_reply(REFUSED[name]())


def test_a_reply_has_so_many_bytes_however_often_it_is_announced():
    intake = Intake(100)
    assert intake.may_announce("a")
    intake.announced("a", "1")
    assert intake.take("1", 60)
    assert not intake.take("1", 41)
    assert intake.may_announce("a")
    intake.announced("a", "2")
    assert not intake.take("2", 41)
    assert intake.take("2", 40)
    intake.announced("b", "3")
    assert intake.take("3", 100), "another letter's is its own"


def test_no_object_comes_in_a_session_that_was_not_announced():
    intake = Intake(100)
    intake.announced("a", "1")
    assert not any(intake.take(session, 1) for session in ("", "2"))


def test_a_reply_is_announced_a_few_times():
    intake = Intake(100)
    assert all(intake.may_announce("a") for _ in range(50)), "control: Flower has taken none"
    intake.announced("a", "1")
    assert [intake.may_announce("a") for _ in range(_PUSHES)] == [True] * (_PUSHES - 1) + [False]
