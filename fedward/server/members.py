"""Who is a member: invitations, enrolled sites and the roster that follows from them (SQLite).

Every change makes one more epoch; ids are never given out again, so that a session, a letter or a
fault of a former member can never be taken for a new one's. A site that left by itself may come
back, with a new token, as what it was: the same id and keys.
"""

import contextlib
import dataclasses
import hmac
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from fedward.enrolment import EnrolRequest, secret_hash
from fedward.errors import ConfigurationError, IdentityError
from fedward.identity import Member, Roster, check_site_name, seal_roster
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.database import connect, transaction

_SCHEMA = """
CREATE TABLE IF NOT EXISTS member (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL,
  public_key BLOB NOT NULL UNIQUE, fleet_key TEXT NOT NULL UNIQUE,
  revoked INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS invitation (
  secret_hash BLOB PRIMARY KEY, name TEXT NOT NULL, expires INTEGER NOT NULL,
  member INTEGER REFERENCES member (id)
) STRICT;
CREATE TABLE IF NOT EXISTS change (
  epoch INTEGER PRIMARY KEY, time INTEGER NOT NULL, what TEXT NOT NULL, member INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """One site that is or was a member.

    Args:
        id: Its roster id.
        name: Its name.
        public_key: Its Ed25519 key, 32 bytes.
        fleet_key: Its EC P-384 key, OpenSSH text: what Flower's node authentication asks for.
        revoked: Whether it is out.
        left: Whether it went by itself, and so may come back with its keys.
    """

    id: int
    name: str
    public_key: bytes
    fleet_key: str
    revoked: bool
    left: bool = False


class Members:
    """The open database of members.

    Args:
        folder: The coordinator's.
    """

    def __init__(self, folder: CoordinatorFolder) -> None:
        self._folder = folder
        os.close(os.open(folder.members, os.O_CREAT, 0o600))  # before SQLite does, with its mode
        self._db = connect(folder.members)
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def invite(self, name: str, *, expires: int, now: int) -> str:
        """Make an invitation; an older, unused one of the same site is void.

        Args:
            name: The site's.
            expires: Unix seconds.
            now: Unix seconds.

        Returns:
            The secret of the token, 32 random bytes in hex; only its hash is stored.

        Raises:
            ConfigurationError: No site can have this name, the site is a member, or the time is
                over already.
        """
        check_site_name(name)
        if expires <= now:
            raise ConfigurationError("an invitation must hold for some time; give more hours")
        secret = os.urandom(32).hex()
        with transaction(self._db):
            if self._active(name) is not None:
                raise ConfigurationError(
                    f"site {name!r} is a member already; revoke it first if it has new keys"
                )
            self._db.execute("DELETE FROM invitation WHERE name=? AND member IS NULL", (name,))
            self._db.execute(
                "INSERT INTO invitation (secret_hash, name, expires) VALUES (?, ?, ?)",
                (secret_hash(secret), name, expires),
            )
        return secret

    def enrol(self, request: EnrolRequest, now: int) -> Enrolled:
        """Admit a site that shows a valid secret; the very same request again changes nothing.

        Args:
            request: Its signatures are checked.
            now: Unix seconds.

        Raises:
            IdentityError: No such invitation, it is over or used by other keys, or the keys are
                another's.
        """
        with transaction(self._db):
            hashed, used_by, expires = self._invitation(request)
            if used_by is not None:
                found = next(member for member in self.all() if member.id == used_by)
                same = (found.public_key.hex(), found.fleet_key, found.revoked) == (
                    request.public_key, request.fleet_key, False
                )  # fmt: skip
                if not same:
                    raise IdentityError("this token was used already: ask for another")
                return found
            if expires <= now:
                raise IdentityError("this token is over: ask for another")
            if self._active(request.site) is not None:
                raise IdentityError(f"site {request.site!r} is a member already")
            return self._admit(request, hashed, now)

    def revoke(self, name: str, now: int) -> None:
        """Put a site out; its id and keys are never accepted again.

        Raises:
            ConfigurationError: No such member.
        """
        with transaction(self._db):
            found = self._active(name)
            if found is None:
                members = ", ".join(m.name for m in self.all() if not m.revoked) or "none"
                raise ConfigurationError(f"site {name!r} is not a member; members: {members}")
            self._db.execute("UPDATE member SET revoked=1 WHERE id=?", (found.id,))
            self._change("revoked", found.id, now)

    def leave(self, key: bytes, now: int) -> Enrolled:
        """Let out the site that asks for it; asked again, nothing changes.

        Args:
            key: The Ed25519 key that signed the request.
            now: Unix seconds.

        Raises:
            IdentityError: The key of no member.
        """
        with transaction(self._db):
            found = next((member for member in self.all() if member.public_key == key), None)
            if found is None:
                raise IdentityError("the key of no member")
            if not found.revoked:
                self._db.execute("UPDATE member SET revoked=1 WHERE id=?", (found.id,))
                self._change("left", found.id, now)
        return found

    def all(self) -> list[Enrolled]:
        """Every site that is or was a member, by id."""
        rows = self._db.execute(
            "SELECT id, name, public_key, fleet_key, revoked, (SELECT what FROM change "
            "WHERE member=id ORDER BY epoch DESC LIMIT 1) FROM member ORDER BY id"
        )
        return [
            Enrolled(
                id=i,
                name=name,
                public_key=key,
                fleet_key=fleet,
                revoked=bool(revoked),
                left=what == "left",
            )
            for i, name, key, fleet, revoked, what in rows
        ]

    def waiting(self, now: int) -> list[tuple[str, int]]:
        """Name and end (Unix seconds) of every invitation that may still be used."""
        return self._db.execute(
            "SELECT name, expires FROM invitation WHERE member IS NULL AND expires > ? "
            "ORDER BY name",
            (now,),
        ).fetchall()

    def roster(self) -> Roster:
        """The current roster; epoch 0 while nobody has enrolled."""
        (epoch,) = self._db.execute("SELECT coalesce(max(epoch), 0) FROM change").fetchone()
        return Roster(
            epoch=epoch,
            coordinator=self._folder.identity().public_key,
            members=tuple(
                Member(id=m.id, name=m.name, public_key=m.public_key)
                for m in self.all()
                if not m.revoked
            ),
        )

    def sealed_roster(self) -> bytes:
        """The current roster with the coordinator's signature."""
        return seal_roster(self.roster(), self._folder.identity())

    def _invitation(self, request: EnrolRequest) -> tuple[bytes, int | None, int]:
        """Hash, user and end of the invitation that a request's secret opens."""
        hashed = secret_hash(request.secret)
        rows = self._db.execute(
            "SELECT secret_hash, member, expires FROM invitation WHERE name=?", (request.site,)
        ).fetchall()
        for stored, member, expires in rows:
            if hmac.compare_digest(stored, hashed):
                return hashed, member, expires
        raise IdentityError("no invitation for this site and token")

    def _admit(self, request: EnrolRequest, hashed: bytes, now: int) -> Enrolled:
        key = bytes.fromhex(request.public_key)
        if key == self._folder.identity().public_key:
            raise IdentityError("a site needs a key of its own")
        keys = (request.site, key, request.fleet_key)
        for member in self.all():
            if member.left and (member.name, member.public_key, member.fleet_key) == keys:
                return self._enrolled(member, hashed, now)
        (site,) = self._db.execute("SELECT coalesce(max(id) + 1, 0) FROM member").fetchone()
        try:
            self._db.execute(
                "INSERT INTO member (id, name, public_key, fleet_key) VALUES (?, ?, ?, ?)",
                (site, *keys),
            )
        except sqlite3.IntegrityError as error:
            raise IdentityError("these keys are or were another member's: make new ones") from error
        made = Enrolled(
            id=site, name=request.site, public_key=key, fleet_key=request.fleet_key, revoked=False
        )
        return self._enrolled(made, hashed, now)

    def _enrolled(self, member: Enrolled, hashed: bytes, now: int) -> Enrolled:
        """Record that an invitation made this site a member."""
        self._db.execute("UPDATE member SET revoked=0 WHERE id=?", (member.id,))
        self._db.execute("UPDATE invitation SET member=? WHERE secret_hash=?", (member.id, hashed))
        self._change("enrolled", member.id, now)
        return dataclasses.replace(member, revoked=False, left=False)

    def _active(self, name: str) -> Enrolled | None:
        return next((m for m in self.all() if m.name == name and not m.revoked), None)

    def _change(self, what: str, member: int, now: int) -> None:
        self._db.execute(
            "INSERT INTO change (epoch, time, what, member) "
            "SELECT coalesce(max(epoch), 0) + 1, ?, ?, ? FROM change",
            (now, what, member),
        )


@contextlib.contextmanager
def open_members(folder: CoordinatorFolder) -> Iterator[Members]:
    """The database of members, closed at the end."""
    members = Members(folder)
    try:
        yield members
    finally:
        members.close()
