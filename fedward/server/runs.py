"""The coordinator's book of runs: what was asked for, and what became of it (SQLite).

A run's state is folded from its events, so a restarted coordinator finds it again::

    queued ──start──> running ──finish──> finished
      ^  │               │
      │  └──pause──┬─────┤
      └──resume── paused └──abort (from any state that is not final)──> aborted

Every change is idempotent: to pause a paused run changes nothing. What a *running* run does right
now is no event; who shows it asks for a sign of life (:class:`fedward.server.engine.Engine`).
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedward import failpoints
from fedward.errors import InvalidValue, RoundError
from fedward.plan import Plan, from_json
from fedward.server.database import connect, transaction
from fedward.tuning.vector import Layout, layout_from_bytes, layout_to_bytes


class RunState(StrEnum):
    """Where a run stands; FINISHED and ABORTED are final."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    ABORTED = "aborted"


_FROM = {
    RunState.QUEUED: {RunState.PAUSED},
    RunState.RUNNING: {RunState.QUEUED},
    RunState.PAUSED: {RunState.QUEUED, RunState.RUNNING},
    RunState.FINISHED: {RunState.RUNNING},
    RunState.ABORTED: {RunState.QUEUED, RunState.RUNNING, RunState.PAUSED},
}
"""From which states each state may be reached."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as the book has it.

    Args:
        name: Unique; the run's name in letters, ledgers and events.
        plan: Frozen.
        start: The adapter's first state, safetensors bytes.
        layout: The trainable tensors.
        state: Where it stands.
        reason: Why, in words; empty where nothing is to be said.
        changed: Unix seconds of the last change.
    """

    name: str
    plan: Plan
    start: bytes
    layout: Layout
    state: RunState
    reason: str
    changed: float


class NoSuchRun(RoundError):
    """The book has no run of this name."""


_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS run (name TEXT PRIMARY KEY, plan BLOB NOT NULL, "
    "start BLOB NOT NULL, layout BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS change (seq INTEGER PRIMARY KEY, "
    "run TEXT NOT NULL REFERENCES run (name), "
    "state TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL) STRICT",
)


class RunBook:
    """The open book; any number of threads and processes may each have it open.

    Args:
        folder: Where ``book.sqlite`` is; created if missing.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path, self._clock = folder / "book.sqlite", clock
        with self._transaction() as db:
            for statement in _SCHEMA:
                db.execute(statement)

    def submit(self, name: str, plan: Plan, start: bytes, layout: Layout) -> Run:
        """Queue a run; the very same run again changes nothing.

        Raises:
            InvalidValue: The name is no name.
            RoundError: A run of this name has another plan or start.
        """
        if not 1 <= len(name) <= 128 or not name.isprintable() or "/" in name:
            raise InvalidValue("name", name, "1 to 128 printable characters without '/'")
        given = (plan.to_json(), start, layout_to_bytes(layout))
        with self._transaction() as db:
            row = db.execute("SELECT plan, start, layout FROM run WHERE name=?", (name,)).fetchone()
            if row is None:
                db.execute("INSERT INTO run VALUES (?, ?, ?, ?)", (name, *given))
                self._append(db, name, RunState.QUEUED, "")
            elif row != given:
                raise RoundError(
                    f"run {name!r} was started with another plan or model: take another --name"
                )
        return self.get(name)

    def change(self, name: str, state: RunState, reason: str = "") -> Run:
        """Bring a run into a state; if it is there already, nothing happens.

        Raises:
            NoSuchRun: No run has this name.
            RoundError: That state cannot be reached from where the run stands.
        """
        with self._transaction() as db:
            now = self._last(db, name)[0]
            if now is not state:
                if now not in _FROM[state]:
                    raise RoundError(f"run {name!r} is {now}: it cannot become {state}")
                failpoints.hit("book.change")
                self._append(db, name, state, reason)
                failpoints.hit("book.changed")
        return self.get(name)

    def get(self, name: str) -> Run:
        """One run.

        Raises:
            NoSuchRun: No run has this name.
        """
        with self._transaction() as db:
            return self._read(db, name)

    def state(self, name: str) -> RunState:
        """Where one run stands."""
        with self._transaction() as db:
            return self._last(db, name)[0]

    def all(self) -> list[Run]:
        """Every run, oldest first."""
        with self._transaction() as db:
            names = db.execute("SELECT name FROM run ORDER BY rowid").fetchall()
            return [self._read(db, name) for (name,) in names]

    def next(self, besides: Container[str] = ()) -> str | None:
        """The run to work on: one that runs already, else the one that waits longest.

        Args:
            besides: Runs that somebody works on.
        """
        with self._transaction() as db:
            for state in (RunState.RUNNING, RunState.QUEUED):
                rows = db.execute(
                    "SELECT run FROM change WHERE state=? AND seq IN "
                    "(SELECT max(seq) FROM change GROUP BY run) ORDER BY seq",
                    (state.value,),
                )
                for (name,) in rows:
                    if name not in besides:
                        return str(name)
        return None

    def _read(self, db: sqlite3.Connection, name: str) -> Run:
        state, reason, changed = self._last(db, name)
        plan, start, layout = db.execute(
            "SELECT plan, start, layout FROM run WHERE name=?", (name,)
        ).fetchone()
        return Run(
            name=name,
            plan=from_json(plan),
            start=start,
            layout=layout_from_bytes(layout),
            state=state,
            reason=reason,
            changed=changed,
        )

    def _last(self, db: sqlite3.Connection, name: str) -> tuple[RunState, str, float]:
        row = db.execute(
            "SELECT state, reason, at FROM change WHERE run=? ORDER BY seq DESC LIMIT 1", (name,)
        ).fetchone()
        if row is None:
            names = [known for (known,) in db.execute("SELECT name FROM run ORDER BY rowid")]
            known = ", ".join(names) or "none"
            raise NoSuchRun(f"no run is called {name!r}; runs: {known}")
        return RunState(row[0]), row[1], row[2]

    def _append(self, db: sqlite3.Connection, name: str, state: RunState, reason: str) -> None:
        db.execute(
            "INSERT INTO change (run, state, reason, at) VALUES (?, ?, ?, ?)",
            (name, state.value, reason, self._clock()),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One connection for one transaction: it may come from any thread."""
        with contextlib.closing(connect(self._path)) as db, transaction(db):
            yield db
