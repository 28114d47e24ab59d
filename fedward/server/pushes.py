"""What a member may push through the public port: its own reply to a letter, and not without end.

Flower checks that a request comes from the node that it names. It does not check that a message in
it is this node's, or a reply at all: a member could put letters into another's box, answer for it,
or announce objects until they fill the disk.
"""

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree

MOST_OBJECTS = 512
"""Most objects of one reply; with pieces of 5 MB, a masked update of 2.5 GB."""


def is_own_reply(request: PushMessagesRequest) -> bool:
    """Whether a request pushes one reply of the node that pushes, with few enough objects.

    Guarantees:
        What a member makes the coordinator store for one letter is at most :data:`MOST_OBJECTS`
        objects of one request each: Flower takes one reply to a letter, and of objects only those
        that a reply has announced.
    """
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
