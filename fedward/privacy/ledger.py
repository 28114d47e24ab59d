"""A site's ledger of privacy: it reserves before data is touched, and refuses beyond the cap.

::

    open_run ──> reserve ──> mark_sent        spent for good, once
                   │  ╰────> reserve          same round and session: the next attempt takes over
                   ╰───────> release, or a later round's reserve: given back, nothing had left
    close_run: what the run has not sent, it never will

One ledger serves one patient population: all runs, data versions, objectives and searches. What its
entries mean is in :mod:`fedward.privacy.books`; this module writes them down.
"""

from pathlib import Path
from typing import Any, Self

from fedward import failpoints
from fedward.attempt import Attempt
from fedward.errors import InvalidValue, LedgerError
from fedward.identity import Identity
from fedward.privacy.accounting import Event, merged
from fedward.privacy.books import Books, to_entry
from fedward.privacy.chain import LEDGER, Chain, read_lines


class Ledger(Books):
    """The open ledger of one patient population at one site.

    Args:
        chain: The file, held by this ledger alone.
        epsilon: Lifetime cap, > 0; ``inf`` in simulations without privacy.
        delta: Lifetime delta, 0 < delta < 1.

    Guarantees:
        Whatever the caller and the coordinator do, and wherever the process is killed, all updates
        marked sent before they left are together (epsilon, delta)-DP for adding or removing one
        unit. A reservation settles once; none is ever under-counted.
    """

    def __init__(self, chain: Chain, *, epsilon: float, delta: float) -> None:
        super().__init__(chain.entries, epsilon=epsilon, delta=delta)
        self._chain = chain
        chain.forget()

    @classmethod
    def open(cls, path: Path, identity: Identity, *, epsilon: float, delta: float) -> Self:
        """Open or make the ledger at ``path`` under a lifetime cap.

        Raises:
            LedgerError: See :class:`~fedward.privacy.chain.Chain`.
        """
        chain = Chain(path, identity, purpose=LEDGER)
        try:
            return cls(chain, epsilon=epsilon, delta=delta)
        except (LedgerError, InvalidValue):
            chain.close()
            raise

    @property
    def head(self) -> tuple[int, str]:
        """Number of entries and hash of the last, for an anchor outside."""
        return self._chain.head

    def check_anchor(self, seq: int, head: str) -> None:
        """Refuse a ledger that is behind a head kept elsewhere (a restored disk).

        Raises:
            LedgerRolledBack: It is behind, or it is another one.
        """
        self._chain.check_anchor(seq, head)

    def line(self, seq: int) -> str:
        """The hash of an entry by its number from 1.

        Raises:
            LedgerRolledBack: There are fewer.
        """
        return self._chain.line(seq)

    def close(self) -> None:
        """Let the file go."""
        self._chain.close()

    def open_run(
        self,
        run: str,
        plan_hash: bytes,
        event: Event,
        reservations: int,
        *,
        metrics: Event | None = None,
    ) -> None:
        """Admit a run under the cap; asking again for the same run changes nothing.

        Args:
            run: The run's name.
            plan_hash: Hash of the frozen plan, 32 bytes.
            event: What one reservation costs: the steps of one round. Noise that is shared among
                sites tells its own share as well (:meth:`~Books.epsilon_alone`).
            reservations: Rounds and spare rounds, >= 1.
            metrics: What the metrics of one round cost beside it.

        Raises:
            BudgetExceeded: The whole run does not fit beside what is spent and committed.
            LedgerError: The run is known with another plan, event or number, or is closed.
        """
        if reservations < 1:
            raise InvalidValue("reservations", reservations, "1 or more")
        events = (event,) if metrics is None else (event, metrics)
        if not merged(events):
            raise InvalidValue("steps", 0, "1 or more in an event")
        known = self._runs.get(run)
        if known is not None:
            if known.closed:
                raise LedgerError(f"run {run!r} is closed; start a new one")
            if (known.plan, known.events, known.reservations) != (
                plan_hash.hex(), events, reservations
            ):  # fmt: skip
                raise LedgerError(f"run {run!r} is known with another plan or cost; refuse it")
            return
        order, alone = self._admit(tuple(e.times(reservations) for e in events), run)
        failpoints.hit("ledger.run")
        self._write(
            {
                "kind": "run",
                "run": run,
                "plan": plan_hash.hex(),
                "events": [to_entry(event) for event in events],
                "reservations": reservations,
                "order": order,
                "alone": alone,
            }
        )

    def reserve(self, attempt: Attempt, *, journal: tuple[int, str] | None = None) -> None:
        """Hold the cost of one round before its data is touched; durable on return.

        An unsent reservation of the same round and session passes to this attempt; unsent ones of
        earlier rounds are given back. One that this attempt holds already serves again, as after a
        crash in the training: nothing of it has left.

        Args:
            attempt: What it is held for.
            journal: Number and hash of the journal's last line, kept here as their witness.

        Raises:
            BudgetExceeded: Everything the run was admitted with is spent or held.
            LedgerError: Unknown or closed run, or the attempt is not newer than the last.
        """
        if attempt.order in self._known(attempt.run).open:
            return
        witness = {} if journal is None else {"journal": list(journal)}
        failpoints.hit("ledger.reserve")
        self._write(_entry("reserve", attempt) | witness)

    def mark_sent(self, attempt: Attempt) -> None:
        """Spend a reservation for good; durable on return. Send only afterwards.

        A second call for the same attempt changes nothing, so that spooled bytes can go out again.

        Raises:
            LedgerError: The attempt holds no reservation.
        """
        if attempt.order not in self._known(attempt.run).sent:
            failpoints.hit("ledger.sent")
            self._write(_entry("sent", attempt))

    def release(self, run: str) -> None:
        """Give back the unsent reservations of a run; it may reserve again.

        Raises:
            LedgerError: Unknown run.
        """
        if self._known(run).open:
            self._write({"kind": "release", "run": run})

    def close_run(self, run: str) -> None:
        """End a run: what it has not spent is free for others, and it can never go on.

        Raises:
            LedgerError: Unknown run.
        """
        if not self._known(run).closed:
            self._write({"kind": "close", "run": run})

    def _write(self, entry: dict[str, Any]) -> None:
        after = self._after(entry)  # raises before anything is written
        self._chain.append(entry)
        self._runs[entry["run"]] = after
        failpoints.hit("ledger.written")


def read_books(path: Path, public_key: bytes, *, epsilon: float, delta: float) -> Books:
    """Read a ledger that its site may hold at this moment; writes nothing.

    Args:
        path: The ledger's file.
        public_key: The site's public key, which every line must be signed with.
        epsilon: Lifetime cap.
        delta: Lifetime delta.

    Raises:
        LedgerError: The file cannot be read, or a line (named by its number) is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    lines = read_lines(data, public_key, purpose=LEDGER, path=path)
    return Books([entry for entry, _ in lines], epsilon=epsilon, delta=delta)


def _entry(kind: str, attempt: Attempt) -> dict[str, Any]:
    round_, session, number = attempt.order
    return {
        "kind": kind, "run": attempt.run, "round": round_, "session": session, "attempt": number,
    }  # fmt: skip
