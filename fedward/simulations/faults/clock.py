"""Virtual time: seconds pass when somebody sleeps, and what is due then happens in order."""

import heapq
import itertools
from collections.abc import Callable
from datetime import UTC, datetime

_EPOCH = 1_800_000_000.0


class VirtualClock:
    """A :class:`fedward.server.rounds.Clock`, starting at 0."""

    def __init__(self) -> None:
        self._now, self._numbers = 0.0, itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self._now

    def unix(self) -> float:
        """The same as Unix seconds."""
        return _EPOCH + self._now

    def local(self) -> datetime:
        """The same as a time of day, for journals."""
        return datetime.fromtimestamp(self.unix(), UTC)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Let an action happen so many seconds from now, once somebody sleeps that long."""
        heapq.heappush(self._due, (self._now + seconds, next(self._numbers), action))

    def sleep(self, seconds: float, /) -> None:
        """Let time pass; an action may itself sleep, and then comes back late."""
        end = self._now + seconds
        while self._due and self._due[0][0] <= end:
            when, _, action = heapq.heappop(self._due)
            self._now = max(self._now, when)
            action()
        self._now = max(self._now, end)
