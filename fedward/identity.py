"""Ed25519 identities, the pinned roster and signed envelopes.

A signature always covers a purpose and its fields through :func:`fedward.canonical.digest`, so that
bytes signed for one purpose never verify for another. Verification raises; it never returns False.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedward.canonical import Json, canonical_json, digest
from fedward.errors import IdentityError, InvalidValue

_SIGNATURE_BYTES = 64
_KEY_BYTES = 32
_ROSTER = "fedward/1/roster"
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_NAME = 64


class Identity:
    """A long-lived Ed25519 key pair (RFC 8032).

    Args:
        seed: The 32 secret bytes; left out, a new key is drawn from the operating system.
    """

    def __init__(self, seed: bytes | None = None) -> None:
        seed = os.urandom(_KEY_BYTES) if seed is None else seed
        if len(seed) != _KEY_BYTES:
            raise IdentityError(f"an Ed25519 seed has {_KEY_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()

    def sign(self, purpose: str, *fields: bytes) -> bytes:
        """Sign the fields for one purpose; returns 64 bytes."""
        return self._key.sign(digest(purpose, *fields))

    def sign_raw(self, message: bytes) -> bytes:
        """Sign exactly these bytes, for a protocol that has its own domain separation."""
        return self._key.sign(message)

    def seal(self, purpose: str, body: bytes) -> bytes:
        """Return ``signature ‖ body``, which :func:`open_sealed` opens."""
        return self.sign(purpose, body) + body

    def save(self, path: Path) -> None:
        """Write the secret seed to a new file that only its owner can read.

        Raises:
            FileExistsError: A key is there already; it is never overwritten.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._key.private_bytes_raw())
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> "Identity":
        """Read a key that :meth:`save` wrote.

        Raises:
            IdentityError: There is no file, or it does not hold 32 bytes.
        """
        try:
            return cls(path.read_bytes())
        except (OSError, IdentityError) as error:
            raise IdentityError(f"{path}: cannot read the secret key: {error}") from error

    @classmethod
    def load_or_create(cls, path: Path) -> "Identity":
        """Read the key at ``path``, or make it on first use."""
        with suppress(FileExistsError):  # looking first would race with another process
            cls().save(path)
        return cls.load(path)


def verify_raw(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Check an Ed25519 signature over exactly these bytes.

    Raises:
        IdentityError: The signature or the key does not hold.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise IdentityError("signature does not verify under the pinned key") from error


def verify(public_key: bytes, purpose: str, signature: bytes, *fields: bytes) -> None:
    """Check a signature that :meth:`Identity.sign` made.

    Raises:
        IdentityError: Wrong key, purpose, field or signature.
    """
    verify_raw(public_key, signature, digest(purpose, *fields))


def open_sealed(public_key: bytes, purpose: str, sealed: bytes) -> bytes:
    """Return the body of ``signature ‖ body`` after checking it.

    Raises:
        IdentityError: Too short, or the signature does not hold.
    """
    signature, body = sealed[:_SIGNATURE_BYTES], sealed[_SIGNATURE_BYTES:]
    verify(public_key, purpose, signature, body)
    return body


@dataclass(frozen=True, kw_only=True)
class Member:
    """One site of the roster.

    Args:
        id: Site number, 0 to 2^32 - 1, unique in the roster.
        name: What people call it, 1 to 64 printable characters: no control character and none that
            turns the direction of text, because names stand in terminals, logs and reports.
        public_key: Its Ed25519 key, 32 bytes.
    """

    id: int
    name: str
    public_key: bytes

    def __post_init__(self) -> None:
        """Check every limit."""
        if not 0 <= self.id < 2**32:
            raise IdentityError(f"site id {self.id} is not in 0 .. 2^32 - 1")
        printable = self.name.isprintable() and self.name == self.name.strip()
        if not (printable and 1 <= len(self.name) <= _MOST_NAME):
            raise IdentityError(
                f"the name of site {self.id} must be 1 to {_MOST_NAME} printable characters, "
                f"not {self.name[:_MOST_NAME]!r}"
            )
        if len(self.public_key) != _KEY_BYTES:
            raise IdentityError(f"the key of site {self.name!r} must have {_KEY_BYTES} bytes")


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The member sites and the coordinator, as every site pins them.

    Args:
        epoch: Grows with every change, 0 to 2^64 - 1; a site refuses an older one.
        coordinator: The coordinator's Ed25519 key, 32 bytes.
        members: The sites, ordered by id; ids and names unique, and no key twice, the coordinator's
            included.
    """

    epoch: int
    coordinator: bytes
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        """Check every limit."""
        if not 0 <= self.epoch < 2**64:
            raise IdentityError(f"roster epoch {self.epoch} is not in 0 .. 2^64 - 1")
        if len(self.coordinator) != _KEY_BYTES:
            raise IdentityError(f"the coordinator's key must have {_KEY_BYTES} bytes")
        ids = [member.id for member in self.members]
        if ids != sorted(set(ids)):
            raise IdentityError("roster members must be ordered by id, each id once")
        if len({member.name for member in self.members}) != len(ids):
            raise IdentityError("two of the roster's members share a name")
        keys = {self.coordinator, *(member.public_key for member in self.members)}
        if len(keys) != 1 + len(ids):
            raise IdentityError("two of the roster's members and coordinator share a key")

    def hash(self) -> bytes:
        """The 32 bytes that every session binds."""
        entries: Iterable[bytes] = (
            digest(m.id.to_bytes(4, "big"), m.name.encode(), m.public_key) for m in self.members
        )
        return digest("roster", self.epoch.to_bytes(8, "big"), self.coordinator, *entries)

    def to_json(self) -> dict[str, Json]:
        """What :meth:`from_json` reads."""
        members: list[Json] = [[m.id, m.name, m.public_key.hex()] for m in self.members]
        return {"epoch": self.epoch, "coordinator": self.coordinator.hex(), "members": members}

    @classmethod
    def from_json(cls, facts: Any) -> Self:  # noqa: ANN401  # checked here
        """Read a roster.

        Raises:
            IdentityError: It is not one.
        """
        try:
            return cls(
                epoch=facts["epoch"],
                coordinator=bytes.fromhex(facts["coordinator"]),
                members=tuple(
                    Member(id=site, name=name, public_key=bytes.fromhex(key))
                    for site, name, key in facts["members"]
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IdentityError("this is not a roster") from error

    def member(self, site: int) -> Member:
        """The member with this id.

        Raises:
            IdentityError: No such site.
        """
        for member in self.members:
            if member.id == site:
                return member
        raise IdentityError(f"site {site} is not in the roster (epoch {self.epoch})")

    def key(self, site: int) -> bytes:
        """The Ed25519 key of a member."""
        return self.member(site).public_key


def check_site_name(name: str) -> None:
    """Refuse a name that a hospital's site cannot have: one for files, rosters and a telephone.

    Raises:
        InvalidValue: Not 1 to 64 of letters, digits, ``.``, ``_`` and ``-``.
    """
    if _SITE.fullmatch(name) is None:
        raise InvalidValue("name", name, "1 to 64 letters, digits, '.', '_' or '-'")


def fingerprint(public_key: bytes) -> str:
    """What two people read to each other on the telephone: 128 bits of a key's SHA-256.

    >>> fingerprint(bytes(32))
    '3144 eaf2 1c59 0efd 9679 9541 6b38 d8fb'
    """
    hexed = digest("fingerprint", public_key).hex()[:32]
    return " ".join(hexed[start : start + 4] for start in range(0, 32, 4))


def seal_roster(roster: Roster, identity: Identity) -> bytes:
    """The roster as bytes that the coordinator has signed; :func:`open_roster` reads them."""
    return identity.seal(_ROSTER, canonical_json(roster.to_json()))


def open_roster(sealed: bytes, coordinator: bytes) -> Roster:
    """Read a roster that this coordinator has signed, and that names it.

    Raises:
        IdentityError: The signature does not hold, what was signed is no roster of its own, or a
            site's name is not as :func:`check_site_name` has it.
    """
    body = open_sealed(coordinator, _ROSTER, sealed)
    try:
        roster = Roster.from_json(json.loads(body))
        for member in roster.members:
            check_site_name(member.name)
    except InvalidValue as error:
        raise IdentityError(f"the roster names a site that cannot be one: {error}") from error
    except (ValueError, RecursionError) as error:
        raise IdentityError("what the coordinator signed is not a roster") from error
    if roster.coordinator != coordinator:
        raise IdentityError("the roster names another coordinator than the one that signed it")
    return roster
