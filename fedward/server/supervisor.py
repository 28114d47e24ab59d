"""Keeps the parts of a service alive: starts a dead one again, and takes all along at the end.

Each part is a process of its own. A part reads its standard input until it ends, which happens when
the supervisor is gone for whatever reason; so no part outlives a killed supervisor.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_STABLE_SECONDS = 20.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process that must run.

    Args:
        name: For the log.
        command: What starts it.
        environment: Variables beside the supervisor's own.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Child:
    part: Part
    process: "subprocess.Popen[bytes]"
    started: float
    pause: float = _FIRST_PAUSE
    again: float | None = None


def supervise(parts: Sequence[Part], stop: threading.Event, *, grace: float = 10.0) -> None:
    """Run the parts until told to stop.

    A part that ends is started again: after half a second at first, after twice as long each time
    that it does not live for 20 seconds, never later than after 30.

    Args:
        parts: What runs.
        stop: Ends everything.
        grace: Seconds between SIGTERM and SIGKILL at the end.
    """
    children = [_Child(part, _start(part), time.monotonic()) for part in parts]
    try:
        while not stop.wait(_LOOK_SECONDS):
            for child in children:
                _look_after(child)
    finally:
        _end([child.process for child in children], grace)


def end_with_supervisor(stop: threading.Event) -> None:
    """In a part: set ``stop`` when the supervisor is gone, and die hard if that does not help."""

    def read() -> None:
        while os.read(0, 1024):
            pass
        stop.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=read, name="supervisor", daemon=True).start()


def _start(part: Part) -> "subprocess.Popen[bytes]":
    _LOG.info("%s starts", part.name)
    return subprocess.Popen(  # noqa: S603  # our own command
        part.command, stdin=subprocess.PIPE, env={**os.environ, **part.environment}
    )


def _look_after(child: _Child) -> None:
    """Note that a part ended, and start it again when its pause is over."""
    now = time.monotonic()
    if child.again is None:
        if child.process.poll() is None:
            return
        if now - child.started > _STABLE_SECONDS:
            child.pause = _FIRST_PAUSE
        _LOG.warning(
            "%s ended with %d; it starts again in %.1f s",
            child.part.name,
            child.process.returncode,
            child.pause,
        )
        _close(child.process)
        child.again = now + child.pause
        child.pause = min(2 * child.pause, _LONGEST_PAUSE)
    elif now >= child.again:
        child.process, child.started, child.again = _start(child.part), now, None


def _end(processes: Sequence["subprocess.Popen[bytes]"], grace: float) -> None:
    for process in processes:
        process.terminate()
    end = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _close(process)


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()
