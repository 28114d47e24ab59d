"""What a site must not forget between sessions, or after a crash in the middle of one."""

from typing import Protocol

from fedward.aggregation.transcript import Outcome
from fedward.attempt import Attempt


class SessionMemory(Protocol):
    """Durable facts: each method that records one returns only when it would survive a crash."""

    def newest(self, run: str) -> tuple[int, int, int] | None:
        """The newest (round, session, attempt) that this site entered in a run."""
        ...

    def begin(self, attempt: Attempt) -> None:
        """Record that the attempt is now the newest of its run."""
        ...

    def mark_spent(self, attempt: Attempt) -> None:
        """Record that the attempt's input counts as sent."""
        ...

    def signed(self, session: bytes) -> bytes | None:
        """The survivor set that this site signed in a session."""
        ...

    def remember_signed(self, outcome: Outcome) -> None:
        """Record that the site signs this survivor set, and no other of the session ever."""
        ...

    def remember_released(self, session: bytes) -> None:
        """Record that the site's shares of the session count as released."""
        ...


class VolatileMemory:
    """A :class:`SessionMemory` for tests and simulations: it forgets with the process."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[int, int, int]] = {}
        self._signed: dict[bytes, bytes] = {}
        self.spent: list[Attempt] = []
        self.released: list[bytes] = []

    def newest(self, run: str) -> tuple[int, int, int] | None:
        """The newest (round, session, attempt) that this site entered in a run."""
        return self._newest.get(run)

    def begin(self, attempt: Attempt) -> None:
        """Record that the attempt is now the newest of its run."""
        self._newest[attempt.run] = attempt.order

    def mark_spent(self, attempt: Attempt) -> None:
        """Record that the attempt's input counts as sent."""
        self.spent.append(attempt)

    def signed(self, session: bytes) -> bytes | None:
        """The survivor set that this site signed in a session."""
        return self._signed.get(session)

    def remember_signed(self, outcome: Outcome) -> None:
        """Record that the site signs this survivor set."""
        self._signed[outcome.session] = outcome.survivors_hash

    def remember_released(self, session: bytes) -> None:
        """Record that the site's shares of the session count as released."""
        self.released.append(session)
