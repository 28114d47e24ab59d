"""What the coordinator must not forget: the events of its runs (SQLite) and their blobs (files).

Every transition of a round is one event, unique by run, round, session, attempt, site and phase,
and chained by hash. Writing an event twice changes nothing, so a restarted coordinator folds the
events and goes on. Blobs (adapters, sums) are content-addressed files, in place before the event
that names them.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedward import failpoints
from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json, digest
from fedward.errors import RoundError
from fedward.private_files import FileState, file_state, sync_folder, write_private
from fedward.server.database import connect, transaction

EVERYBODY = -1
"""The ``site`` of an event that concerns no single site."""


class Phase(StrEnum):
    """The transitions of a round, in order.

    ABORTED ends an attempt; COMMITTED, the gate's no (REFUSED: the adapter stays as it was), or the
    coordinator's own training (FALLBACK) ends a round.
    """

    STARTED = "started"
    INVITED = "invited"
    READY = "ready"
    LEFT_OUT = "left-out"
    KEYS = "keys"
    SHARED = "shared"
    MASKED = "masked"
    CONSISTENT = "consistent"
    UNMASKED = "unmasked"
    ABORTED = "aborted"
    COMMITTED = "committed"
    REFUSED = "refused"
    FALLBACK = "fallback"


ROUND_ENDS = frozenset({Phase.COMMITTED, Phase.REFUSED, Phase.FALLBACK})


@dataclass(frozen=True, kw_only=True)
class Event:
    """One transition.

    Args:
        attempt: Where it belongs.
        site: The site's roster id, or :data:`EVERYBODY`.
        phase: What happened.
        payload: Canonical JSON with the facts of the phase.
    """

    attempt: Attempt
    site: int
    phase: Phase
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far somebody has read the events of all runs.

    Args:
        seq: Number of the last one read; 0 before the first.
        head: The chain's hash there, 32 bytes.
    """

    seq: int = 0
    head: bytes = bytes(32)


BEGINNING = Mark()
"""Before the first event."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  seq INTEGER PRIMARY KEY,
  run TEXT NOT NULL, round INTEGER NOT NULL, session INTEGER NOT NULL, attempt INTEGER NOT NULL,
  site INTEGER NOT NULL, phase TEXT NOT NULL, payload BLOB NOT NULL,
  hash BLOB NOT NULL,
  UNIQUE (run, round, session, attempt, site, phase)
) STRICT
"""


class RunStore:
    """Events and blobs of one coordinator, in one folder.

    Args:
        folder: Created if missing, readable by its owner only.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs"
        self._newest = dict[str, tuple[FileState, bytes]]()
        self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = connect(folder / "runs.sqlite")
        self._db.execute(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def record(
        self, attempt: Attempt, phase: Phase, facts: Json = None, *, site: int = EVERYBODY
    ) -> None:
        """Make one event durable; the same event again changes nothing.

        Raises:
            RoundError: The same event is there with other facts.
        """
        payload = canonical_json(facts)
        key = (attempt.run, *attempt.order, site, phase.value)
        with transaction(self._db):
            row = self._db.execute(
                "SELECT payload FROM event WHERE run=? AND round=? AND session=? AND attempt=? "
                "AND site=? AND phase=?",
                key,
            ).fetchone()
            if row is not None:
                if row[0] != payload:
                    raise RoundError(f"{phase} of {attempt} was recorded with other facts")
                return
            failpoints.hit("store.record")
            head = self._head()
            hashed = _chain(head, attempt, site, phase.value, payload)
            self._db.execute(
                "INSERT INTO event (run, round, session, attempt, site, phase, payload, hash) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, payload, hashed),
            )
            failpoints.hit("store.commit")
        failpoints.hit("store.recorded")

    def events(self, run: str) -> list[Event]:
        """All events of a run, oldest first, after checking the whole chain.

        Raises:
            RoundError: An event was changed, removed or put in.
        """
        return self.events_after(run, BEGINNING)[0]

    def events_after(self, run: str, mark: Mark) -> tuple[list[Event], Mark]:
        """A run's events since a mark, oldest first, and the next mark.

        Who goes on from mark to mark has checked the whole chain, and each event once.

        Raises:
            RoundError: An event since then was changed, removed or put in, or the marked one was.
        """
        found = list[Event]()
        if mark.seq:
            there = self._db.execute("SELECT hash FROM event WHERE seq=?", (mark.seq,)).fetchone()
            if there != (mark.head,):
                raise RoundError(f"the event log is broken: event {mark.seq} is gone or another")
        rows = self._db.execute(
            "SELECT seq, run, round, session, attempt, site, phase, payload, hash "
            "FROM event WHERE seq>? ORDER BY seq",
            (mark.seq,),
        )
        for seq, name, round_number, session, number, site, phase, payload, hashed in rows:
            attempt = Attempt(run=name, round=round_number, session=session, attempt=number)
            mark = Mark(seq=seq, head=_chain(mark.head, attempt, site, phase, payload))
            if mark.head != hashed:
                raise RoundError(f"the event log is broken at {phase} of {attempt}")
            if name == run:
                found.append(Event(attempt=attempt, site=site, phase=Phase(phase), payload=payload))
        return found, mark

    def ledger_lines(self) -> dict[bytes, tuple[int, str]]:
        """The newest line of each site's ledger (number, hash) in the events of all runs, by key.

        Whoever relies on it reads :meth:`events` as well, which checks the chain.
        """
        rows = self._db.execute(
            "SELECT payload FROM event WHERE phase IN (?, ?) ORDER BY seq",
            (Phase.READY.value, Phase.MASKED.value),
        )
        lines = dict[bytes, tuple[int, str]]()
        for (payload,) in rows:
            if (facts := json.loads(payload)) is not None:
                key, seq, head = facts["ledger"]
                lines[bytes.fromhex(key)] = (seq, head)
        return lines

    def put_blob(self, data: bytes) -> str:
        """Store bytes durably under their SHA-256 and return its hex digest."""
        name = hashlib.sha256(data).hexdigest()
        path = self._blobs / name
        if not path.exists():
            failpoints.hit("store.blob")
            write_private(path, data)
            self._newest = {**dict(list(self._newest.items())[-1:]), name: (file_state(path), data)}
        else:  # perhaps since a kill that came before its name was durable
            sync_folder(self._blobs)
        return name

    def blob(self, name: str) -> bytes:
        """Read stored bytes; not those two that were stored last, if nobody touched the files.

        Raises:
            RoundError: They are missing or damaged.
        """
        path = self._blobs / name
        try:
            if name in self._newest and self._newest[name][0] == file_state(path):
                return self._newest[name][1]
            data = path.read_bytes()
        except OSError as error:
            raise RoundError(f"blob {name} is missing") from error
        if hashlib.sha256(data).hexdigest() != name:
            raise RoundError(f"blob {name} is damaged")
        return data

    def _head(self) -> bytes:
        row = self._db.execute("SELECT hash FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        return BEGINNING.head if row is None else bytes(row[0])


def _chain(head: bytes, attempt: Attempt, site: int, phase: str, payload: bytes) -> bytes:
    position = canonical_json([attempt.run, *attempt.order, site, phase])
    return digest("event", head, position, payload)
