"""What the coordinator's public port lets through: the calls that a site needs, and enrolment.

Flower serves its control and runtime APIs on the same application as the one for sites, reads whole
bodies before it authenticates, and sets no limit to them. This wrapper stands before it: a closed
list of paths, a body limit, a rate limit for each address. Everything else gets a bare status and a
line in the log.
"""

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedward.enrolment import ENROL_PATH, LEAVE_PATH, ROSTER_PATH
from fedward.server.enrolment import AsgiApp, Receive, Scope, Send
from fedward.server.fleet_api import FLEET_PATHS

_LOG = logging.getLogger(__name__)

MAX_BODY = 8 << 20
"""Most bytes of a request; Flower sends arrays in pieces of 5 MB."""

_RATE, _BURST = 200.0, 1000.0
_MOST_ADDRESSES = 10_000
_CONNECTIONS = 200
_LOG_SECONDS = 1.0


class Front:
    """The ASGI application of the public port.

    Args:
        flower: Flower's calls (:func:`~fedward.server.fleet_api.fleet_app`).
        enrolment: Answers strangers who enrol and members who ask for the roster.
        clock: Seconds, for the rate limit.

    Guarantees: nothing but :data:`FLEET_PATHS` and enrolment reaches an application over HTTP, and
    no body above :data:`MAX_BODY` or of unannounced length.
    """

    def __init__(
        self,
        flower: AsgiApp,
        enrolment: AsgiApp,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flower, self._enrolment, self._clock = flower, enrolment, clock
        self._tokens: dict[str, tuple[float, float]] = {}
        self._logged, self._unlogged = -math.inf, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            return
        target, status = self._admit(scope)
        if target is None:
            self._log(scope, status)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await target(scope, receive, send)

    def _admit(self, scope: Scope) -> tuple[AsgiApp | None, int]:
        """The application for a request, or the status that refuses it."""
        if not self._within_rate(scope):
            return None, 429
        if scope["path"] in FLEET_PATHS:
            target = self._flower
        elif scope["path"] in {ENROL_PATH, ROSTER_PATH, LEAVE_PATH}:
            target = self._enrolment
        else:
            return None, 404
        if scope["method"] != "POST":
            return None, 404
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        lengths = [value for name, value in headers if name == b"content-length"]
        if len(lengths) != 1 or not lengths[0].isdigit():
            return None, 411
        if any(name == b"transfer-encoding" for name, _ in headers):
            return None, 411  # beside it the announced length counts for nothing
        if len(lengths[0]) > len(str(MAX_BODY)) or int(lengths[0]) > MAX_BODY:
            return None, 413
        return target, 200

    def _log(self, scope: Scope, status: int) -> None:
        """Say who was refused what, once a second at most: a flood must not fill the disk."""
        now = self._clock()
        if now - self._logged < _LOG_SECONDS:
            self._unlogged += 1
            return
        address = (scope.get("client") or ("",))[0]
        asked = f"{scope['method']} {scope['path']}"[:100]
        _LOG.warning("refused with %d: %r of %s", status, asked, address)
        if self._unlogged:
            _LOG.warning("%d refused requests before it were not logged", self._unlogged)
        self._logged, self._unlogged = now, 0

    def _within_rate(self, scope: Scope) -> bool:
        """Token bucket of the client's address: 200 requests a second, 1000 at once."""
        address = (scope.get("client") or ("",))[0]
        now = self._clock()
        left, last = self._tokens.pop(address, (_BURST, now))
        left = min(_BURST, left + (now - last) * _RATE)
        if len(self._tokens) >= _MOST_ADDRESSES:
            self._tokens.pop(next(iter(self._tokens)))  # the one that was silent longest
        self._tokens[address] = (max(0.0, left - 1), now)
        return left >= 1


class ImpatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 for strangers: a request is whole in time, and one address has so many connections.

    uvicorn alone waits for ever for a first or half a request, and counts such connections towards
    its limit: a thousand of them would shut every site out.
    """

    seconds = 120.0
    """From the first byte awaited to the last of a request: 8 MiB at 0.6 Mbit/s."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection, unless its address has too many."""
        super().connection_made(transport)
        self._wait()
        host = (self.client or ("",))[0]
        others = (c.client for c in self.connections if isinstance(c, HttpToolsProtocol))
        if sum(client is not None and client[0] == host for client in others) > _CONNECTIONS:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes, of which a request must follow in time."""
        self._wait()
        super().data_received(data)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._wait_no_more()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the connection go."""
        self._wait_no_more()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@dataclass(frozen=True, kw_only=True)
class Listener:
    """The public port.

    Args:
        host: Address to bind.
        port: 0 to 65535; 0 takes a free one.
        certificate: The server certificate (PEM file).
        key: Its private key (PEM file).
    """

    host: str
    port: int
    certificate: Path
    key: Path


def front_server(front: Front, listener: Listener) -> uvicorn.Server:
    """The server of the public port; its ``run()`` serves until SIGTERM or SIGINT."""
    config = uvicorn.Config(
        front,
        host=listener.host,
        port=listener.port,
        ssl_certfile=listener.certificate,
        ssl_keyfile=listener.key,
        log_config=None,
        http=ImpatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        limit_concurrency=1000,
        timeout_keep_alive=75,  # longer than a site's longest pause, so that TLS stays up
        timeout_graceful_shutdown=3,
    )
    config.load()
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    return uvicorn.Server(config)
