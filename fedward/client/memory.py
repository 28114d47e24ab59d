"""What a site must not forget about sessions, on its own disk."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedward import failpoints
from fedward.aggregation.transcript import Outcome
from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json, digest
from fedward.errors import IdentityError, LedgerError, LedgerRolledBack
from fedward.identity import Identity, Roster, open_sealed
from fedward.messages import Receipt
from fedward.privacy.chain import Chain
from fedward.privacy.ledger import Ledger
from fedward.private_files import FileState, file_state, make_private_folder, write_private

_TASK = "fedward/1/task kept"
_RUNS = 4  # side by side, whose last adapter is kept


@dataclass(frozen=True, kw_only=True)
class KeptTask:
    """What a site keeps of a task: what the next round's adapter is recomputed from.

    Args:
        attempt: The task's.
        adapter: Safetensors bytes.
        roster: The pinned roster of that day: a sum means something under the one that it was made
            under, and members come and go between rounds.
        counted: Of a plan with ``scaffold``: which of the site's updates it went on from.
    """

    attempt: Attempt
    adapter: bytes
    roster: Roster
    counted: int | None = None


class SiteMemory:
    """The :class:`~fedward.aggregation.session_memory.SessionMemory` of a real site.

    That an input counts as sent is the ledger's to remember, so that privacy is spent there in the
    same instant; the rest is a chained file of its own. It keeps the coordinator's newest receipt
    for the ledger, so that a ledger restored alone is noticed without asking anybody. Beside it, in
    the folder ``tasks``, lies the adapter of each run's last task, signed.

    Args:
        chain: The file, held by this memory alone.
        ledger: The site's open ledger.
        identity: The site's key.
        tasks: The folder of the adapters; made when it is needed.

    Raises:
        LedgerError: An entry is of a kind that this version does not know.
        LedgerRolledBack: The ledger lacks what this memory saw of it.
    """

    def __init__(self, chain: Chain, ledger: Ledger, identity: Identity, tasks: Path) -> None:
        self._chain, self._ledger, self._identity, self._tasks = chain, ledger, identity, tasks
        self._newest: dict[str, tuple[int, int, int]] = {}
        self._signed: dict[str, str] = {}
        self._cohorts: dict[str, tuple[int, ...]] = {}
        self._begun: str | None = None
        self._acknowledged = 0
        self._last: tuple[FileState, KeptTask] | None = None
        if chain.entries and ledger.head[0] == 0:
            raise LedgerRolledBack(
                "this site remembers sessions, but its ledger is empty: restore the ledger"
            )
        for entry in chain.entries:
            if entry["kind"] == "begin":
                first, second, third = entry["order"]
                self._newest[entry["run"]] = (first, second, third)
                self._begin(entry["run"])
            elif entry["kind"] == "signed":
                self._signed[entry["session"]] = entry["survivors"]
                self._sign(entry["cohort"])
            elif entry["kind"] == "receipt":
                ledger.check_anchor(entry["seq"], entry["head"])
                self._acknowledged = entry["seq"]
            elif entry["kind"] != "released":
                kind = entry["kind"]
                raise LedgerError(f"unknown kind of entry {kind!r}; a newer version wrote it")
        chain.forget()

    @classmethod
    def open(cls, path: Path, identity: Identity, ledger: Ledger) -> Self:
        """Open or make the memory at ``path``.

        Raises:
            LedgerError: See :class:`~fedward.privacy.chain.Chain` and this class.
        """
        chain = Chain(path, identity, purpose="fedward memory")
        try:
            return cls(chain, ledger, identity, path.with_name("tasks"))
        except LedgerError:
            chain.close()
            raise

    def close(self) -> None:
        """Let the file go."""
        self._chain.close()

    def newest(self, run: str) -> tuple[int, int, int] | None:
        """The newest (round, session, attempt) that this site entered in a run."""
        return self._newest.get(run)

    def begin(self, attempt: Attempt) -> None:
        """Record that the attempt is now the newest of its run."""
        failpoints.hit("memory.begin")
        self._chain.append({"kind": "begin", "run": attempt.run, "order": attempt.order})
        self._newest[attempt.run] = attempt.order
        self._begin(attempt.run)
        failpoints.hit("memory.begun")

    def mark_spent(self, attempt: Attempt) -> None:
        """Record in the ledger that the attempt's input counts as sent."""
        self._ledger.mark_sent(attempt)

    def signed(self, session: bytes) -> bytes | None:
        """The survivor set that this site signed in a session."""
        found = self._signed.get(session.hex())
        return None if found is None else bytes.fromhex(found)

    def remember_signed(self, outcome: Outcome) -> None:
        """Record that the site signs this survivor set, and no other of the session ever."""
        session, survivors = outcome.session.hex(), outcome.survivors_hash.hex()
        cohort = outcome.survivors
        self._chain.append(
            {"kind": "signed", "session": session, "survivors": survivors, "cohort": cohort}
        )
        self._signed[session] = survivors
        self._sign(cohort)
        failpoints.hit("memory.signed")

    def cohort(self, attempt: Attempt) -> tuple[int, ...] | None:
        """The survivors that this site signed in an attempt, if that is its run's newest."""
        newest = self._newest.get(attempt.run) == attempt.order
        return self._cohorts.get(attempt.run) if newest else None

    def keep_task(self, task: KeptTask) -> None:
        """Keep a run's last task; durable on return.

        Of many runs those used last are kept.
        """
        attempt = task.attempt
        head: list[Json] = [attempt.run, *attempt.order, task.roster.to_json(), task.counted]
        body = canonical_json(head) + b"\n" + task.adapter
        make_private_folder(self._tasks)
        write_private(self._task_file(attempt.run), self._identity.seal(_TASK, body))
        failpoints.hit("memory.task")
        self._last = file_state(self._task_file(attempt.run)), task
        kept = sorted(self._tasks.glob("*.signed"), key=lambda path: path.stat().st_mtime_ns)
        for path in kept[:-_RUNS]:
            path.unlink()

    def last_task(self, run: str) -> KeptTask | None:
        """A run's last task; None if none is kept.

        Raises:
            LedgerError: The file is not what this site wrote.
        """
        path = self._task_file(run)
        if not path.exists():
            return None
        if self._last is not None and self._last[0] == file_state(path):
            return self._last[1]  # nobody touched it since this process wrote it
        try:
            body = open_sealed(self._identity.public_key, _TASK, path.read_bytes())
            head, _, adapter = body.partition(b"\n")
            name, first, second, third, facts, *rest = json.loads(head)
            (counted,) = rest or [None]  # kept before there was scaffold
            attempt = Attempt(run=name, round=first, session=second, attempt=third)
            roster = Roster.from_json(facts)
            return KeptTask(attempt=attempt, adapter=adapter, roster=roster, counted=counted)
        except (IdentityError, ValueError) as error:
            raise LedgerError(
                f"{path}: is not what this site wrote, or in another form; remove it, and the "
                "journal will say that the next sum could not be checked"
            ) from error

    def keep_receipt(self, receipt: Receipt) -> None:
        """Record a receipt that was checked, if it is for a newer line than the one kept."""
        if receipt.seq > self._acknowledged:
            head = self._ledger.line(receipt.seq)
            failpoints.hit("memory.receipt")
            self._chain.append({"kind": "receipt", "head": head, **vars(receipt)})
            self._acknowledged = receipt.seq

    def remember_released(self, session: bytes) -> None:
        """Record that the site's shares of the session count as released."""
        self._chain.append({"kind": "released", "session": session.hex()})
        failpoints.hit("memory.released")

    def _begin(self, run: str) -> None:
        self._begun = run
        self._cohorts.pop(run, None)

    def _sign(self, cohort: Iterable[int]) -> None:
        """A site has one session at a time: what it signs belongs to the attempt begun last."""
        if self._begun is not None:
            self._cohorts[self._begun] = tuple(cohort)

    def _task_file(self, run: str) -> Path:
        return self._tasks / f"{digest(run).hex()}.signed"
