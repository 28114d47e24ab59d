"""Every address that this Python looks up or connects to, written to the file FIELD_WATCH names.

Python imports a module of this name before anything else.
"""

import os
import sys

_EVENTS = {
    "socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
    "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo",
}  # fmt: skip


def _watch(path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS:
            told = [part for part in arguments if not hasattr(part, "fileno")]
            os.write(file, f"{event}\t{told!r}\n".encode())

    sys.addaudithook(hook)


if "FIELD_WATCH" in os.environ:
    _watch(os.environ["FIELD_WATCH"])
