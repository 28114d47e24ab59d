"""Flower's SuperLink as the coordinator's mail office: its database, and the engine's end of it.

Two processes share Flower's database file. The *link* answers sites on the public port
(:mod:`fedward.server.fleet_api` behind :mod:`fedward.server.front`). The *round engine* puts
messages into the database and takes replies from it (:class:`LinkGrid`), through Flower's own
``LinkState``. So Flower's control and runtime APIs are served nowhere, and either process may be
killed at any instant (docs/adr/0007). These modules alone touch Flower's internals.
"""

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkState as LinkState  # for who imports it here
from flwr.server.superlink.linkstate import LinkStateFactory, SqlLinkState
from flwr.serverapp import Grid
from flwr.supercore.constant import NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.state.schema.corestate_models import Task
from flwr.supercore.state.schema.objectstore_models import ObjectChild, StoredObject
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.config_loader import (
    get_federation_manager,
    get_objectstore_linkstate_factories,
)
from sqlalchemy import delete, select, update

from fedward.errors import IdentityError, RoundError
from fedward.messages import inflate
from fedward.server.database import expect_large_pieces, retry_busy

_LOG = logging.getLogger(__name__)

_LONGEST_POLL = 0.5
_DELIVERIES = 3
_DROPPED = "dropped by Flower"  # in the place of an activation: no site has said hello then


def open_states(database: Path) -> LinkStateFactory:
    """Open, or make, Flower's database."""
    expect_large_pieces()
    manager = get_federation_manager(is_simulation=False)
    with _only_one(database):
        _, states = get_objectstore_linkstate_factories(str(database), manager)
        states.state()  # makes the tables
    return states


def open_state(database: Path) -> LinkState:
    """Open, or make, Flower's database, for one process."""
    return open_states(database).state()


@contextlib.contextmanager
def _only_one(database: Path) -> Iterator[None]:
    """Keep the other process from making the tables at the same time."""
    with database.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def admit_nodes(state: LinkState, keys: Mapping[int, str]) -> dict[int, int]:
    """Make Flower's nodes those of the roster: admit new keys, shut out all that are not in it.

    Args:
        state: Flower's database.
        keys: Site id → its node key, OpenSSH text.

    Returns:
        Site id → Flower's node id.
    """
    wanted = {site: _flower_key(key) for site, key in keys.items()}
    known = {
        node.public_key: node.node_id
        for node in state.get_node_info()
        if node.status != NodeStatus.UNREGISTERED
    }
    for key in known.keys() - set(wanted.values()):
        state.delete_node(NOOP_FLWR_AID, known[key])
    for key in set(wanted.values()) - known.keys():
        with contextlib.suppress(ValueError):  # the other process was faster
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
    nodes = {site: state.get_node_id_by_public_key(key) for site, key in wanted.items()}
    return {site: node for site, node in nodes.items() if node is not None}


def end_left_runs(state: LinkState) -> None:
    """End the Flower runs that a killed process left open, with all that belongs to them."""
    for old in state.get_run_info(statuses=["pending", "starting", "running"]):
        state.stop_run(old.run_id)


def _flower_key(text: str) -> bytes:
    """A node key as Flower keeps it."""
    key = load_ssh_public_key(text.encode())
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("a node key must be an EC P-384 key")
    return public_key_to_bytes(key)


@dataclass
class _Pending:
    """A message on its way: what was sent, when its site last said hello, its reply so far."""

    message: Message
    activation: str
    reply: Message | None = None
    parts: dict[str, bytes] = field(default_factory=dict)
    deliveries: int = 1


class LinkGrid(Grid):
    """A Flower ``Grid`` over the SuperLink's database, for the process of the round engine.

    It is a Flower run of its own. A site that went away and came back in the middle of an exchange
    gets its message again (Flower delivers once). Sites that are away count as unavailable when all
    others have answered and ``grace`` is over.

    Args:
        state: Flower's database.
        grace: Seconds.
        on_look: Called at every look for replies; what it raises ends the look.

    Raises:
        RoundError: Flower refuses to open a run.
    """

    def __init__(
        self,
        state: LinkState,
        *,
        grace: float = 30.0,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._state, self._grace, self._on_look = state, grace, on_look
        self._pending: dict[str, _Pending] = {}
        self._only_away_since: float | None = None
        self._next_look = self._last_found = 0.0
        self._run, self._task = _open_run(state)
        TaskIdentity.run_id, TaskIdentity.task_id = self._run.run_id, self._task
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def close(self) -> None:
        """End the Flower run: sites drop what they still wanted to say to it."""
        self._state.stop_run(self._run.run_id)

    def set_run(self, run: Run) -> None:
        """Nothing: the grid opens its own run."""

    @property
    def run(self) -> Run:
        """The Flower run of this grid; ours are named in the letters."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node, of this grid's run whatever other grids there are."""
        message = Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
        message.metadata.__dict__.update(_run_id=self._run.run_id, _src_task_id=self._task)
        return message

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are online."""
        return self._state.get_nodes(self._run.run_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages into the database; their nodes need not answer older ones any more."""
        messages = list(messages)
        self._give_up({message.metadata.dst_node_id for message in messages})
        activations = self._activations()
        ids = []
        with no_object_id_recompute():  # what several messages hold is hashed once
            for message in messages:
                activation = activations.get(message.metadata.dst_node_id, "")
                pending = _Pending(message=message, activation=activation)
                number = self._store(pending)
                self._pending[number] = pending
                ids.append(number)
        self._next_look = self._last_found = time.monotonic()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that are whole; a site that is gone gives Flower's error."""
        self._on_look()
        now = time.monotonic()
        if now < self._next_look:
            return []
        # The longer nothing came, the less often it looks: a training may take an hour.
        self._next_look = now + min((now - self._last_found) / 10, _LONGEST_POLL)
        asked = {number: self._pending[number] for number in message_ids}
        self._look(asked)
        found, activations = list[Message](), self._activations()
        for number, pending in asked.items():
            whole = None if pending.reply is None else self._whole(pending.reply, pending.parts)
            if whole is not None:
                found.append(whole)
                del self._pending[number]
                retry_busy(partial(self._clean, number, whole.metadata.message_id))
            else:
                said = activations.get(pending.message.metadata.dst_node_id, "")
                self._redeliver(number, pending, said)
        self._last_found = now if found else self._last_found
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until every reply is there or the time is over."""
        waiting = set(self.push_messages(messages))
        end, found = time.monotonic() + (timeout or 1e9), list[Message]()
        while waiting and time.monotonic() < end:
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            found += replies
            time.sleep(0.1)
        return found

    def _store(self, pending: _Pending) -> str:
        """Put a message and its objects into the database; returns the message's id."""
        state, run, message = self._state, self._run.run_id, pending.message

        def store() -> bool:
            session = state.start_session(run)
            header, tree = remove_content_from_message(message), get_object_tree(message)
            try:
                stored, missing = state.store_message_and_object_tree(header, tree, session)
            except ValueError:
                _evict(state, tree)
                stored, missing = state.store_message_and_object_tree(header, tree, session)
            for number, item in get_all_nested_objects(message).items():
                if stored and number in missing:
                    state.store_object(run, session, number, item.deflate())
            return stored

        number = message.object_id
        message.metadata.__dict__["_message_id"] = number
        if not retry_busy(store):  # its site is revoked
            pending.reply = Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
        return number

    def _activations(self) -> dict[int, str]:
        """When each node last said hello."""
        return {node.node_id: node.last_activated_at for node in self._state.get_node_info()}

    def _look(self, asked: Mapping[str, _Pending]) -> None:
        """Note the replies that Flower has, and since when only sites that are away are missing."""
        waiting = {number for number, pending in asked.items() if pending.reply is None}
        take = partial(self._state.get_message_res, run_id=self._run.run_id)
        replies = retry_busy(lambda: take(set(waiting)))
        now, away = time.monotonic(), dict[str, Message]()
        for reply in replies:
            number = reply.metadata.reply_to_message_id
            code = reply.error.code if reply.has_error() else None
            again = code == ErrorCode.MESSAGE_UNAVAILABLE and asked[number].deliveries < _DELIVERIES
            if code == ErrorCode.NODE_UNAVAILABLE:
                away[number] = reply
            elif again:
                asked[number].activation = _DROPPED
            else:
                asked[number].reply = reply
                continue
            self._state.object_store.delete(reply.metadata.message_id)  # made at every look
        missing = {number for number in waiting if asked[number].reply is None}
        if missing != away.keys():
            self._only_away_since = None
        elif away:
            self._only_away_since = self._only_away_since or now
            if now - self._only_away_since >= self._grace:
                for number, reply in away.items():
                    asked[number].reply = reply

    def _redeliver(self, number: str, pending: _Pending, said: str) -> None:
        """Send again what a site that said hello anew (``said``) has lost: it answers alike.

        Its answer may have been cut in two: a header whose content never comes. And what Flower has
        dropped: when a site confirms a message, its pieces are deleted; if it had been sent again
        meanwhile, the second copy then has none, and Flower forgets it.
        """
        if said == pending.activation:
            return
        pending.activation = said
        pending.deliveries += 1
        if pending.deliveries <= _DELIVERIES:
            if pending.reply is not None:
                self._state.object_store.delete(pending.reply.metadata.message_id)
                pending.reply, pending.parts = None, {}
            self._state.delete_messages({number})
            with no_object_id_recompute():
                self._store(pending)

    def _whole(self, header: Message, parts: dict[str, bytes]) -> Message | None:
        """The reply with its content, once every object of it has arrived; ``parts`` holds them."""
        state, number = self._state, header.metadata.message_id
        if header.metadata.src_node_id == SUPERLINK_NODE_ID:
            return header  # Flower's own word that there will be no reply
        try:
            tree = state.object_store.get_object_tree(number)
        except NoObjectInStoreError:
            return _lost(header)
        for node in iterate_object_tree(tree):
            if node.object_id in parts:
                continue
            content = state.get_object(self._run.run_id, node.object_id)
            if content == b"":
                return None
            if content is None:
                return _lost(header)
            parts[node.object_id] = content
        if header.has_error():
            return header
        # One piece may be named many times; what came honestly is no more put together.
        message = inflate(number, parts, sum(map(len, parts.values())))
        if message is None:
            return _lost(header)
        # The header is the database's, because the site wrote the other one.
        return make_message(header.metadata, content=message.content)

    def _give_up(self, nodes: set[int]) -> None:
        """Remove what these nodes have not answered, with as much of a reply as there is."""
        for number, old in list(self._pending.items()):
            if old.message.metadata.dst_node_id in nodes:
                self._look({number: old})
                found = [] if old.reply is None else [old.reply.metadata.message_id]
                retry_busy(partial(self._clean, number, *found))
                del self._pending[number]

    def _clean(self, *numbers: str) -> None:
        """Remove a message and its reply with everything that belongs to them."""
        for number in numbers:
            self._state.object_store.delete(number)
        self._state.delete_messages(set(numbers))


def _open_run(state: LinkState) -> tuple[Run, int]:
    """Open a Flower run for one grid."""
    number = state.create_run(
        None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
    )
    runs = state.get_run_info(run_ids=[number])
    tasks = state.get_tasks(run_ids=[number])
    if not runs or not tasks:
        raise RoundError("Flower opens no run: its database cannot be used")
    (task,) = tasks
    if state.claim_task(task.task_id) is None or not state.activate_task(task.task_id):
        raise RoundError("Flower does not start its run: its database cannot be used")
    # Flower ends for good a run of which it hears nothing for a minute of its clock: the clock may
    # be set, the machine may sleep. What a killed engine left, the next one ends (end_left_runs).
    with cast(SqlLinkState, state).session() as session:
        ours = Task.task_id == uint64_to_int64(task.task_id)
        session.execute(update(Task).where(ours).values(active_until=None))
    return runs[0], task.task_id


def _evict(state: LinkState, tree: ObjectTree) -> None:
    """Remove objects of a message that a member has announced with other children, if he knew."""
    number, named = StoredObject.object_id, StoredObject.ref_count
    with cast(SqlLinkState, state).session() as session:
        for node in iterate_object_tree(tree):
            known = select(ObjectChild.child_id).where(ObjectChild.parent_id == node.object_id)
            theirs = set(session.scalars(known))
            if theirs != {child.object_id for child in node.children}:
                session.execute(
                    update(StoredObject).where(number.in_(theirs)).values(ref_count=named - 1)
                )
                session.execute(delete(StoredObject).where(number == node.object_id))


def _lost(header: Message) -> Message:
    """Flower's error for a reply whose content never came, or is none."""
    error = Error(ErrorCode.MESSAGE_UNAVAILABLE, "the reply's content is not there")
    return make_message(header.metadata, error=error)
