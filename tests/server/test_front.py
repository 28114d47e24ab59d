"""What the public port lets through, and what it refuses before anything reads it."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from fedward.enrolment import ENROL_PATH, LEAVE_PATH, ROSTER_PATH
from fedward.server.enrolment import AsgiApp, Receive, Scope, Send
from fedward.server.fleet_api import FLEET_PATHS
from fedward.server.front import MAX_BODY, Front, ImpatientProtocol


def echo(name: str) -> AsgiApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": name.encode()})

    return app


def ask(
    front: Front,
    path: str,
    *,
    method: str = "POST",
    length: str | None = "3",
    address: str = "a",
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> tuple[int, bytes]:
    """Status and body of one request."""
    headers = [*more] if length is None else [(b"content-length", length.encode()), *more]
    scope: Scope = {
        "type": "http",
        "path": path,
        "method": method,
        "headers": headers,
        "client": (address, 1),
    }
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"abc"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(front(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.fixture
def front() -> Front:
    return Front(echo("flower"), echo("enrolment"), clock=lambda: 0.0)


@pytest.mark.parametrize("path", sorted(FLEET_PATHS))
def test_what_a_site_needs_goes_through(front, path):
    assert ask(front, path) == (200, b"flower")
    assert ask(front, path, method="GET") == (404, b"")


@pytest.mark.parametrize("path", [ENROL_PATH, ROSTER_PATH, LEAVE_PATH])
def test_enrolment_goes_through(front, path):
    assert ask(front, path) == (200, b"enrolment")
    assert ask(front, path, method="GET") == (404, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/health",
        "/openapi.json",
        "/v1/fleet/get-fab",
        "/v1/fleet/get-run",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/../control/list-nodes",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
    ],
)
def test_nothing_else_does(front, path):
    assert ask(front, path) == (404, b"")


def test_who_tries_something_else_is_in_the_log_and_a_flood_does_not_fill_it(caplog):
    now = [0.0]
    front = Front(echo("flower"), echo("enrolment"), clock=lambda: now[0])
    ask(front, min(FLEET_PATHS))
    assert caplog.text == ""
    ask(front, "/v1/control/list-nodes", address="192.0.2.7")
    assert "refused with 404: 'POST /v1/control/list-nodes' of 192.0.2.7" in caplog.text
    for _ in range(100):
        ask(front, "/v1/control/start-run\n" + "x" * 9999)
    assert len(caplog.records) == 1
    now[0] = 1.0
    ask(front, "/v1/control/start-run\n" + "x" * 9999)
    assert len(caplog.records) == 3
    assert "100 refused requests before it were not logged" in caplog.text
    assert max(map(len, caplog.text.splitlines())) < 250, "one line each, and bounded"


def test_a_body_has_an_announced_and_bounded_length(front):
    path = min(FLEET_PATHS)
    assert ask(front, path, length=str(MAX_BODY))[0] == 200
    assert ask(front, path, length=str(MAX_BODY + 1))[0] == 413
    assert ask(front, path, length=None)[0] == 411
    assert ask(front, path, length="-1")[0] == 411
    assert ask(front, path, length="9" * 5000)[0] == 413
    assert ask(front, path, more=((b"Transfer-Encoding", b"chunked"),))[0] == 411


def test_one_address_cannot_crowd_out_another():
    now = [0.0]
    front = Front(echo("flower"), echo("enrolment"), clock=lambda: now[0])
    path = min(FLEET_PATHS)
    first = [ask(front, path)[0] for _ in range(1100)]
    assert first == [200] * 1000 + [429] * 100
    assert ask(front, path, address="b")[0] == 200
    now[0] = 0.1
    assert [ask(front, path)[0] for _ in range(30)].count(200) == 20


def test_websockets_get_no_answer(front):
    sent: list[Any] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError("nobody listens")

    asyncio.run(front({"type": "websocket", "path": "/"}, receive, send))
    assert sent == []


async def hung_up(pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the public port's protocol hangs up on a client that stops after these bytes."""
    config = uvicorn.Config(Front(echo("flower"), echo("enrolment")), ws="none")
    config.load()
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: ImpatientProtocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    monkeypatch.setattr(ImpatientProtocol, "seconds", 0.5)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(2.0):
            while await reader.read(1000):
                pass
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    finally:
        writer.close()
        server.close()


WHOLE = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        ([], True),
        ([b"POST /v1/fl"], True),
        ([b"\r\n", b"\r\n"], True),
        ([WHOLE[:-1]], True),
        ([WHOLE, b"\r\n"], True),
        ([WHOLE], False),  # uvicorn's own patience with a connection that has been of use
    ],
)
def test_half_a_request_is_not_waited_for(pieces, ends, monkeypatch):
    assert asyncio.run(hung_up(pieces, monkeypatch)) is ends


def test_one_address_has_so_many_connections(monkeypatch):
    monkeypatch.setattr("fedward.server.front._CONNECTIONS", 0)
    monkeypatch.setattr(ImpatientProtocol, "seconds", 60.0)

    async def first_answer() -> bytes:
        config = uvicorn.Config(Front(echo("flower"), echo("enrolment")), ws="none")
        config.load()
        state = ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: ImpatientProtocol(config=config, server_state=state, app_state={}),
            "127.0.0.1",
            0,
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            writer.write(WHOLE)
            return await reader.read(12)
        except ConnectionError:
            return b""
        finally:
            writer.close()
            server.close()

    assert asyncio.run(first_answer()) == b""
    monkeypatch.setattr("fedward.server.front._CONNECTIONS", 1)
    assert asyncio.run(first_answer()) == b"HTTP/1.1 200"
