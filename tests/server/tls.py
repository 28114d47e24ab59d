"""A real TLS server on loopback, for tests of what sites and coordinator say to each other."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.enrolment import AsgiApp


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(app: AsgiApp, folder: CoordinatorFolder) -> Iterator[uvicorn.Server]:
    """Serve an application with the coordinator's certificate until the block ends."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=folder.config().port,
        lifespan="off",
        ws="none",
        http="h11",
        log_config=None,
        ssl_certfile=folder.server_certificate,
        ssl_keyfile=str(folder.server_key),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 10
    while thread.is_alive() and not server.started and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.started
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(10)
