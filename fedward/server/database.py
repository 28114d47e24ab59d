"""How the coordinator opens its SQLite files: durable commits, and one writer at a time."""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError

from fedward.errors import ConfigurationError

_LOG = logging.getLogger(__name__)

_BUSY_WAITS = (0.2, 0.5, 1.0, 2.0)
_PAGE, _LOG_BYTES = 1 << 16, 1 << 28

T = TypeVar("T")


FORMAT = 1
"""Of the tables that this version writes, as ``user_version`` in each file; 0 came before it."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a database, made if it is missing; a writer waits up to 30 seconds for another.

    What is committed survives a power loss. Statements outside :func:`transaction` commit one by
    one.

    Raises:
        ConfigurationError: It is no database, or one of another format; nothing was changed.
    """
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    try:
        _check_format(db, path)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
    except (sqlite3.Error, ConfigurationError):
        db.close()
        raise
    return db


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    try:
        (found,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # of the disk, and may be over soon
            raise
        raise ConfigurationError(f"{path}: {error}; bring back its newest copy") from error
    if found not in {0, FORMAT}:
        raise ConfigurationError(
            f"{path}: has format {found}, and this version of Fedward reads format {FORMAT}: use "
            "the version that wrote it, or bring back a copy from before the change"
        )
    if found == 0:
        db.execute(f"PRAGMA user_version={FORMAT}")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit all statements within, or, if anything is raised, none."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def expect_large_pieces() -> None:
    """Suit the databases of SQLAlchemy, which is Flower, to adapters that stay for seconds.

    By default SQLite cuts a piece of an adapter (5 MB) into 1,280 pages, each a call of the system,
    copies its log into the file at each piece, and many systems build it so that it writes zeros
    over each deleted one. Nothing in there is secret from who runs the coordinator: masked updates,
    sums, adapters.
    """
    if not event.contains(Engine, "connect", _expect_large_pieces):
        event.listen(Engine, "connect", _expect_large_pieces)


def _expect_large_pieces(db: sqlite3.Connection, _: object) -> None:
    db.execute(f"PRAGMA page_size={_PAGE}")  # of a new file; an old one keeps its own
    (page,) = db.execute("PRAGMA page_size").fetchone()
    db.execute(f"PRAGMA wal_autocheckpoint={_LOG_BYTES // page}")
    db.execute("PRAGMA secure_delete=OFF")


def retry_busy(action: Callable[[], T]) -> T:
    """Do something with Flower's database that another process may be writing to."""
    for wait in _BUSY_WAITS:
        try:
            return action()
        except OperationalError as error:
            _LOG.info("Flower's database is busy: %s", type(error.orig).__name__)
            time.sleep(wait)
    return action()
