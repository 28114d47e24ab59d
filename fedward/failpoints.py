"""Named places where a fault can be let happen: at every change of what a party must not lose.

A place is ``failpoints.hit("name")``; off, it costs one look at a global. It is armed by code
(:func:`armed`) or by ``FEDWARD_FAILPOINTS`` when a process starts (:func:`arm_from`): never by a
plan, a policy or anything that comes over a network. ``FEDWARD_FAILPOINTS`` is a list like
``ledger.sent:kill,chain.sync:enospc@2``: name, action, and at which visit (left out, the first).

Actions: ``kill`` (SIGKILL to this process), ``delay=SECONDS``, ``error`` (an I/O error),
``enospc`` (a full disk).
"""

import contextlib
import difflib
import errno
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from fedward.errors import InvalidValue

_LOG = logging.getLogger(__name__)

VARIABLE = "FEDWARD_FAILPOINTS"
"""The environment variable that arms a process at its start."""

NAMES: Mapping[str, str] = {
    "agent.letter": "a letter is known to be the coordinator's; nothing is done about it yet",
    "agent.prepared": "the trainer has the model that the task asks for",
    "agent.kept": "the task's adapter is on the disk",
    "agent.opened": "the ledger has the run",
    "agent.reserved": "the round's cost is reserved; no record was touched",
    "agent.trained": "the agent has the update",
    "agent.acted": "what the letter asks is done; the journal does not know it yet",
    "agent.answered": "the journal has the answer, which has not left",
    "session.masked": "the update is masked and not yet marked as sent",
    "session.advanced": "a step of the session is done; its state is still the old one",
    "memory.begin": "before a session is noted as begun",
    "memory.begun": "a session is noted as begun",
    "memory.signed": "the survivor set is noted; its signature has not left",
    "memory.released": "the shares are noted as released; they have not left",
    "memory.receipt": "before the coordinator's receipt is noted",
    "memory.task": "an adapter is on the disk; older ones are not removed yet",
    "ledger.run": "before a run is opened in the ledger",
    "ledger.reserve": "before a reservation is written",
    "ledger.sent": "before an update is marked as sent",
    "ledger.written": "a line of the ledger is durable; nobody was told",
    "journal.record": "before a line of the journal is written",
    "journal.recorded": "a line of the journal is durable",
    "chain.open": "before ledger, memory or journal is read",
    "chain.cut": "before a torn last line is cut off",
    "chain.opened": "every line that was read is on the disk",
    "chain.write": "before the bytes of a line are written",
    "chain.sync": "the bytes are written; nothing says that the disk has them",
    "chain.written": "a line is on the disk; nobody was told",
    "file.write": "before a whole file is written beside the old one",
    "file.sync": "the new file is written; nothing says that the disk has it",
    "file.rename": "the new file is on the disk; the old one is in its place",
    "file.renamed": "the new file is in its place; nothing says that the disk knows",
    "trainer.asked": "the trainer has read a task",
    "trainer.prepared": "the trainer has compared model and task",
    "trainer.trained": "the trainer has the update; the agent has nothing of it",
    "trainer.told": "the agent has all of the update",
    "round.folded": "the coordinator knows from its events where the run stands",
    "round.started": "an attempt is recorded as started",
    "round.asked": "letters are signed; none has left",
    "round.answered": "answers are here; nothing of them is recorded",
    "round.closed": "an exchange is over",
    "round.summed": "the sum is known and not recorded",
    "round.kept": "adapter and sum are files; no event names them",
    "round.committed": "the round is recorded as committed",
    "store.record": "before an event is written",
    "store.commit": "an event is written and not committed",
    "store.recorded": "an event is committed; nobody was told",
    "store.blob": "before an adapter or a sum becomes a file",
    "book.change": "before a run's state is changed",
    "book.changed": "a run's state is changed and not committed",
    "registry.filled": "a version's files are written, and nothing says what they are",
    "registry.signed": "a version is whole and durable, and not in its place",
    "registry.moved": "a version is in its place, and not in the index",
    "registry.indexed": "a version is in the index, which is not committed",
}
"""Every failpoint, and what is true there. Each stands in the code exactly once."""

_handler: Callable[[str], None] | None = None


def hit(name: str) -> None:
    """Pass a failpoint; nothing happens unless somebody has armed this process."""
    if _handler is not None:
        _handler(name)


@contextlib.contextmanager
def armed(handler: Callable[[str], None]) -> Iterator[None]:
    """Let a handler see every failpoint that is passed within; what it raises is the fault.

    One handler at a time: an inner one hides the outer one.
    """
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def arm_from(environment: Mapping[str, str]) -> None:
    """Arm this process for its whole life by its environment; nothing without the variable.

    Raises:
        InvalidValue: A name is none of :data:`NAMES`, or an action is unknown.
    """
    global _handler
    text = environment.get(VARIABLE, "")
    if not text:
        return
    faults = dict(_parse(part.strip()) for part in text.split(","))
    visits = Counter[str]()

    def handler(name: str) -> None:
        visits[name] += 1
        if (name, visits[name]) in faults:
            faults[name, visits[name]]()

    _LOG.warning("%s is set: this process will fail on purpose (%s)", VARIABLE, text)
    _handler = handler


def fail(action: str) -> None:
    """Do what an action says.

    Args:
        action: ``kill``, ``error``, ``enospc`` or ``delay=SECONDS``.

    Raises:
        OSError: For ``error`` and ``enospc``.
    """
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("delay="):
        time.sleep(float(action.removeprefix("delay=")))
    else:
        number = errno.ENOSPC if action == "enospc" else errno.EIO
        raise OSError(number, os.strerror(number))


def _parse(part: str) -> tuple[tuple[str, int], Callable[[], None]]:
    found = re.fullmatch(r"([a-z.]+):(kill|error|enospc|delay=\d+(?:\.\d+)?)(?:@([1-9]\d*))?", part)
    if found is None:
        form = "NAME:ACTION or NAME:ACTION@VISIT; actions: kill, delay=SECONDS, error, enospc"
        raise InvalidValue(VARIABLE, part, form)
    name, action, visit = found.groups()
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1) or ["a name of fedward.failpoints"]
        raise InvalidValue(VARIABLE, name, near[0])
    return (name, int(visit or 1)), lambda: fail(action)
