"""Flower's Fleet API for the public port, made of Flower's own functions: what a site can call.

Flower's SuperLink has nine layers and five changes of thread between a request and its answer, and
passes every piece of an adapter through them in bites of 64 KB. Here a call is read whole, then
parsed, authenticated and answered by the same functions in one thread's turn. Flower's control and
runtime APIs are no part of it.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.error.base import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError, Message
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fedward.server.enrolment import AsgiApp, Receive, Scope, Send, read_body, respond
from fedward.server.pushes import Intake, is_own_reply
from fedward.server.superlink import open_states

_LOG = logging.getLogger(__name__)


def _pull_object(asked: PullObjectRequest, state: LinkState) -> PullObjectResponse:
    """A piece of a message; Flower's own function counts bytes in three more transactions."""
    content = state.get_object(asked.run_id, asked.object_id)
    return PullObjectResponse(
        object_found=content is not None,
        object_available=bool(content),
        object_content=content or b"",
    )


def _push_object(asked: PushObjectRequest, state: LinkState) -> PushObjectResponse:
    """Take a piece that its reply has announced, and no other, if the reply is still waited for."""
    return PushObjectResponse(
        stored=state.store_object(
            asked.run_id, asked.session_id, asked.object_id, asked.object_content
        )
    )


def _may(asked: Message, intake: Intake) -> bool:
    """Whether a member may push what it does."""
    if isinstance(asked, PushMessagesRequest):
        if not is_own_reply(asked):
            return False
        return intake.may_announce(asked.messages_list[0].metadata.reply_to_message_id)
    if isinstance(asked, PushObjectRequest):
        return intake.take(asked.session_id, len(asked.object_content))
    return True


_PREFIX = "/v1/fleet/"

_CALLS: Mapping[str, tuple[type[Message], Callable[[Any, LinkState], Message]]] = {
    _PREFIX + "activate-node": (ActivateNodeRequest, fleet_handlers.activate_node),
    _PREFIX + "deactivate-node": (DeactivateNodeRequest, fleet_handlers.deactivate_node),
    _PREFIX + "send-node-heartbeat": (
        SendNodeHeartbeatRequest,
        fleet_handlers.send_node_heartbeat,
    ),
    _PREFIX + "pull-messages": (
        PullMessagesRequest,
        lambda asked, state: fleet_handlers.pull_messages(asked, state, state.object_store),
    ),
    _PREFIX + "push-messages": (PushMessagesRequest, fleet_handlers.push_messages),
    _PREFIX + "push-object": (PushObjectRequest, _push_object),
    _PREFIX + "pull-object": (PullObjectRequest, _pull_object),
    _PREFIX + "confirm-message-received": (
        ConfirmMessageReceivedRequest,
        lambda asked, state: fleet_handlers.confirm_message_received(
            asked, state, state.object_store
        ),
    ),
}

FLEET_PATHS = frozenset(_CALLS)
"""All of Flower that the public port shows: no registration, no run data, no code bundles."""

_SMALL_BODY = 1 << 17
"""Most bytes of a request that brings no object: what a stranger can make this process parse."""

_THREADS = 2
"""The database has one writer at a time: more threads would only wait for each other."""

_UNEXPECTED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError,
               SQLAlchemyError, TypeError, ValueError)  # fmt: skip
"""What Flower raises on requests that somebody made up, and where its database cannot be used."""


def fleet_app(database: Path, most_body: int, most_reply: int = 1 << 30) -> AsgiApp:
    """The application that answers :data:`FLEET_PATHS` over Flower's database.

    Args:
        database: Flower's file.
        most_body: Most bytes of a request that brings an object.
        most_reply: Most bytes of the objects of one reply.

    Guarantees:
        Every call is authenticated as Flower does it: by the node key of the node that it names. A
        member pushes only its own replies (:func:`~fedward.server.pushes.is_own_reply`), and of
        each only so much (:class:`~fedward.server.pushes.Intake`). Errors go out as a bare status.
    """
    states = open_states(database)
    state = states.state()
    flower = SimpleNamespace(state=SimpleNamespace(linkstate_factory=states))
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fleet")
    intake = Intake(most_reply)

    def answer(scope: Scope, body: bytes) -> tuple[int, bytes]:
        kind, handle = _CALLS[scope["path"]]
        request = Request({**scope, "app": flower, "state": {}})
        try:
            asked = request.state.protobuf_request = kind.FromString(body)
            authenticate_node(request)
            if not _may(asked, intake):
                return 403, b""
            answer = handle(asked, state)
            if (
                isinstance(asked, PushMessagesRequest)
                and isinstance(answer, PushMessagesResponse)
                and answer.objects_to_push
            ):
                letter = asked.messages_list[0].metadata.reply_to_message_id
                intake.announced(letter, answer.session_id)
            return 200, answer.SerializeToString()
        except DecodeError:
            return 400, b""
        except HTTPException as error:
            return error.status_code, b""
        except FlowerError as error:
            return API_ERROR_MAP[error.code].http_status_code, b""
        except _UNEXPECTED as error:
            _LOG.warning("%s failed: %s", scope["path"], type(error).__name__)
            return 500, b""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        brings = _CALLS[scope["path"]][0] is PushObjectRequest
        body = await read_body(receive, most_body if brings else _SMALL_BODY)
        if body is None:
            await respond(send, 413)
            return
        loop = asyncio.get_running_loop()
        await respond(send, *await loop.run_in_executor(threads, answer, scope, body))

    return app
