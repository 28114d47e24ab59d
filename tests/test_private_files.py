"""What holds keys is for its owner only, and is there whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from fedward.errors import ConfigurationError
from fedward.private_files import (
    check_private,
    make_private_folder,
    remove_durably,
    write_private,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folder_and_file_are_their_owners_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_private_folder(tmp_path / "a" / "b")
        write_private(tmp_path / "a" / "b" / "file", b"secret")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a" / "b") == 0o700
    assert mode(tmp_path / "a" / "b" / "file") == 0o600
    check_private(tmp_path / "a" / "b")
    check_private(tmp_path / "a" / "b" / "file")


def test_what_is_removed_stays_removed(tmp_path, monkeypatch):
    """The folder is synced after the name is gone, or a crash could bring it back."""
    path, synced = tmp_path / "file", list[bool]()
    write_private(path, b"x")
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(path.exists())

    monkeypatch.setattr(os, "fsync", fsync)
    remove_durably(path)
    assert synced == [False]
    with pytest.raises(FileNotFoundError):
        remove_durably(path)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    (tmp_path / "file.part").write_bytes(b"of a crash")
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_others_can_open_is_refused(tmp_path):
    path = tmp_path / "key"
    write_private(path, b"secret")
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match=r"mode 0640.*chmod 0600"):
        check_private(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        check_private(tmp_path / "none")
