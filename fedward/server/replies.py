"""Waiting for the replies to a round's letters."""

from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_SECONDS = 0.1


class Clock(Protocol):
    """A clock of seconds; the module ``time`` is one."""

    def monotonic(self) -> float:
        """Seconds since some instant."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Let them pass."""
        ...


def collect(grid: Grid, messages: list[Message], seconds: float, clock: Clock) -> list[Message]:
    """Push messages and pull replies until all are there or the time is over.

    Args:
        grid: Flower's.
        messages: One to each node.
        seconds: The longest to wait.
        clock: What they are measured by.
    """
    waiting = set(grid.push_messages(messages))
    end, pause, found = clock.monotonic() + seconds, 0.001, list[Message]()
    over = False
    while waiting and not over:
        over = clock.monotonic() >= end  # then one look more: this process may have stood still
        replies = list(grid.pull_messages(waiting))
        found += replies
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        if waiting and not (replies or over):
            clock.sleep(pause)
            pause = min(pause * 1.5, _POLL_SECONDS)
    return found
