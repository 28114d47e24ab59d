"""Whether this machine reaches its coordinator: proxy, DNS, TCP, TLS, certificate, clock.

One real connection, as the daemon would make it; each step is a finding, and the first that fails
is the last.
"""

import base64
import email.utils
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fedward.errors import RoundError

_SECONDS = 10.0
_CLOCK_WARN, _CLOCK_FAIL = 30.0, 300.0
_DAYS_WARN = 7.0


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check of the doctor.

    Args:
        check: What was looked at.
        verdict: How it is.
        says: What was found.
        do: What to do about it; empty where nothing is to be done.
    """

    check: str
    verdict: Verdict
    says: str
    do: str = ""

    @classmethod
    def ok(cls, check: str, says: str) -> "Finding":
        """Nothing is to be done."""
        return cls(check=check, verdict=Verdict.OK, says=says)

    @classmethod
    def warn(cls, check: str, says: str, do: str) -> "Finding":
        """It works, but somebody should look at it."""
        return cls(check=check, verdict=Verdict.WARN, says=says, do=do)

    @classmethod
    def fail(cls, check: str, says: str, do: str) -> "Finding":
        """It keeps the site from taking part."""
        return cls(check=check, verdict=Verdict.FAIL, says=says, do=do)


def reach(address: str, ca: Path) -> Iterator[Finding]:
    """Connect to a coordinator and look at every step.

    Args:
        address: ``https://HOST:PORT``.
        ca: The only certificate (PEM) that its TLS is trusted by.

    Yields:
        Findings ``proxy``, ``dns``, ``tcp``, ``tls``, ``certificate`` and ``clock``, up to the
        first that fails.
    """
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or 443
    proxy = _proxy(host)
    shown = f"through {_without_password(proxy)}" if proxy else "none; connects directly"
    yield Finding.ok("proxy", shown)
    target = urlsplit(proxy) if proxy else parts
    first = (target.hostname or "", target.port or (3128 if proxy else 443))
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(*first, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        yield Finding.fail(
            "dns",
            f"{first[0]} has no address ({_words(error)})",
            "check the name, and that the resolver may be asked",
        )
        return
    yield Finding.ok("dns", f"{first[0]} is {', '.join(sorted(found))}")
    try:
        plain = socket.create_connection(first, timeout=_SECONDS)
    except OSError as error:
        yield Finding.fail(
            "tcp",
            f"{first[0]}:{first[1]} does not answer ({_words(error)})",
            "let the firewall pass this address; is it being served?",
        )
        return
    with plain:
        yield from _over(plain, host, port, ca, proxy)


def _over(
    plain: socket.socket, host: str, port: int, ca: Path, proxy: str | None
) -> Iterator[Finding]:
    """Everything above TCP."""
    try:
        if proxy is not None:
            _tunnel(plain, host, port, proxy)
        yield Finding.ok("tcp", f"{host}:{port} answers")
        context = ssl.create_default_context(cafile=str(ca))
        with context.wrap_socket(plain, server_hostname=host) as secure:
            yield Finding.ok("tls", f"{secure.version()}, by the coordinator's own authority")
            yield _certificate(secure)
            yield _clock(secure, host)
    except RoundError as error:
        yield Finding.fail("tcp", str(error), "let the proxy pass CONNECT to the coordinator")
    except ssl.SSLCertVerificationError as error:
        yield Finding.fail(
            "tls",
            f"the certificate is refused ({error.verify_message})",
            "a proxy that opens TLS must leave this connection alone; a wrong clock or an "
            "expired certificate looks the same; else enrol again",
        )
    except OSError as error:  # also of ssl, and a missing file
        yield Finding.fail(
            "tls",
            f"no TLS with {host}:{port} ({_words(error)})",
            f"is it the coordinator's port, and is {ca.name} there?",
        )


def _tunnel(plain: socket.socket, host: str, port: int, proxy: str) -> None:
    asked, parts = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n", urlsplit(proxy)
    if parts.username is not None:
        account = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        asked += f"Proxy-Authorization: Basic {base64.b64encode(account).decode()}\r\n"
    plain.sendall(f"{asked}\r\n".encode())
    answer = _head(plain)
    if b" 200 " not in answer.split(b"\r\n")[0] + b" ":
        status = answer.split(b"\r\n")[0][:60].decode("ascii", "replace")
        raise RoundError(f"the proxy refuses the connection: {status!r}")


def _certificate(secure: ssl.SSLSocket) -> Finding:
    ends = ssl.cert_time_to_seconds(str((secure.getpeercert() or {})["notAfter"]))
    days = (ends - time.time()) / 86400
    says = f"the coordinator's certificate ends in {days:.0f} days"
    if days < _DAYS_WARN:
        return Finding.warn("certificate", says, "ask the coordinator to serve a new one")
    return Finding.ok("certificate", says)


def _clock(secure: ssl.SSLSocket, host: str) -> Finding:
    """Compare with the Date that HTTP answers carry (RFC 9110, 6.6.1)."""
    secure.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    dates = [line[5:] for line in _head(secure).split(b"\r\n") if line[:5].lower() == b"date:"]
    parsed = email.utils.parsedate_tz(dates[0].decode("ascii", "replace")) if dates else None
    if parsed is None:
        return Finding.warn(
            "clock",
            "the coordinator gives no time",
            "compare this machine's clock by hand: timedatectl",
        )
    off = time.time() - email.utils.mktime_tz(parsed)
    says = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the coordinator's"
    if abs(off) < _CLOCK_WARN:
        return Finding.ok("clock", says)
    judge = Finding.fail if abs(off) > _CLOCK_FAIL else Finding.warn
    return judge("clock", says, "set it: timedatectl set-ntp true")


def _head(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < 16384:
        part = connection.recv(4096)
        if not part:
            break
        data += part
    return data


def _proxy(host: str) -> str | None:
    """The proxy that programs here would take to a host."""
    proxy = urllib.request.getproxies_environment().get("https")
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    return proxy if "//" in proxy else f"http://{proxy}"


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 3128}"


def _words(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, socket.gaierror | ssl.SSLError) or not number:
        return str(error) or type(error).__name__
    return os.strerror(number)
