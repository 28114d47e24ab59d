"""The identity of one execution of the protocol: run, round, session, attempt (DESIGN §1)."""

from dataclasses import dataclass

from fedward.errors import InvalidValue


@dataclass(frozen=True, kw_only=True, order=True)
class Attempt:
    """One attempt at one session of one round of one run.

    Within a run, attempts are ordered by (round, session, attempt); a site answers only to one that
    is newer than every one it has seen.

    Args:
        run: The run's name, 1 to 128 printable characters; it stands in logs and terminals.
        round: Round number from 1.
        session: Session of the round from 1.
        attempt: Attempt at the session from 1.
    """

    run: str
    round: int
    session: int = 1
    attempt: int = 1

    def __post_init__(self) -> None:
        """Check every limit."""
        if type(self.run) is not str or not 1 <= len(self.run) <= 128 or not self.run.isprintable():
            raise InvalidValue("run", self.run, "1 to 128 printable characters")
        names = ("round", "session", "attempt")
        for key, value in zip(names, self.order, strict=True):
            if type(value) is not int or not 1 <= value < 2**31:
                raise InvalidValue(key, value, "1 to 2^31 - 1")

    @property
    def order(self) -> tuple[int, int, int]:
        """(round, session, attempt): compares attempts of the same run."""
        return (self.round, self.session, self.attempt)
