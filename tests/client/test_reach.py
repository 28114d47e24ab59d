"""Each step towards a coordinator can fail, and is told apart from the others."""

import datetime
import email.utils
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedward.client import reach as module
from fedward.client.reach import Finding, reach
from fedward.server.certificates import issue
from fedward.server.coordinator_folder import CoordinatorConfig, CoordinatorFolder

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    return made(tmp_path_factory.mktemp("c") / "c")


def made(root: Path, *, host: str = "127.0.0.1", now: datetime.datetime = NOW) -> CoordinatorFolder:
    folder = CoordinatorFolder.create(root, CoordinatorConfig(host=host))
    issue(folder, now)
    return folder


def answer_date(when: float | None) -> bytes:
    date = b"" if when is None else f"Date: {email.utils.formatdate(when)}\r\n".encode()
    return b"HTTP/1.1 404 Not Found\r\n" + date + b"\r\n"


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server for one connection on loopback; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            connection, _ = server.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)


def tls(folder: CoordinatorFolder, reply: bytes) -> Callable[[socket.socket], None]:
    """A coordinator's port: TLS, then one HTTP answer."""

    def serve(connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder.server_certificate, folder.server_key)
        try:
            with context.wrap_socket(connection, server_side=True) as secure:
                secure.recv(4096)
                secure.sendall(reply)
        except OSError:
            return  # the client does not like the certificate

    return serve


def verdicts(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.verdict.value for finding in findings}


def examined(
    folder: CoordinatorFolder, reply: bytes, ca: CoordinatorFolder | None = None
) -> dict[str, str]:
    with listening(tls(folder, reply)) as port:
        return verdicts(reach(f"https://127.0.0.1:{port}", (ca or folder).ca))


def test_a_coordinator_that_is_there_and_well(coordinator):
    checks = ("proxy", "dns", "tcp", "tls", "certificate", "clock")
    found = examined(coordinator, answer_date(time.time()))
    assert found == dict.fromkeys(checks, "ok")


def test_a_name_that_nobody_knows(coordinator):
    found = list(reach("https://no-such-host.invalid:443", coordinator.ca))
    assert [(f.check, f.verdict.value) for f in found] == [("proxy", "ok"), ("dns", "fail")]
    assert "no-such-host.invalid" in found[-1].says
    assert found[-1].do


def test_a_port_where_nobody_listens(coordinator):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = verdicts(reach(f"https://127.0.0.1:{port}", coordinator.ca))
    assert found == {"proxy": "ok", "dns": "ok", "tcp": "fail"}


def test_a_server_that_another_authority_vouches_for(coordinator, tmp_path):
    found = examined(made(tmp_path / "other"), b"", coordinator)
    assert found["tls"] == "fail"
    assert "clock" not in found


def test_a_certificate_of_another_host(tmp_path):
    assert examined(made(tmp_path / "c", host="fed.example.org"), b"")["tls"] == "fail"


def test_a_certificate_that_has_ended_or_soon_will(tmp_path):
    reply = answer_date(time.time())
    assert examined(made(tmp_path / "a", now=NOW - 500 * DAY), reply)["tls"] == "fail"
    found = examined(made(tmp_path / "b", now=NOW - 394 * DAY), reply)
    assert (found["tls"], found["certificate"]) == ("ok", "warn")


def test_a_port_that_speaks_no_tls(coordinator):
    with listening(lambda connection: connection.sendall(b"SSH-2.0-x\r\n")) as port:
        found = verdicts(reach(f"https://127.0.0.1:{port}", coordinator.ca))
    assert found["tls"] == "fail"


def test_an_authority_that_is_not_there(coordinator, tmp_path):
    with listening(lambda connection: None) as port:
        found = list(reach(f"https://127.0.0.1:{port}", tmp_path / "ca.pem"))
    assert (found[-1].check, found[-1].verdict.value) == ("tls", "fail")


@pytest.mark.parametrize(
    ("off", "verdict"), [(0, "ok"), (100, "warn"), (-100, "warn"), (4000, "fail"), (None, "warn")]
)
def test_a_clock_that_is_off(coordinator, off, verdict):
    when = None if off is None else time.time() + off
    assert examined(coordinator, answer_date(when))["clock"] == verdict


def proxy(connection: socket.socket, status: bytes, folder: CoordinatorFolder) -> None:
    asked = connection.recv(4096)
    assert asked.startswith(b"CONNECT fed.example.org:9092 HTTP/1.1\r\n")
    assert b"Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n" in asked
    connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\n")
    if status.startswith(b"200"):
        tls(folder, answer_date(time.time()))(connection)


@pytest.mark.parametrize(
    ("status", "last"), [(b"200 OK", ("clock", "ok")), (b"407 No", ("tcp", "fail"))]
)
def test_the_proxy_of_the_environment_is_used(tmp_path, monkeypatch, status, last):
    folder = made(tmp_path / "c", host="fed.example.org")
    with listening(lambda connection: proxy(connection, status, folder)) as port:
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{port}")
        found = list(reach("https://fed.example.org:9092", folder.ca))
    assert (found[-1].check, found[-1].verdict.value) == last
    assert found[0].says == f"through 127.0.0.1:{port}"
    assert "secret" not in repr(found)


def test_a_coordinator_that_says_nothing_is_given_up(coordinator, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    over = threading.Event()

    def silent(connection: socket.socket) -> None:
        over.wait(5)

    with listening(silent) as port:
        found = verdicts(reach(f"https://127.0.0.1:{port}", coordinator.ca))
        over.set()
    assert found["tls"] == "fail"
