"""Files and folders that only their owner can read, written whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedward import failpoints
from fedward.errors import ConfigurationError


def make_private_folder(path: Path) -> None:
    """Make a folder with mode 0700, its parents as the umask says; one that is there stays."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_private(path: Path, data: bytes) -> None:
    """Write a file with mode 0600 in place of any before it; durable on return.

    A crash at any instant leaves the old content or the new.
    """
    failpoints.hit("file.write")
    scratch = path.with_name(path.name + ".part")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        failpoints.hit("file.sync")
        os.fsync(file.fileno())
    failpoints.hit("file.rename")
    scratch.replace(path)
    failpoints.hit("file.renamed")
    sync_folder(path.parent)


FileState = tuple[int, int, int]
"""What of a file changes with its content: which one it is, its size, when it was changed."""


def file_state(path: Path) -> FileState:
    """The state of a file, for who would not read again what nobody touched."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def remove_durably(path: Path) -> None:
    """Remove a file; no crash brings it back after the return."""
    path.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_private(path: Path) -> None:
    """Refuse a folder or file that others on this machine can open.

    Raises:
        ConfigurationError: It is missing, or its mode gives group or others any right.
    """
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror})") from error
    if mode & 0o077:
        raise ConfigurationError(
            f"{path}: has mode {mode:04o}, so that others on this machine can open it; "
            f"chmod {mode & 0o700:04o} it"
        )


@contextlib.contextmanager
def hold(lock: Path, busy: str | None) -> Iterator[None]:
    """Hold a lock file for this process, while it lives at the longest.

    Args:
        lock: Made if it is missing; it stays.
        busy: What to say where another process holds it; None waits for that one.

    Raises:
        ConfigurationError: Another process holds it, or it cannot be made.
    """
    try:
        made = lock.open("w")
    except OSError as error:
        raise ConfigurationError(f"{lock}: cannot be written: {error.strerror}") from error
    with made as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except OSError as error:
            raise ConfigurationError(busy or f"{lock}: cannot be locked") from error
        yield
