"""What a site must not forget about sessions, on its own disk."""

from pathlib import Path
from typing import Self

from fedward.attempt import Attempt
from fedward.errors import LedgerError, LedgerRolledBack
from fedward.identity import Identity
from fedward.messages import Receipt
from fedward.privacy.chain import Chain
from fedward.privacy.ledger import Ledger


class SiteMemory:
    """The :class:`~fedward.aggregation.session_memory.SessionMemory` of a real site.

    That an input counts as sent is the ledger's to remember, so that privacy is spent there in the
    same instant; the rest is a chained file of its own. It keeps the coordinator's newest receipt
    for the ledger, so that a ledger restored alone is noticed without asking anybody.

    Args:
        chain: The file, held by this memory alone.
        ledger: The site's open ledger.

    Raises:
        LedgerRolledBack: The ledger lacks what this memory saw of it.
    """

    def __init__(self, chain: Chain, ledger: Ledger) -> None:
        self._chain, self._ledger = chain, ledger
        self._newest: dict[str, tuple[int, int, int]] = {}
        self._signed: dict[str, str] = {}
        self._acknowledged = 0
        if chain.entries and ledger.head[0] == 0:
            raise LedgerRolledBack(
                "this site remembers sessions, but its ledger is empty: restore the ledger"
            )
        for entry in chain.entries:
            if entry["kind"] == "begin":
                first, second, third = entry["order"]
                self._newest[entry["run"]] = (first, second, third)
            elif entry["kind"] == "signed":
                self._signed[entry["session"]] = entry["survivors"]
            elif entry["kind"] == "receipt":
                ledger.check_anchor(entry["seq"], entry["head"])
                self._acknowledged = entry["seq"]

    @classmethod
    def open(cls, path: Path, identity: Identity, ledger: Ledger) -> Self:
        """Open or make the memory at ``path``.

        Raises:
            LedgerError: See :class:`~fedward.privacy.chain.Chain` and this class.
        """
        chain = Chain(path, identity, purpose="fedward memory")
        try:
            return cls(chain, ledger)
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
        self._chain.append({"kind": "begin", "run": attempt.run, "order": attempt.order})
        self._newest[attempt.run] = attempt.order

    def mark_spent(self, attempt: Attempt) -> None:
        """Record in the ledger that the attempt's input counts as sent."""
        self._ledger.mark_sent(attempt)

    def signed(self, session: bytes) -> bytes | None:
        """The survivor set that this site signed in a session."""
        found = self._signed.get(session.hex())
        return None if found is None else bytes.fromhex(found)

    def remember_signed(self, session: bytes, survivors: bytes) -> None:
        """Record that the site signs this survivor set, and no other of the session ever."""
        self._chain.append(
            {"kind": "signed", "session": session.hex(), "survivors": survivors.hex()}
        )
        self._signed[session.hex()] = survivors.hex()

    def keep_receipt(self, receipt: Receipt) -> None:
        """Record a receipt that was checked, if it is for a newer line than the one kept."""
        if receipt.seq > self._acknowledged:
            head = self._ledger.line(receipt.seq)
            self._chain.append({"kind": "receipt", "head": head, **vars(receipt)})
            self._acknowledged = receipt.seq

    def remember_released(self, session: bytes) -> None:
        """Record that the site's shares of the session count as released."""
        self._chain.append({"kind": "released", "session": session.hex()})
