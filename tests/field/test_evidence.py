"""The searches of the field test find what they look for, and only that."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.field import evidence

TEXT = "CANARY-Mrs-Jane-Roe"
WATCH = Path(__file__).parent / "watch"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        json.dumps({"a": f"x{TEXT}y"}).encode(),
        TEXT.encode("utf-16-le"),
        TEXT.encode().hex().encode(),
        *(base64.b64encode(b"z" * offset + TEXT.encode() + b"more") for offset in range(3)),
        *(base64.b64encode(b"z" * offset + TEXT.encode()) for offset in range(3)),
    ],
)
def test_a_planted_text_is_found_in_any_coding(tmp_path, data):
    (tmp_path / "deep").mkdir()
    held, other = tmp_path / "deep" / "x.bin", tmp_path / "other"
    held.write_bytes(os.urandom(1000) + data + os.urandom(1000))
    other.write_bytes(os.urandom(3000) + TEXT.replace("J", "K").encode())
    assert evidence.holding(TEXT, tmp_path) == [held]
    assert evidence.holding(TEXT, tmp_path, but=[tmp_path / "deep"]) == []


def test_a_key_with_two_uses_is_found(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    evidence.mark(files[0], b"one", b"input")
    evidence.mark(files[0], b"one", b"input")  # the very same bytes again
    evidence.mark(files[1], b"two", b"input")
    assert [len(found) for found in evidence.uses(files).values()] == [1, 1]
    evidence.mark(files[1], b"one", b"another")
    assert [len(found) for found in evidence.uses(files).values()] == [2, 1]


CALLS = {
    "socket.create_connection(('127.0.0.1', 9), 1)": True,
    "socket.socket(socket.AF_UNIX).connect('/nowhere')": True,
    "socket.getaddrinfo('127.0.0.1', 9)": True,
    "socket.create_connection(('127.0.0.1', 10), 1)": False,
    "socket.create_connection(('127.0.0.2', 9), 1)": False,
    "socket.getaddrinfo('telemetry.example', 443)": False,
    "socket.gethostbyname('127.0.0.1')": False,
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.2', 53))": False,
}


@pytest.mark.parametrize("call", list(CALLS))
def test_a_strange_address_is_watched_in_any_process(tmp_path, call):
    environment = {**os.environ, "PYTHONPATH": str(WATCH), "FIELD_WATCH": str(tmp_path / "w")}
    code = f"import contextlib, socket\nwith contextlib.suppress(OSError): {call}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
    watched = (tmp_path / "w").read_text()
    assert watched, "the call was not seen"
    assert (evidence.strangers(watched, "127.0.0.1", 9) == []) is CALLS[call]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not on this machine")
@pytest.mark.parametrize("call", [call for call in CALLS if "get" not in call])
def test_a_strange_address_is_seen_by_the_kernel(tmp_path, call):
    file = tmp_path / "t"
    code = f"import contextlib, socket\nwith contextlib.suppress(OSError): {call}"
    command = [*evidence.TRACED, str(file), sys.executable, "-c", code]
    if subprocess.run(command, timeout=60).returncode:
        pytest.skip("tracing is not allowed here")
    traced = file.read_text()
    assert traced
    assert (evidence.strangers_of_kernel(traced, "127.0.0.1", 9) == []) is CALLS[call]


def test_a_traced_address_of_the_other_family_is_strange():
    line = 'connect(3, {sa_family=AF_INET6, sin6_port=htons(9), inet_pton(AF_INET6, "::1", x)}, 28)'
    assert evidence.strangers_of_kernel(line, "127.0.0.1", 9)
    assert evidence.strangers_of_kernel("connect(3, {sa_family=AF_INET, ...}, 16)", "a", 9)
    assert not evidence.strangers_of_kernel("sendto(3, x, 20, 0, {sa_family=AF_NETLINK}", "a", 9)
