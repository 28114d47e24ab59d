"""What a member may push through the public port: its own reply to a letter, and not without end.

Flower checks that a request comes from the node that it names. It does not check that a message in
it is this node's, or a reply at all: a member could put letters into another's box, answer for it,
or announce objects until they fill the disk.
"""

import threading
from dataclasses import dataclass

from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree

MOST_OBJECTS = 512
"""Most objects of one reply; with pieces of 5 MB, a masked update of 2.5 GB."""


def is_own_reply(request: PushMessagesRequest) -> bool:
    """Whether a request pushes one reply of the node that pushes, with few enough objects.

    Guarantees:
        What a member makes the coordinator store for one letter is at most :data:`MOST_OBJECTS`
        objects: Flower takes one reply to a letter, of objects only those that a reply has
        announced, and to one root no second tree; so the root must be the reply itself. How many
        bytes they have is for :class:`Intake` to say.
    """
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    said = request.messages_list[0].metadata
    own = said.reply_to_message_id != "" and said.src_node_id == request.node.node_id
    tree = request.message_object_trees[0]
    return own and tree.object_id == said.message_id and _few(tree)


def _few(tree: ObjectTree) -> bool:
    left, todo = MOST_OBJECTS, [tree]
    while todo and left:
        todo += todo.pop().children
        left -= 1
    return not todo


_PUSHES = 4  # of the reply to a letter: a site that starts anew gets its letter again twice
_KNOWN = 4096


@dataclass
class _Taken:
    """What has come in reply to one letter."""

    pushes: int = 1
    size: int = 0


class Intake:
    """How much has come in reply to each letter, and whether there may be more; thread-safe.

    Args:
        most_bytes: Most bytes of the objects of one reply.

    Guarantees:
        While this process lives, the reply to a letter is announced a few times and has
        ``most_bytes`` at most. Objects of a reply that was not announced to it are refused.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._lock = most_bytes, threading.Lock()
        self._letters, self._sessions = dict[str, _Taken](), dict[str, _Taken]()

    def may_announce(self, letter: str) -> bool:
        """Whether the reply to a letter may be announced, perhaps once more."""
        with self._lock:
            taken = self._letters.get(letter, _Taken(pushes=0))
            taken.pushes += 1
            return taken.pushes <= _PUSHES

    def announced(self, letter: str, session: str) -> None:
        """Note a reply that Flower has taken, and the session in which its objects will come."""
        with self._lock:
            self._sessions[session] = self._letters.setdefault(letter, _Taken())
            for known in (self._letters, self._sessions):
                if len(known) > _KNOWN:
                    del known[next(iter(known))]

    def take(self, session: str, size: int) -> bool:
        """Whether an object of so many bytes may come in a session; if so, it counts."""
        with self._lock:
            taken = self._sessions.get(session)
            if taken is None or taken.size + size > self._most:
                return False
            taken.size += size
            return True
