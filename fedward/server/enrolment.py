"""Membership over the public port: to enrol, the current roster, to leave.

A pure ASGI application; the front mounts it under :data:`fedward.enrolment.ENROL_PATH`,
:data:`~fedward.enrolment.ROSTER_PATH` and :data:`~fedward.enrolment.LEAVE_PATH`. It answers with
the sealed roster (200) or with nothing but a status: 403 refused, 404 no such path, 413 too large.
Why it refused is in the coordinator's log; to tell a stranger would help him guess.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fedward.enrolment import ENROL_PATH, LEAVE_PATH, ROSTER_PATH, EnrolRequest, MemberRequest
from fedward.errors import IdentityError
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.members import open_members

_LOG = logging.getLogger(__name__)

_BODY_LIMIT = 16 * 1024

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def enrolment_app(
    folder: CoordinatorFolder,
    *,
    on_change: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> AsgiApp:
    """Make the application.

    Args:
        folder: The coordinator's.
        on_change: Called, in a worker thread, when a site was enrolled or has left, before it is
            answered; for example to make its fleet key known to the SuperLink.
        clock: Unix seconds.

    Guarantees:
        A secret admits one pair of keys, once, before its end; the body of a request is read up to
        16 KiB.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        handlers = {ENROL_PATH: _enrol, ROSTER_PATH: _roster, LEAVE_PATH: _leave}
        handler = handlers.get(scope["path"])
        if scope["type"] != "http" or scope["method"] != "POST" or handler is None:
            await respond(send, 404)
            return
        body = await read_body(receive, _BODY_LIMIT)
        if body is None:
            await respond(send, 413)
            return
        try:
            sealed = await asyncio.to_thread(handler, folder, body, int(clock()), on_change)
        except IdentityError as error:
            _LOG.warning("%s refused: %s", scope["path"], error)
            await respond(send, 403)
            return
        await respond(send, 200, sealed)

    return app


def _enrol(
    folder: CoordinatorFolder, body: bytes, now: int, on_change: Callable[[], None]
) -> bytes:
    request = EnrolRequest.open(body)
    with open_members(folder) as members:
        site = members.enrol(request, now)
        sealed = members.sealed_roster()
    _LOG.info("site %d (%s) is enrolled", site.id, site.name)
    on_change()
    return sealed


def _roster(
    folder: CoordinatorFolder, body: bytes, now: int, on_change: Callable[[], None]
) -> bytes:
    """The current roster, for members only; it names hospitals.

    One that is revoked gets it too, because it has to learn that it is.
    """
    key = _asked_by(folder, body, now, ROSTER_PATH)
    with open_members(folder) as members:
        if all(member.public_key != key for member in members.all()):
            raise IdentityError("the key of no member")
        return members.sealed_roster()


def _leave(
    folder: CoordinatorFolder, body: bytes, now: int, on_change: Callable[[], None]
) -> bytes:
    key = _asked_by(folder, body, now, LEAVE_PATH)
    with open_members(folder) as members:
        site = members.leave(key, now)
        sealed = members.sealed_roster()
    _LOG.info("site %d (%s) has left", site.id, site.name)
    on_change()
    return sealed


def _asked_by(folder: CoordinatorFolder, body: bytes, now: int, path: str) -> bytes:
    coordinator = folder.identity().public_key
    return MemberRequest.open(body, now, path=path, coordinator=coordinator)


async def read_body(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None where it has more bytes or its sender is gone."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most or message.get("type") == "http.disconnect":
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def respond(send: Send, status: int, body: bytes = b"") -> None:
    """Answer with a status and a body."""
    headers = [
        (b"content-type", b"application/octet-stream"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
