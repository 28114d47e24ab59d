"""An append-only file of signed, hash-chained JSON lines that survives crashes and full disks.

A line is canonical JSON of ``{entry, h, prev, salt, seq, sig}``: ``h`` is the SHA-256 of the line
without ``h`` and ``sig``, ``prev`` the ``h`` of the line before (64 zeros at first), and ``sig`` an
Ed25519 signature of ``h``. The salt is secret, so that a head, which leaves the site, tells nothing
about entries that somebody could guess.

Cutting whole lines off the end leaves a valid chain: whoever must notice a restored disk keeps a
head outside and asks :meth:`Chain.check_anchor`. A full disk refuses a line and loses none: what
was written of it is cut off again, and the chain goes on when there is space.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedward import failpoints
from fedward.canonical import Json, canonical_json
from fedward.errors import IdentityError, LedgerError, LedgerRolledBack
from fedward.identity import Identity, verify
from fedward.private_files import sync_folder

LEDGER = "fedward ledger"
"""Purpose of the lines of a ledger."""

_ZEROS = "0" * 64
_SALT_BYTES = 16
_FIELDS = {"entry", "h", "prev", "salt", "seq", "sig"}


class Chain:
    """The open file; one process at a time holds it.

    Args:
        path: Where it lies; made (mode 0600) if there is none, in a folder that exists.
        identity: Signs each line, and must have signed those that are there.
        purpose: What the signatures are for, an ASCII tag.

    Attributes:
        entries: Every entry so far, in order, until :meth:`forget`.

    Raises:
        LedgerError: Another process holds the file, it cannot be read or written, or a line (named
            by its number) is not what was once written. A last line without its newline was never
            acknowledged and is cut off.

    Guarantees:
        An entry whose :meth:`append` returned survives kill -9 and power loss at any later instant.
        An entry whose append failed is there whole or not at all; after a full disk not at all.
    """

    def __init__(self, path: Path, identity: Identity, *, purpose: str) -> None:
        self._path, self._identity, self._purpose = path, identity, purpose
        self.entries: list[dict[str, Any]] = []
        self._hashes: list[str] = []
        self._size = 0
        self._broken = self._forgets = False
        try:
            self._descriptor = self._open_file()
            self._close = weakref.finalize(self, os.close, self._descriptor)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self._read()
        except OSError as error:
            self.close()
            raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
        except LedgerError:
            self.close()
            raise

    @property
    def head(self) -> tuple[int, str]:
        """How many lines there are, and the hash of the last (64 zeros if there is none)."""
        return len(self._hashes), self._hashes[-1] if self._hashes else _ZEROS

    def append(self, entry: Mapping[str, Json]) -> None:
        """Add an entry; on return it is on the disk.

        Raises:
            LedgerError: It could not be written. After a full disk the chain is as it was before
                and can be asked again. If the disk fails (``fsync``), the chain refuses everything
                until it is opened again, because only reading tells what reached the disk.
        """
        if self._broken:
            raise LedgerError(f"{self._path}: a write failed or it was closed; open it again")
        seq, prev = self.head
        record: dict[str, Json] = {
            "entry": dict(entry),
            "prev": prev,
            "salt": os.urandom(_SALT_BYTES).hex(),
            "seq": seq,
        }
        own = hashlib.sha256(canonical_json(record)).digest()
        signature = self._identity.sign(self._purpose, own).hex()
        line = canonical_json(record | {"h": own.hex(), "sig": signature}) + b"\n"
        self._broken = True  # until it is known that all of it is there, or none
        self._write(line)
        if not self._forgets:
            self.entries.append(json.loads(line)["entry"])
        self._hashes.append(own.hex())
        self._size += len(line)
        failpoints.hit("chain.written")
        self._broken = False

    def forget(self) -> None:
        """Hold no entries in memory from now on, only hashes: the file has them."""
        self._forgets = True
        self.entries.clear()

    def check_anchor(self, seq: int, head: str) -> None:
        """Check that a head kept elsewhere still is part of this chain.

        Raises:
            LedgerRolledBack: The file is older than the anchor (a restored disk), or another one.
        """
        if self.line(seq) != head:
            raise LedgerRolledBack(
                f"{self._path}: line {seq} is not the line that was acknowledged: the disk was "
                "rolled back and written on, or this is another file; restore the newest copy"
            )

    def line(self, seq: int) -> str:
        """The hash of a line by its number from 1 (64 zeros for number 0).

        Raises:
            LedgerRolledBack: The chain has fewer lines.
        """
        here, _ = self.head
        if seq > here:
            raise LedgerRolledBack(
                f"{self._path}: line {here + 1} is missing: {seq} lines were once acknowledged and "
                f"{here} are there. The disk was rolled back; restore the newest copy"
            )
        return self._hashes[seq - 1] if seq > 0 else _ZEROS

    def close(self) -> None:
        """Let the file go; a second call does nothing."""
        self._broken = True
        self._close()

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

    def _open_file(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags)
        except FileNotFoundError:
            descriptor = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            sync_folder(self._path.parent)  # else a power loss may take the new file away
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LedgerError(f"{self._path}: another process holds it") from error
        return descriptor

    def _write(self, line: bytes) -> None:
        """Write all of a line and wait for the disk, or raise; a full disk leaves nothing of it."""
        try:
            failpoints.hit("chain.write")
            rest = memoryview(line)
            while rest:  # a write may be short without an error
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # else it stays broken
                os.ftruncate(self._descriptor, self._size)
                os.fsync(self._descriptor)
                self._broken = False
            raise self._unwritable(error) from error
        try:
            failpoints.hit("chain.sync")
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LedgerError:
        back = "mend it and open it again" if self._broken else "make room, and it goes on"
        return LedgerError(f"{self._path}: cannot be written: {error.strerror}; {back}")

    def _read(self) -> None:
        failpoints.hit("chain.open")
        data = self._path.read_bytes()
        lines = read_lines(data, self._identity.public_key, purpose=self._purpose, path=self._path)
        self.entries = [entry for entry, _ in lines]
        self._hashes = [own for _, own in lines]
        self._size = data.rfind(b"\n") + 1
        if self._size < len(data):
            failpoints.hit("chain.cut")
            os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)  # a killed process leaves lines that no sync has covered
        failpoints.hit("chain.opened")


def read_lines(
    data: bytes, public_key: bytes, *, purpose: str, path: Path
) -> list[tuple[dict[str, Any], str]]:
    """Check the lines of a chain that somebody else may hold; only the signer's public key counts.

    Args:
        data: The file's bytes; a last line without its newline was never acknowledged and is
            passed over.
        public_key: The signer's Ed25519 key, 32 bytes.
        purpose: See :class:`Chain`.
        path: Named in errors.

    Returns:
        Entry and hash of every line, in order.

    Raises:
        LedgerError: A line (named by its number) is not what was once written.
    """
    found = list[tuple[dict[str, Any], str]]()
    head = _ZEROS
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        record = _check_line(line, f"{path}: line {number}")
        if (record["seq"], record["prev"]) != (number - 1, head):
            raise LedgerError(
                f"{path}: line {number} does not follow the line before: lines are missing, moved "
                "or there twice"
            )
        head = record["h"]
        try:
            verify(public_key, purpose, bytes.fromhex(record["sig"]), bytes.fromhex(head))
        except (IdentityError, ValueError) as error:
            raise LedgerError(f"{path}: line {number} was not signed by this site's key") from error
        found.append((record["entry"], head))
    return found


def _check_line(line: bytes, where: str) -> dict[str, Any]:
    """Check that a line is in its form and that its hash is its own."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"{where} is not JSON") from error
    if not isinstance(record, dict) or set(record) != _FIELDS or canonical_json(record) != line:
        raise LedgerError(f"{where} is not in the form it was written in")
    bare = {key: record[key] for key in _FIELDS - {"h", "sig"}}
    if record["h"] != hashlib.sha256(canonical_json(bare)).hexdigest():
        raise LedgerError(f"{where} was changed: its hash is another")
    return record
