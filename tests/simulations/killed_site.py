"""A site in a process of its own that is killed, with SIGKILL, at any step towards its disk.

The steps are what the site asks of the system: each write (before it and in the middle of it), each
fsync, truncation and answer (before and after it). Their number in order is the *instant* of the
kill.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedward.client.memory import SiteMemory
from fedward.messages import open_letter
from fedward.privacy.books import Books
from fedward.privacy.ledger import read_books
from tests.client.desk import POLICY, RUN, Desk

SITE = 0
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])


def to_bytes(records: RecordDict) -> bytes:
    return bytes(recorddict_to_proto(records).SerializeToString())


def from_bytes(data: bytes) -> RecordDict:
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


class Steps:
    """Counts steps and dies at one of them."""

    def __init__(self, deadly: int) -> None:
        self.deadly, self.taken = deadly, 0

    def step(self, *_: Any) -> None:
        self.taken += 1
        if self.taken == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            self.step()
            result = call(*arguments)
            self.step()
            return result

        return counted

    def write(self, call: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        """In two halves, so that the kill finds a line half written."""

        def counted(descriptor: int, data: Any) -> int:
            self.step()
            half = len(data) // 2
            done = call(descriptor, data[:half])
            self.step()
            return done + call(descriptor, data[half:])

        return counted


def serve(folder: str, scratch: str, deadly: int, late: bool, connection: Connection) -> None:
    """Answer letters until the other end closes, or death.

    ``late`` is the twin: an update counts as sent only after it has been sent.
    """
    desk = Desk(Path(scratch))
    desk.folder = Path(folder)
    steps = Steps(deadly)
    os.write = steps.write(os.write)
    os.fsync, os.ftruncate = steps.around(os.fsync), steps.around(os.ftruncate)
    owed: list[Callable[[], None]] = []
    if late:
        mark = SiteMemory.mark_spent
        SiteMemory.mark_spent = lambda self, attempt: owed.append(  # type: ignore[method-assign]
            lambda: mark(self, attempt)
        )
    agent = desk.agent(SITE)
    while True:
        try:
            asked = connection.recv_bytes()
        except EOFError:
            return
        answer = to_bytes(agent.answer(from_bytes(asked)))
        steps.step()
        connection.send_bytes(answer)
        steps.step()
        while owed:
            owed.pop()()


class KilledSite:
    """The site as Flower's ClientApp: it dies at its instants and is started again by a message.

    Args:
        desk: Keys and roster; the site's folder is not held by this process.
        scratch: A folder for what no site needs.
        instants: Steps at which one process after the other dies; all later ones live.
        late: See :func:`serve`.
    """

    def __init__(
        self, desk: Desk, scratch: Path, instants: Iterable[int], *, late: bool = False
    ) -> None:
        self.desk, self.scratch, self.late = desk, scratch, late
        self._instants = iter(instants)
        self._process: Any = None
        self._connection: Connection | None = None
        self.deaths = 0
        self.left: dict[tuple[int, int, int], bytes] = {}
        """What has left: the masked words of each attempt."""

    def __call__(self, message: Message, context: Context) -> Message:
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send_bytes(to_bytes(message.content))
            data = self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            self._buried()
            return Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
        records = from_bytes(data)
        self._note(records)
        return Message(records, reply_to=message)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._process.join()
            self._connection = None

    def books(self) -> Books:
        """What the ledger says at this moment, to whoever reads it."""
        path = self.desk.folder / str(SITE) / "ledger.jsonl"
        key = self.desk.keys[SITE].public_key
        return read_books(path, key, epsilon=POLICY.max_epsilon, delta=POLICY.delta)

    def check(self, reservations: int) -> None:
        """Spent and reserved never under-count what has left, and nothing settles twice."""
        books = self.books() if (self.desk.folder / str(SITE) / "ledger.jsonl").exists() else None
        spent = 0 if books is None else books.spent(RUN)
        assert len(self.left) <= spent <= reservations, "an update left that was not spent"
        if books is not None and RUN in books.runs:
            assert books.remaining(RUN) <= reservations - spent

    def _start(self) -> None:
        deadly = next(self._instants, 0)
        self._connection, theirs = _PROCESSES.Pipe()
        arguments = (str(self.desk.folder), str(self.scratch / str(self.deaths)), deadly)
        self._process = _PROCESSES.Process(target=serve, args=(*arguments, self.late, theirs))
        self._process.start()
        theirs.close()

    def _buried(self) -> None:
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL
        self._connection = None
        self.deaths += 1

    def _note(self, records: RecordDict) -> None:
        letter = open_letter(records, self.desk.keys[SITE].public_key, "site")
        if letter.action == "masked" and "words" in letter.parts:
            words = letter.part("words")
            # One mask on two inputs would give their difference away.
            assert self.left.setdefault(letter.attempt.order, words) == words
