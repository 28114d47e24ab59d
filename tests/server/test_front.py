"""What the public port lets through, and what it refuses before anything reads it."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from fedward.enrolment import ENROL_PATH, ROSTER_PATH
from fedward.server.enrolment import AsgiApp, Receive, Scope, Send
from fedward.server.front import FLEET_PATHS, MAX_BODY, Front


def echo(name: str) -> AsgiApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": name.encode()})

    return app


def ask(
    front: Front, path: str, *, method: str = "POST", length: str | None = "3", address: str = "a"
) -> tuple[int, bytes]:
    """Status and body of one request."""
    headers = [] if length is None else [(b"content-length", length.encode())]
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


@pytest.mark.parametrize("path", [ENROL_PATH, ROSTER_PATH])
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


def test_a_body_has_an_announced_and_bounded_length(front):
    path = min(FLEET_PATHS)
    assert ask(front, path, length=str(MAX_BODY))[0] == 200
    assert ask(front, path, length=str(MAX_BODY + 1))[0] == 413
    assert ask(front, path, length=None)[0] == 411
    assert ask(front, path, length="-1")[0] == 411


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
