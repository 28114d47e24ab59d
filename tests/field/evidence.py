"""What the machines of the field test left behind, and what must not be in it.

Three searches: a planted text in any usual coding, a secret key that served two inputs, and an
address that is not the coordinator's. Each has its negative control in ``test_evidence.py``.
"""

import ast
import base64
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.field import scene


def codings(text: str) -> list[bytes]:
    """A text as it may stand in a file: plain, UTF-16, hex, base64 at each of three offsets."""
    plain = text.encode()
    found = [plain, text.encode("utf-16-le"), plain.hex().encode(), plain.hex().upper().encode()]
    for offset in range(3):
        coded = base64.b64encode(bytes(offset) + plain)
        found.append(coded[(0, 2, 3)[offset] : -4])
    return found


def holding(text: str, root: Path, *, but: Sequence[Path] = ()) -> list[Path]:
    """The files below a folder that hold a text in any coding.

    Args:
        text: What is looked for; ASCII.
        root: Where.
        but: Folders that may hold it.
    """
    wanted = codings(text)
    found = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file() or any(path.is_relative_to(f) for f in but):
            continue
        data = path.read_bytes()
        if any(coded in data for coded in wanted):
            found.append(path)
    return found


def mark(path: Path, key: bytes, use: bytes) -> None:
    """Note that a secret key was put to a use; both only as hashes."""
    line = f"{hashlib.sha256(key).hexdigest()} {hashlib.sha256(use).hexdigest()}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def uses(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Key → its uses, from the files that :func:`mark` wrote; a key should have one."""
    found = dict[str, set[str]]()
    for path in paths:
        for line in path.read_text().splitlines():
            key, use = line.split()
            found.setdefault(key, set()).add(use)
    return found


def streams(sites: Sequence[Path]) -> tuple[int, int]:
    """How many mask and noise streams the sites have used, each for one input alone."""
    found = [uses(map(of, sites)) for of in (scene.masks_of, scene.draws_of)]
    twice = sum(len(inputs) > 1 for keys in found for inputs in keys.values())
    assert twice == 0, f"{twice} secret streams were used twice"
    return len(found[0]), len(found[1])


def strangers(watched: str, host: str, port: int) -> list[str]:
    """The lines of ``watch/sitecustomize.py`` about anything but the coordinator and Unix sockets.

    To look up the coordinator's numeric address asks no name server.
    """
    found = []
    for line in watched.splitlines():
        event, _, told = line.partition("\t")
        target = ast.literal_eval(told)
        if event == "socket.getaddrinfo":
            known = target[0] in {host, host.encode()}
        else:
            known = isinstance(target[0], str | bytes) or tuple(target[0][:2]) == (host, port)
            known = known and not event.startswith("socket.get")
        if not known:
            found.append(line)
    return found


TRACED = ("strace", "-D", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o")
"""What to put before a command, followed by a file for :func:`strangers_of_kernel`."""

_ADDRESS = re.compile(r'sa_family=AF_INET6?,.*?htons\((\d+)\).*?"([0-9a-fA-F.:]+)"')


def strangers_of_kernel(traced: str, host: str, port: int) -> list[str]:
    """The lines of an strace about an internet address that is not the coordinator's."""
    found = []
    for line in traced.splitlines():
        address = _ADDRESS.search(line)
        other = address is not None and (address[2], int(address[1])) != (host, port)
        if other or ("AF_INET" in line and address is None):
            found.append(line)
    return found
