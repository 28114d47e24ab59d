"""The coordinator's SQLite files: of this version's format, or refused as they are."""

import contextlib
import sqlite3

import pytest

from fedward.errors import ConfigurationError
from fedward.server.database import FORMAT, connect
from fedward.server.store import RunStore


def test_a_new_file_and_one_from_before_there_were_formats_get_the_format(tmp_path):
    sqlite3.connect(tmp_path / "old").close()
    for name in ("new", "old"):
        with contextlib.closing(connect(tmp_path / name)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (FORMAT,)
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        connect(tmp_path / name).close()


def test_a_file_of_another_format_is_refused_and_stays_as_it_is(tmp_path):
    RunStore(tmp_path).close()
    path = tmp_path / "runs.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={FORMAT + 1}")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=f"has format {FORMAT + 1}.* reads format"):
        RunStore(tmp_path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "runs.sqlite").write_bytes(b"not what SQLite writes" * 99)
    with pytest.raises(ConfigurationError, match="not a database; bring back its newest copy"):
        RunStore(tmp_path)
