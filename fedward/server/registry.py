"""The registry: versions of models, each with a signed manifest of where it comes from.

::

    index.sqlite                        which versions there are
    key                                 signs the manifests
    bases/SHA256                        a whole model below adapters: a copy, or a link to it
    models/NAME/NUMBER/manifest.signed  signature and canonical JSON of a Version
    models/NAME/NUMBER/model/           its files

A version counts once it is in the index, and everything else is durable before that: a kill at any
instant leaves the registry without it or with it. What a kill leaves behind, the next one replaces.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fedward import failpoints, typed_toml
from fedward.canonical import canonical_json, digest
from fedward.errors import ConfigurationError, IdentityError, ModelError
from fedward.identity import Identity, open_sealed
from fedward.private_files import hold, make_private_folder, sync_folder, write_private
from fedward.server.database import connect, transaction
from fedward.server.registry_version import Origin, Parent, Version, check_files, digests

REGISTRY = "registry:"
"""What stands before NAME or NAME:NUMBER, in place of a model's path."""

DEFAULT = Path("out/registry")
"""Where ``registry:`` models are looked for, unless ``FEDWARD_REGISTRY`` says otherwise."""

MODEL, SIGNED = "model", "manifest.signed"

_PURPOSE = "fedward/1/model version"
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS version (seq INTEGER PRIMARY KEY, name TEXT NOT NULL, "
    "number INTEGER NOT NULL, made_from BLOB NOT NULL UNIQUE, manifest BLOB NOT NULL, "
    "UNIQUE (name, number)) STRICT"
)


class Registry:
    """One registry.

    Args:
        folder: Made if it is missing. In a coordinator's folder the coordinator's key signs; any
            other registry has a key of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        make_private_folder(self.folder)
        with self._index() as db:
            db.execute(_SCHEMA)

    @classmethod
    def there(cls, folder: Path) -> "Registry":
        """A registry that has been made.

        Raises:
            ConfigurationError: There is none.
        """
        if not (folder / "index.sqlite").exists():
            raise ConfigurationError(
                f"{folder}: no registry of models; simulate, train and run make one, --registry "
                "names another folder"
            )
        return cls(folder)

    def identity(self) -> Identity:
        """The key that signs here.

        Raises:
            IdentityError: It cannot be read.
        """
        if (self.folder.parent / "coordinator.toml").exists():
            return Identity.load(self.folder.parent / "key")
        return Identity.load_or_create(self.folder / "key")

    def add(self, origin: Origin, fill: Callable[[Path], None]) -> Version:
        """Put a version in; one of the very same origin changes nothing.

        Args:
            origin: What it is.
            fill: Writes its files into the empty folder that it is given. An adapter's manifest
                names its base below :data:`fedward.server.central.manifest.BASES`.

        Returns:
            The version, durable.

        Raises:
            ModelError: What was written is no plain file.
        """
        made_from = digest("origin", canonical_json(dataclasses.asdict(origin)))
        with hold(self.folder / "lock", None):
            with self._index() as db:
                query = "SELECT name, number FROM version WHERE made_from=?"
                row = db.execute(query, (made_from,)).fetchone()
                if row is not None:
                    return self.get(f"{row[0]}:{row[1]}")
                query = "SELECT coalesce(max(number), 0) + 1 FROM version WHERE name=?"
                (number,) = db.execute(query, (origin.name,)).fetchone()
            scratch = self._scratch()
            fill(scratch / MODEL)
            failpoints.hit("registry.filled")
            identity = self.identity()
            version = Version(
                **vars(origin),
                number=number,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                files=digests(scratch / MODEL),
                signer=identity.public_key.hex(),
            )
            sealed = identity.seal(_PURPOSE, canonical_json(dataclasses.asdict(version)))
            write_private(scratch / SIGNED, sealed)
            _sync(scratch)
            failpoints.hit("registry.signed")
            place = self._place(version.name, number)
            make_private_folder(place.parent)
            _move(scratch, place)
            sync_folder(place.parent.parent)
            failpoints.hit("registry.moved")
            with self._index() as db, transaction(db):
                db.execute(
                    "INSERT INTO version (name, number, made_from, manifest) VALUES (?, ?, ?, ?)",
                    (version.name, number, made_from, hashlib.sha256(sealed).digest()),
                )
                failpoints.hit("registry.indexed")
        return version

    def keep_base(self, folder: Path, sha256: str, *, copy: bool = False) -> None:
        """Remember where a base is, so that adapters over it find it.

        Args:
            folder: A whole model.
            sha256: Its digest, from :func:`fedward.tuning.models.fingerprint`.
            copy: Keep its files here; else a link to the folder.
        """
        with hold(self.folder / "lock", None):
            place = self.base(sha256)
            if place.is_dir() and (not place.is_symlink() or not copy):
                return
            scratch = self._scratch()
            if copy:
                shutil.copytree(folder, scratch / MODEL, dirs_exist_ok=True)
                _sync(scratch / MODEL)
            else:
                (scratch / MODEL).rmdir()
                (scratch / MODEL).symlink_to(folder.absolute())
            make_private_folder(place.parent)
            _move(scratch / MODEL, place)

    def base(self, sha256: str) -> Path:
        """Where a base is kept or linked; perhaps nothing is there."""
        return self.folder / "bases" / sha256

    def all(self) -> list[Version]:
        """Every version, oldest first, unchecked but for its signature.

        Raises:
            IdentityError, ModelError: See :meth:`get`.
        """
        with self._index() as db:
            rows = db.execute("SELECT name, number FROM version ORDER BY seq").fetchall()
        return [self.get(f"{name}:{number}") for name, number in rows]

    def get(self, text: str, *, keys: Collection[bytes] = ()) -> Version:
        """One version.

        Args:
            text: ``NAME`` (the newest) or ``NAME:NUMBER``.
            keys: Public keys that may have signed beside the registry's own.

        Raises:
            ConfigurationError: There is no such version.
            ModelError: Its manifest is missing, or is not the one that was put in.
            IdentityError: Its signature does not hold, or is by an unknown key.
        """
        name, number, recorded = self._find(text)
        path = self._place(name, number) / SIGNED
        try:
            sealed = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: the manifest is missing ({error.strerror})") from error
        version = self._open(sealed, path, keys)
        if (version.name, version.number) != (name, number):
            raise ModelError(f"{path}: is the manifest of {version.title}, not of {name}:{number}")
        if hashlib.sha256(sealed).digest() != recorded:
            raise ModelError(f"{path}: is not the manifest that was put in as {name}:{number}")
        return version

    def path(self, text: str) -> Path:
        """The folder with a version's files; its manifest's signature is checked, its files not."""
        version = self.get(text)
        return self._place(version.name, version.number) / MODEL

    def parent(self, text: str) -> Parent:
        """What a child's manifest says of a version."""
        version = self.get(text)
        sealed = (self._place(version.name, version.number) / SIGNED).read_bytes()
        return Parent(version=version.title, manifest=hashlib.sha256(sealed).hexdigest())

    def lineage(self, version: Version, *, keys: Collection[bytes] = ()) -> list[Version]:
        """The versions that one descends from, nearest first.

        Raises:
            ModelError: One is missing, or is not the one that the child's manifest names.
            IdentityError: One's signature does not hold.
        """
        found = list[Version]()
        for parent in version.parents:
            broken = f"the lineage of {version.title} is broken: its parent {parent.version}"
            try:
                before = self.get(parent.version, keys=keys)
                sealed = (self._place(before.name, before.number) / SIGNED).read_bytes()
            except (ConfigurationError, ModelError) as error:
                raise ModelError(f"{broken} cannot be found: {error}") from error
            if hashlib.sha256(sealed).hexdigest() != parent.manifest:
                raise ModelError(f"{broken} is not the one that it was made from")
            found += [before, *self.lineage(before, keys=keys)]
        return found

    def verify(self, text: str, *, keys: Collection[bytes] = ()) -> Version:
        """Check all that a version says: signature, every file, lineage, and its base if here.

        Raises:
            ConfigurationError: There is no such version.
            IdentityError: A signature does not hold, or is by an unknown key.
            ModelError: A file is changed, missing or was never signed; the base is another; the
                lineage is broken.
        """
        version = self.get(text, keys=keys)
        folder = self._place(version.name, version.number) / MODEL
        check_files(folder, version.files)
        self.lineage(version, keys=keys)
        base = self.base(version.base_sha256)
        if base.is_dir():
            from fedward.tuning.models import fingerprint  # imports torch

            if fingerprint(base) != version.base_sha256:
                raise ModelError(f"{base}: the base of {version.title} has changed")
        return version

    def _open(self, sealed: bytes, path: Path, keys: Collection[bytes]) -> Version:
        """Read a manifest that one of the known keys has signed."""
        for key in (own := self.identity().public_key, *keys):
            with contextlib.suppress(IdentityError):
                body = open_sealed(key, _PURPOSE, sealed)
                return typed_toml.parse_json(Version, body)
        claimed = re.search(rb'"signer":"([0-9a-f]{64})"', sealed)
        signer = b"" if claimed is None else bytes.fromhex(claimed[1].decode())
        if claimed is not None and signer not in {own, *keys}:
            raise IdentityError(
                f"{path}: is signed by an unknown key, {signer.hex()}; if you trust whose it is, "
                "name it with --key"
            )
        raise IdentityError(f"{path}: the signature does not hold: the manifest was changed")

    def _find(self, text: str) -> tuple[str, int, bytes]:
        name, _, number = text.removeprefix(REGISTRY).partition(":")
        with self._index() as db:
            rows = db.execute(
                "SELECT number, manifest FROM version WHERE name=? ORDER BY number", (name,)
            ).fetchall()
            names = db.execute("SELECT DISTINCT name FROM version ORDER BY name").fetchall()
        for found, manifest in reversed(rows):
            if number in ("", str(found)):
                return name, found, manifest
        known = (
            f"versions of {name}: {', '.join(str(found) for found, _ in rows)}"
            if rows
            else f"models: {', '.join(known for (known,) in names) or 'none'}"
        )
        raise ConfigurationError(f"{self.folder} has no model {text!r}; {known}")

    def _place(self, name: str, number: int) -> Path:
        return self.folder / "models" / name / str(number)

    def _scratch(self) -> Path:
        """An empty folder with an empty ``model`` in it; whoever holds the lock has it alone."""
        scratch = self.folder / "adding"
        shutil.rmtree(scratch, ignore_errors=True)
        make_private_folder(scratch / MODEL)
        return scratch

    @contextlib.contextmanager
    def _index(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(connect(self.folder / "index.sqlite")) as db:
            yield db


def model_folder(reference: str) -> Path:
    """The folder that a command names: a path, or ``registry:NAME:NUMBER``.

    Raises:
        ConfigurationError: There is no such version, or no registry.
    """
    if not reference.startswith(REGISTRY):
        return Path(reference).expanduser()
    return Registry.there(Path(os.environ.get("FEDWARD_REGISTRY", DEFAULT))).path(reference)


def _sync(folder: Path) -> None:
    """Make a folder durable with all that is in it."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(scratch: Path, place: Path) -> None:
    """Put a folder or link where, at most, something is that nobody knows of."""
    if place.is_symlink():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)
    scratch.rename(place)
    sync_folder(place.parent)
