"""A confined process opens no socket, and the same program without the sandbox does."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedward.client.sandbox import offline_environment, seal
from fedward.errors import ConfigurationError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")

CONFINE = "from fedward.client.sandbox import confine, seal; confine(cache)"
SEAL = f"{CONFINE}; seal()"
REFUSED = errno.errorcode[errno.EACCES]

IN_A_CHILD = """
child = "import socket, sys\\ntry: socket.socket()\\nexcept OSError as e: sys.exit(e.errno)"
code = subprocess.run([sys.executable, "-c", child]).returncode
if code: raise OSError(code, "")
"""


def run(tmp_path: Path, *statements: str, **environment: str) -> str:
    """What a new Python prints when the last of some statements raises: its errno, or ``done``."""
    *first, last = statements
    program = [
        "import ctypes, errno, os, pathlib, resource, socket, subprocess, sys, tempfile",
        "from concurrent.futures import ThreadPoolExecutor",
        f"cache = pathlib.Path({str(tmp_path / 'cache')!r})",
        *first,
        "try:",
        *(f"    {line}" for line in last.splitlines()),
        "    print('done')",
        "except OSError as error:",
        "    print(errno.errorcode[error.errno])",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().removesuffix("\ndone")


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "ThreadPoolExecutor().submit(socket.socket).result()",
        IN_A_CHILD,
    ],
    ids=["internet", "internet-6", "in-a-thread", "in-a-child"],
)
def test_no_socket_but_a_unix_one_can_be_opened(tmp_path, attempt):
    assert run(tmp_path, CONFINE, attempt) == REFUSED
    assert run(tmp_path, attempt) == "done", "negative control"


@pytest.mark.parametrize("family", ["AF_NETLINK", "AF_VSOCK"])
def test_rarer_families_are_refused_too(tmp_path, family):
    assert run(tmp_path, CONFINE, f"socket.socket(socket.{family}, socket.SOCK_RAW)") == REFUSED


def test_a_sealed_process_opens_no_socket_at_all(tmp_path):
    for attempt in ("socket.socket(socket.AF_UNIX)", "socket.socketpair()"):
        assert run(tmp_path, CONFINE, attempt) == "done"
        assert run(tmp_path, SEAL, attempt) == REFUSED


def test_sealing_holds_for_sockets_and_threads_that_are_there(tmp_path):
    first = (
        f"{CONFINE}; server = socket.socket(socket.AF_UNIX); server.bind('\\0fedward-test'); "
        "server.listen(); client = socket.socket(socket.AF_UNIX); pool = ThreadPoolExecutor(1); "
        "pool.submit(int).result()"
    )
    connect = "pool.submit(client.connect, '\\0fedward-test').result()"
    assert run(tmp_path, first, connect) == "done"
    assert run(tmp_path, first, "seal()", connect) == REFUSED


@pytest.mark.parametrize("number", [425, 438])
def test_the_ways_around_a_filter_are_closed(tmp_path, number):
    """io_uring opens sockets of its own; pidfd_getfd takes another process's."""
    call = (
        f"ctypes.CDLL(None, use_errno=True).syscall({number}, -1, 0, 0)\n"
        "raise OSError(ctypes.get_errno(), '')"
    )
    load = "ctypes.CDLL(None, use_errno=True)"
    assert run(tmp_path, CONFINE, load, call) == REFUSED
    assert run(tmp_path, load, call) != REFUSED, "negative control"


def test_files_are_private_and_no_core_is_written(tmp_path):
    mode = "print(oct(pathlib.Path(tempfile.mkstemp(dir=cache.parent)[1]).stat().st_mode & 0o777))"
    assert run(tmp_path, CONFINE, mode) == "0o600"
    made = "cache.joinpath('x').mkdir(); print(oct(cache.joinpath('x').stat().st_mode & 0o777))"
    assert run(tmp_path, CONFINE, made) == "0o700"
    assert run(tmp_path, CONFINE, "print(tempfile.gettempdir())") == str(tmp_path / "cache/tmp")
    limits = "print(resource.getrlimit(resource.RLIMIT_CORE)[1], ctypes.CDLL(None).prctl(3))"
    assert run(tmp_path, CONFINE, limits) == "0 0"
    assert run(tmp_path, limits).endswith(" 1"), "negative control"


def test_what_a_killed_process_left_is_wiped(tmp_path):
    left = tmp_path / "cache" / "tmp" / "note.arrow"
    left.parent.mkdir(parents=True)
    left.write_text("a note")
    run(tmp_path, CONFINE, "pass")
    assert not left.exists()
    assert left.parent.is_dir()


def test_libraries_are_offline_and_proxies_forgotten(tmp_path):
    shown = "print(os.environ.get('HTTPS_PROXY'), os.environ['HF_HUB_OFFLINE'])"
    proxy = {"HTTPS_PROXY": "http://proxy:3128", "HF_HUB_OFFLINE": "0"}
    assert run(tmp_path, CONFINE, shown, **proxy) == "None 1"


def test_a_child_inherits_no_secret_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = offline_environment(tmp_path)
    assert "HF_TOKEN" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["HOME"] == str(tmp_path)


def test_a_machine_without_such_a_filter_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("platform.machine", lambda: "sparc64")
    with pytest.raises(ConfigurationError, match="sparc64"):
        seal()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place")
@pytest.mark.parametrize(("first", "found"), [("pass", "done"), ("shut_off()", "EACCES")])
def test_another_process_of_the_user_cannot_read_the_agents_memory(tmp_path, first, found):
    """As an ordinary user; a parent may trace its child whatever the system's own rule is."""
    agent = (
        f"import os, sys; sys.path.insert(0, {str(Path.cwd())!r}); "
        "from fedward.client.sandbox import shut_off; "
        f"os.setgroups([]); os.setgid(65534); os.setuid(65534); {BACK}{first}; "
        "print(flush=True); sys.stdin.read()"
    )
    program = f"""
import errno, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {agent!r}], stdin=-1, stdout=-1)
child.stdout.readline()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open(f"/proc/{{child.pid}}/mem", "rb").close()
    print("done")
except OSError as error:
    print(errno.errorcode[error.errno])
child.stdin.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == found, done.stderr


BACK = "import ctypes; ctypes.CDLL(None).prctl(4, 1, 0, 0, 0); "
"""To change one's user makes a process undumpable; an agent that starts as its user is not."""
