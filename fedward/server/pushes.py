"""What a member may push through the public port: its own reply to a letter, and not without end.

Flower checks that a request comes from the node that it names. It does not check that a message in
it is this node's, or a reply at all: a member could put letters into another's box, answer for it,
or announce objects until they fill the disk.
"""

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from google.protobuf.message import DecodeError

from fedward.server.enrolment import AsgiApp, Receive, Scope, Send, read_body, respond

PUSH_PATH = "/v1/fleet/push-messages"

MOST_OBJECTS = 512
"""Most objects of one reply; with pieces of 5 MB, a masked update of 2.5 GB."""


def only_own_replies(flower: AsgiApp, most_body: int) -> AsgiApp:
    """Flower's application behind a look at every pushed message.

    Args:
        flower: Its application.
        most_body: Most bytes of a request, as its announced length was held to.

    Guarantees:
        What a member makes the coordinator store for one letter is at most :data:`MOST_OBJECTS`
        objects of ``most_body`` bytes: Flower takes one reply to a letter, and of objects only
        those that a reply has announced.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PUSH_PATH:
            await flower(scope, receive, send)
            return
        body = await read_body(receive, most_body)
        if body is None or not _is_own_reply(body):
            await respond(send, 403)
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> dict[str, object]:
            return parts.pop() if parts else dict(await receive())

        await flower(scope, again, send)

    return app


def _is_own_reply(body: bytes) -> bool:
    """Whether a body pushes one reply of the node that pushes, with few enough objects."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    said = request.messages_list[0].metadata
    own = said.reply_to_message_id != "" and said.src_node_id == request.node.node_id
    return own and _few(request.message_object_trees[0])


def _few(tree: ObjectTree) -> bool:
    left, todo = MOST_OBJECTS, [tree]
    while todo and left:
        todo += todo.pop().children
        left -= 1
    return not todo
