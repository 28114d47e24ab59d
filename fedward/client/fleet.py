"""The site's side of Flower's Fleet API: one resident process that only ever calls out.

The only module of the site that touches Flower's internals. A stock SuperNode would run code that
the coordinator ships, in a new process for every message; this client asks for messages, answers
them with the locally installed ClientApp, and never asks for a bundle. It reconnects for ever:
through restarts of the coordinator, cut networks and proxies (``HTTPS_PROXY`` is honoured).
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError

from fedward.client.codes import LIBRARY_ERRORS
from fedward.errors import FedwardError, IdentityError, SiteCode
from fedward.messages import inflate

_LOG = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15
"""Flower takes a node for offline after twice this time without a sign of life."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0
_SHORTEST_POLL, _LONGEST_POLL = 0.1, 1.0
_OBJECT_SECONDS = 180.0

_MOST_ANSWER = 8 << 20
"""Most bytes of one answer; Flower sends arrays in pieces of 5 MB."""

_LIBRARY_ERRORS = (DecodeError, *LIBRARY_ERRORS)
"""What Flower raises on bytes that somebody made up, and other libraries on anything."""


@dataclass(frozen=True, kw_only=True)
class Office:
    """Where a site's messages lie, and how it proves who it is.

    Args:
        address: ``HOST:PORT`` of the coordinator's public port.
        ca: The only certificate authority that its TLS is trusted by (PEM file).
        key: The site's EC P-384 node key (OpenSSH file).
        note: A file that remembers the node between two starts of this process.
        most_bytes: Most bytes of one message, as it is sent and as it is put together again.
    """

    address: str
    ca: Path
    key: Path
    note: Path
    most_bytes: int = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Presence:
    """A node that is online until its presence is over."""

    node: Node
    over: threading.Event = field(default_factory=threading.Event)


def stay_connected(
    app: ClientApp,
    office: Office,
    stop: threading.Event,
    on_state: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer the coordinator's messages until told to stop, through every loss of connection.

    Args:
        app: The site's ClientApp; if it raises, the coordinator gets a fixed code.
        office: Where to connect.
        stop: Ends the work after the message in hand.
        on_state: Told ``connected`` or ``disconnected`` at every change.

    Raises:
        IdentityError: The node key cannot be read.
    """
    key, pause = _load_key(office.key), _FIRST_PAUSE
    while not stop.is_set():
        try:
            with _open_client(office, key) as client, _activated(client, office, key) as presence:
                on_state("connected")
                pause = _FIRST_PAUSE
                _serve(app, client, office, presence, stop)
        except (httpx.HTTPError, OSError, ValueError) as error:  # ValueError: a proxy's page
            _LOG.warning("the coordinator cannot be reached: %s", _reason(error))
        on_state("disconnected")
        if stop.wait(pause):
            return
        pause = min(2 * pause, _LONGEST_PAUSE)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise IdentityError(f"{path}: cannot read the node key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path}: the node key must be an EC P-384 key")
    return key


def _open_client(office: Office, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    """Flower's client, which would follow any redirection and read any answer to its end."""
    client = FleetHttpClient.from_server_address(
        office.address,
        insecure=False,
        root_certificates=office.ca.read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )
    http = client._client
    http.follow_redirects = False
    http.headers["accept-encoding"] = "identity"
    http.event_hooks = {"response": [_limit]}
    return client


def _limit(response: httpx.Response) -> None:
    """Read no more of an answer than one may have; a packed one could be of any size."""
    if "content-encoding" in response.headers:
        raise httpx.RemoteProtocolError("an answer that is packed", request=response.request)
    if isinstance(response.stream, httpx.SyncByteStream):
        response.stream = _Limited(response.stream)


class _Limited(httpx.SyncByteStream):
    """The first bytes of a stream; one that goes on after them is an error."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        left = _MOST_ANSWER
        for piece in self._stream:
            left -= len(piece)
            if left < 0:
                raise httpx.RemoteProtocolError(f"an answer of more than {_MOST_ANSWER} bytes")
            yield piece

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def _activated(
    client: FleetHttpClient, office: Office, key: ec.EllipticCurvePrivateKey
) -> Iterator[_Presence]:
    """Be an online node: heartbeats in the background, a good-bye at the end.

    Flower does not let a node in while it takes it for online. After a kill it would wait for up to
    two heartbeats; so the node that the last process was says good-bye first.
    """
    with contextlib.suppress(OSError, ValueError, httpx.HTTPStatusError):
        last = int(json.loads(office.note.read_text(encoding="ascii"))["node"])
        client.DeactivateNode(DeactivateNodeRequest(node_id=last))
    answer = client.ActivateNode(
        ActivateNodeRequest(
            public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=HEARTBEAT_SECONDS
        )
    )
    presence = _Presence(node=Node(node_id=answer.node_id))
    scratch = office.note.with_suffix(".part")
    scratch.write_text(json.dumps({"node": answer.node_id}), encoding="ascii")
    scratch.replace(office.note)
    beat = threading.Thread(target=_beat, args=(client, presence), name="heartbeat", daemon=True)
    beat.start()
    try:
        yield presence
    finally:
        presence.over.set()
        beat.join()
        with contextlib.suppress(httpx.HTTPError):
            client.DeactivateNode(DeactivateNodeRequest(node_id=answer.node_id))
            office.note.unlink(missing_ok=True)


def _beat(client: FleetHttpClient, presence: _Presence) -> None:
    """Say that the site is alive, until it is over or Flower knows the node no more."""
    request = SendNodeHeartbeatRequest(node=presence.node, heartbeat_interval=HEARTBEAT_SECONDS)
    while not presence.over.wait(HEARTBEAT_SECONDS * 0.6):
        try:
            if not client.SendNodeHeartbeat(request).success:
                presence.over.set()
        except (httpx.HTTPError, ValueError) as error:  # the next pull fails as well
            _LOG.info("a heartbeat was not taken: %s", _reason(error))


def _serve(
    app: ClientApp,
    client: FleetHttpClient,
    office: Office,
    presence: _Presence,
    stop: threading.Event,
) -> None:
    """Answer messages one after the other."""
    node = presence.node
    context = Context(
        run_id=1, node_id=node.node_id, node_config={}, state=RecordDict(), run_config={}
    )
    last = time.monotonic()
    while not (stop.is_set() or presence.over.is_set()):
        pulled = client.PullMessages(PullMessagesRequest(node=node))
        for header, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
            _handle(app, client, office, message_from_proto(header), tree, context)
            last = time.monotonic()
        if not pulled.messages_list:  # the longer nothing came, the less often it asks
            idle = time.monotonic() - last
            stop.wait(min(max(_SHORTEST_POLL, idle / 5), _LONGEST_POLL))


def _handle(
    app: ClientApp,
    client: FleetHttpClient,
    office: Office,
    header: Message,
    tree: ObjectTree,
    context: Context,
) -> None:
    """Fetch a message's content, answer it, send the answer; a run that has ended is no matter."""
    started, run, node = time.monotonic(), header.metadata.run_id, Node(node_id=context.node_id)
    try:
        message = _fetch(client, node, header, tree, office.most_bytes)
        if message is None:
            _LOG.warning("a message without its content, or with too much of it, was dropped")
            return
        reply = _answer(app, message, context)
        _send(client, node, run, reply, time.monotonic() - started)
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in _GIVEN_UP:
            raise
        _LOG.info("a message of an ended run was dropped: %s", _reason(error))


def _answer(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply; an error's text may quote a record, so a fixed code goes in its place."""
    try:
        return app(message=message, context=context)
    except (FedwardError, *_LIBRARY_ERRORS) as error:
        _LOG.error("a message of type %r: %s", message.metadata.message_type, type(error).__name__)
        code = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, SiteCode.INTERNAL.value)
        return Message(code, reply_to=message)


_GIVEN_UP = frozenset({400, 403, 404, 409, 412})
"""Statuses by which Flower refuses one call, not the site: the run is over, the message gone."""


def _fetch(
    client: FleetHttpClient, node: Node, header: Message, tree: ObjectTree, most: int
) -> Message | None:
    """The message with its content; None if Flower has it no more or it is malformed or too big."""
    run, contents, size = header.metadata.run_id, dict[str, bytes](), 0
    end = time.monotonic() + _OBJECT_SECONDS
    for item in iterate_object_tree(tree):
        request = PullObjectRequest(node=node, run_id=run, object_id=item.object_id)
        answer = client.PullObject(request)
        while answer.object_found and not answer.object_available and time.monotonic() < end:
            time.sleep(_SHORTEST_POLL)
            answer = client.PullObject(request)
        if not answer.object_available or get_object_id(answer.object_content) != item.object_id:
            return None
        size += len(answer.object_content)  # also of one that comes twice
        if size > most:
            return None
        contents[item.object_id] = answer.object_content
    number = header.metadata.message_id
    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=number)
    )
    message = inflate(number, contents, most)
    if message is None:
        return None
    return make_message(header.metadata, content=message.content)


def _send(client: FleetHttpClient, node: Node, run: int, reply: Message, seconds: float) -> None:
    """Send a reply and the objects of it that Flower asks for."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        answer = client.PushMessages(
            PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
        )
        wanted = set(answer.objects_to_push)
        for number, item in get_all_nested_objects(reply).items():
            if number in wanted:
                client.PushObject(
                    PushObjectRequest(
                        node=node,
                        run_id=run,
                        object_id=number,
                        object_content=item.deflate(),
                        session_id=answer.session_id,
                    )
                )


def _reason(error: Exception) -> str:
    """What went wrong, without a word from the other side."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return type(error).__name__
