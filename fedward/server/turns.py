"""Whose turn it is: runs side by side take turns at the sites, one attempt at a time.

A site has one session at a time. It answers letters one after the other, so a session of one run
would wait for a training of another, its secrets would live for hours instead of seconds, and
deadlines would pass. So an attempt has the sites to itself from its tasks to its sum, and who
waits longest is next.
"""

import threading
from collections import deque


class Turns:
    """A line of runs; the first in it has the turn. For any number of threads."""

    def __init__(self) -> None:
        self._line = deque[str]()
        self._moved = threading.Condition()

    def wait(self, run: str, seconds: float) -> bool:
        """Stand in line (a run that stands there keeps its place) and wait for the turn.

        Args:
            run: Who asks.
            seconds: How long to wait at most; the place in the line stays.

        Returns:
            Whether it is the run's turn; it is then until :meth:`leave`.
        """
        with self._moved:
            if run not in self._line:
                self._line.append(run)
            return self._moved.wait_for(lambda: self._line[0] == run, seconds)

    def leave(self, run: str) -> None:
        """Give the turn, or the place in the line, back; nothing happens without one."""
        with self._moved:
            if run in self._line:
                self._line.remove(run)
                self._moved.notify_all()
