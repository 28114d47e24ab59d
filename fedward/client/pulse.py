"""The agent's signs of life: a small file that says what it does and when it said so."""

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Seconds between two signs of life."""

FRESH_SECONDS = 20.0
"""How long a sign of life is believed."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """What a running agent says of itself.

    Args:
        pid: Its process.
        started: Unix time of its start.
        beat: Unix time of these words.
        connected: Whether the coordinator answers.
        step: The step at which the trainer last gave a sign of life; 0 outside of training.
        progress: Unix time of that; 0.0 if there was none.
    """

    pid: int
    started: float
    beat: float
    connected: bool = False
    step: int = 0
    progress: float = 0.0


class Pulse:
    """The agent's signs of life: a file, written whole every time.

    A disk that takes no file takes no sign of life, and stops nobody's work for it.

    Args:
        path: Where it lies.
        clock: Unix seconds; only simulations replace it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock, self._lock = path, clock, threading.RLock()
        self._failed: int | None = 0
        now = clock()
        self._life = Life(pid=os.getpid(), started=now, beat=now)
        self.beat()

    def connection(self, state: str) -> None:
        """Take ``connected`` or ``disconnected`` from the fleet client."""
        with self._lock:
            self._say(dataclasses.replace(self._life, connected=state == "connected"))

    def progress(self, step: int) -> None:
        """Take a sign of life from the trainer."""
        with self._lock:
            self._say(dataclasses.replace(self._life, step=step, progress=self._clock()))

    def beat(self) -> None:
        """Say that the process lives."""
        with self._lock:
            self._say(self._life)

    def end(self) -> None:
        """Say that it stopped in order."""
        with self._lock:
            self._path.unlink(missing_ok=True)

    def _say(self, life: Life) -> None:
        with self._lock:
            self._life = dataclasses.replace(life, beat=self._clock())
            try:
                self._write()
            except OSError as error:
                if error.errno != self._failed:
                    _LOG.warning(
                        "%s: no sign of life can be written: %s", self._path, error.strerror
                    )
                self._failed = error.errno
            else:
                self._failed = 0

    def _write(self) -> None:
        scratch = self._path.with_name(f"{self._path.name}.part")
        # Not synced: after a power loss there is no process to tell of.
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(dataclasses.asdict(self._life), file)
        scratch.replace(self._path)
