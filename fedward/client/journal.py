"""The site's audit log: every decision, letter and refusal, hash-chained and signed line by line.

Two files, because two processes write: the daemon's, and the one of the commands that people give.
The daemon's head stands in every reservation of the ledger, and the coordinator countersigns the
ledger's head; so a journal that went back is noticed by the ledger, and a ledger that went back by
the coordinator. No entry holds anything of a record.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fedward import failpoints
from fedward.attempt import Attempt
from fedward.canonical import Json, canonical_json
from fedward.client.policy import Policy
from fedward.client.site_folder import SiteFolder
from fedward.errors import ConfigurationError, LedgerError, LedgerRolledBack, SiteCode
from fedward.identity import Identity
from fedward.plan import Plan
from fedward.privacy.chain import LEDGER, Chain, read_lines

if TYPE_CHECKING:
    from fedward.client.approval import Approval  # which writes here itself
    from fedward.messages import Letter  # which loads Flower; commands start without it

_PURPOSE = "fedward journal"

Line = tuple[int, str]
"""Number of a line from 1, and its hash in hex."""


def _now() -> datetime:
    return datetime.now().astimezone()


class Journal:
    """An open journal; one process at a time holds it.

    Args:
        path: The file; made if there is none.
        identity: The site's key.
        clock: Local time with a zone.

    Raises:
        LedgerError: See :class:`~fedward.privacy.chain.Chain`.
    """

    def __init__(
        self, path: Path, identity: Identity, *, clock: Callable[[], datetime] = _now
    ) -> None:
        self._chain, self._clock = Chain(path, identity, purpose=_PURPOSE), clock
        self._chain.forget()

    @property
    def head(self) -> Line:
        """Number and hash of the last line."""
        return self._chain.head

    def record(self, what: str, facts: Mapping[str, Json] | None = None) -> None:
        """Write one entry; durable on return.

        Args:
            what: What happened, in two or three words.
            facts: Whatever else is to be known of it; nothing of a record.

        Raises:
            LedgerError: It could not be written: what it was to record must not happen.
        """
        when = self._clock().isoformat(timespec="milliseconds")
        failpoints.hit("journal.record")
        self._chain.append({"time": when, "what": what, **(facts or {})})
        failpoints.hit("journal.recorded")

    def close(self) -> None:
        """Let the file go."""
        self._chain.close()

    def __enter__(self) -> Self:
        """Use as a context that closes the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()


def answer_facts(letter: "Letter", code: SiteCode, parts: Mapping[str, bytes]) -> dict[str, Json]:
    """What the journal says of one answer: what was asked, the code, and the sizes that left."""
    return {
        "action": letter.action,
        "run": letter.attempt.run,
        "order": list(letter.attempt.order),
        "asked": hashlib.sha256(letter.header()).hexdigest(),
        "code": code.value,
        "sent": {name: len(data) for name, data in parts.items()},
    }


def reservation_facts(
    plan: Plan, attempt: Attempt, policy: Policy, approval: "Approval | None"
) -> dict[str, Json]:
    """What the journal says before data is touched: which plan, at what price, by whose word."""
    return {
        "run": attempt.run,
        "order": list(attempt.order),
        "plan": plan.hash().hex(),
        "name": plan.name,
        "epsilon": plan.privacy.epsilon,
        "delta": plan.privacy.delta,
        "reservations": plan.rounds.count + plan.rounds.spare,
        "permit": policy.permit,
        "approved": None if approval is None else dataclasses.asdict(approval),
    }


def journal_command(folder: SiteFolder, what: str, facts: Mapping[str, Json]) -> None:
    """Record what somebody did with a command, before it takes effect.

    Raises:
        LedgerError: It cannot be written; the command must not go on.
    """
    with Journal(folder.command_journal, folder.identity()) as journal:
        journal.record(what, facts)


def verify_journal(folder: SiteFolder, public_key: bytes) -> list[dict[str, Any]]:
    """Check both files and that the daemon's holds every line that the ledger has witnessed.

    Writes nothing; the daemon may hold the files at this moment.

    Args:
        folder: The site's.
        public_key: The site's Ed25519 key, 32 bytes.

    Returns:
        The entries of both files, by time.

    Raises:
        LedgerError: A line (named by its number) is not what was once written.
        LedgerRolledBack: A line that the ledger has witnessed is missing or another.
    """
    # The ledger first: the daemon writes the journal before the ledger names its line.
    witnessed = [
        (entry["journal"][0], entry["journal"][1])
        for entry, _ in _lines(folder.ledger, public_key, LEDGER)
        if "journal" in entry
    ]
    own = _lines(folder.journal, public_key, _PURPOSE)
    check_witnessed([hashed for _, hashed in own], witnessed, folder.journal)
    commands = _lines(folder.command_journal, public_key, _PURPOSE)
    return sorted((entry for entry, _ in [*own, *commands]), key=_time)


def check_witnessed(hashes: list[str], witnessed: list[Line], path: Path) -> None:
    """Check that a chain with these hashes still has the lines that were named elsewhere.

    Raises:
        LedgerRolledBack: One is missing or another.
    """
    for number, hashed in witnessed:
        if number > len(hashes):
            raise LedgerRolledBack(
                f"{path}: the ledger has seen line {number}, and {len(hashes)} are there: lines "
                "were cut off, or the disk was rolled back; restore the newest copy"
            )
        if number and hashes[number - 1] != hashed:
            raise LedgerRolledBack(f"{path}: line {number} is not the one that the ledger has seen")


def export_journal(folder: SiteFolder) -> bytes:
    """Both files, the ledger and the site's key as one JSON object, for whoever audits the site.

    :func:`verify_export` checks it with nothing but the site's public key.

    Raises:
        LedgerError: See :func:`verify_journal`.
    """
    identity = folder.identity()
    verify_journal(folder, identity.public_key)
    files = (folder.ledger, folder.journal, folder.command_journal)
    body: dict[str, Json] = {
        "site": folder.config().name,
        "public_key": identity.public_key.hex(),
        "exported": _now().isoformat(timespec="seconds"),
        **{path.name: path.read_text() if path.exists() else "" for path in files},
    }
    return canonical_json(body) + b"\n"


def verify_export(data: bytes, public_key: bytes, scratch: Path) -> list[dict[str, Any]]:
    """Check what :func:`export_journal` wrote, against a key that came another way.

    Args:
        data: The exported bytes.
        public_key: The site's key as the roster or a telephone gave it.
        scratch: An empty folder of one's own.

    Returns:
        The entries, by time.

    Raises:
        ConfigurationError: It is no export.
        LedgerError: A line is not what the site once wrote.
    """
    folder = SiteFolder(root=scratch)
    try:
        body = json.loads(data)
        for path in (folder.ledger, folder.journal, folder.command_journal):
            path.write_text(body[path.name])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigurationError("not an exported journal of a site") from error
    return verify_journal(folder, public_key)


def _lines(path: Path, public_key: bytes, purpose: str) -> list[tuple[dict[str, Any], str]]:
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    return read_lines(data, public_key, purpose=purpose, path=path)


def _time(entry: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["time"])
