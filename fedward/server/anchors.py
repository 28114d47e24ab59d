"""What the coordinator has seen of every site's ledger, and what it refuses because of it.

A site's disk can be restored from a copy, ledger and all; the coordinator is the witness outside.
It keeps the newest line that a site named, in the very event that the line came with, and sends a
receipt for it in each letter. A site that no longer has the line is left out.
"""

from collections.abc import Sequence

from fedward.canonical import Json
from fedward.errors import LedgerRolledBack
from fedward.identity import Identity, Roster
from fedward.messages import Letter, Line, Receipt, countersign
from fedward.server.store import RunStore


class Anchors:
    """The newest known line of each site's ledger, over all runs of one store.

    Args:
        identity: The coordinator's key.
        roster: The member sites; a line belongs to a site's public key, not to its number.
        store: Where the lines were recorded.
    """

    def __init__(self, identity: Identity, roster: Roster, store: RunStore) -> None:
        self._identity, self._roster = identity, roster
        self._lines: dict[bytes, Line] = store.ledger_lines()
        self._receipts: dict[bytes, Receipt] = {}

    def receipt(self, site: int) -> Receipt | None:
        """The receipt for the newest known line of a site; None if there is none."""
        key = self._roster.key(site)
        if key not in self._lines:
            return None
        if key not in self._receipts:
            self._receipts[key] = countersign(self._identity, key, self._lines[key])
        return self._receipts[key]

    def check(self, site: int, lines: Sequence[Line]) -> None:
        """Check the lines that a site's answer names.

        Raises:
            LedgerRolledBack: They lack the newest known line, or it has another hash there.
        """
        if not lines:
            raise LedgerRolledBack("its answer names no line of its ledger")
        known = self._lines.get(self._roster.key(site))
        if known is not None and known not in lines:
            raise LedgerRolledBack(
                f"its ledger ends at line {lines[-1][0]} and lacks line {known[0]} as it was "
                "acknowledged: its disk was rolled back, or it uses another ledger"
            )

    def learn(self, letter: Letter) -> Json:
        """Take the newest line of a checked answer; returns the facts of the event to record."""
        key, line = self._roster.key(letter.site), letter.lines[-1]
        if self._lines.get(key) != line:
            self._lines[key] = line
            self._receipts.pop(key, None)
        return {"ledger": [key.hex(), *line]}
