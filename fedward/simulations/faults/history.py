"""What happened in one run of the laboratory, as the checker and people read it."""

from dataclasses import dataclass, field

from fedward.attempt import Attempt
from fedward.errors import SiteCode


@dataclass(frozen=True, kw_only=True)
class Left:
    """A site's answer at the instant at which it left the site, whether or not it arrived.

    Args:
        site: Whose.
        action: What was asked.
        attempt: In which attempt.
        code: The answer's code.
        asked: Hash of the letter that it answers, hex.
        words: The masked words in it; empty if there are none.
        spent: Whether the ledger's file said "sent" of this attempt at that instant.
    """

    site: int
    action: str
    attempt: Attempt
    code: SiteCode | None
    asked: str
    words: bytes
    spent: bool


@dataclass(kw_only=True)
class History:
    """Everything that was seen from outside.

    Args:
        lines: Time and words, in order.
        left: Every answer that left a site.
        wrong: What an observer saw that must never be, as it happened: invariant and words.
        fired: Names of the failpoints at which an armed fault happened, and of message faults.
        last_fault: When the last fault ended, virtual seconds.
        ended: When the run had ended, virtual seconds; None if it had not.
        leaks: Where a patient's words were seen outside of their site.
        task_hashes: What the coordinator's session of each attempt started from, by its parameters.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    last_fault: float = 0.0
    ended: float | None = None
    leaks: list[str] = field(default_factory=list)
    task_hashes: dict[tuple[int, int, int], bytes] = field(default_factory=dict)
