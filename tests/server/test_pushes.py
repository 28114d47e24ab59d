"""A member pushes its own reply through the public port, and nothing else."""

import asyncio
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node

from fedward.server.enrolment import Receive, Scope, Send
from fedward.server.front import Front
from fedward.server.pushes import MOST_OBJECTS, PUSH_PATH


def reply(objects: int = 3, node: int = 7, **changes: Any) -> PushMessagesRequest:
    said: dict[str, Any] = {
        "src_node_id": 7,
        "dst_node_id": 1,
        "reply_to_message_id": "a",
    } | changes
    leaves = [ObjectTree(object_id=str(number)) for number in range(objects - 1)]
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[Message(metadata=Metadata(**said))],
        message_object_trees=[ObjectTree(object_id="root", children=leaves)],
    )


def push(body: bytes, path: str = PUSH_PATH) -> tuple[int, bytes | None]:
    """The status of a push, in pieces, and what Flower was given of it."""
    given = list[bytes]()

    async def flower(scope: Scope, receive: Receive, send: Send) -> None:
        given.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    scope: Scope = {
        "type": "http", "path": path, "method": "POST", "client": ("a", 1),
        "headers": [(b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    half = len(body) // 2
    parts: list[dict[str, Any]] = [{"body": body[half:]}, {"body": body[:half], "more_body": True}]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", **parts.pop()}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(Front(flower, flower)(scope, receive, send))
    return sent[0]["status"], given[0] if given else None


def test_a_reply_reaches_flower_as_it_was_sent():
    for objects in (1, 3, MOST_OBJECTS):
        body = bytes(reply(objects).SerializeToString())
        assert push(body) == (200, body)


def two_messages() -> bytes:
    request = reply()
    request.messages_list.append(request.messages_list[0])
    return bytes(request.SerializeToString())


def no_tree() -> bytes:
    request = reply()
    del request.message_object_trees[:]
    return bytes(request.SerializeToString())


def branching() -> bytes:
    """Few bytes a level, and twice as many objects on each."""
    request, tree = reply(), ObjectTree(object_id="x")
    for _ in range(10):
        tree = ObjectTree(children=[tree, tree])
    request.message_object_trees[0].CopyFrom(tree)
    return bytes(request.SerializeToString())


REFUSED: dict[str, Callable[[], bytes]] = {
    "a letter to another": lambda: reply(reply_to_message_id="").SerializeToString(),
    "in the coordinator's name": lambda: reply(src_node_id=1).SerializeToString(),
    "in another's name": lambda: reply(src_node_id=8).SerializeToString(),
    "for another": lambda: reply(node=8).SerializeToString(),
    "too many objects": lambda: reply(MOST_OBJECTS + 1).SerializeToString(),
    "too many below each other": branching,
    "two messages": two_messages,
    "no objects": no_tree,
    "nothing": lambda: b"",
    "noise": lambda: b"\xff" * 9,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_nothing_else_does(name):
    assert push(REFUSED[name]()) == (403, None)
