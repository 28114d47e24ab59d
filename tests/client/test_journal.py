"""The audit log says what happened, and nobody can take a line back unseen."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedward.attempt import Attempt
from fedward.client.journal import (
    Journal,
    export_journal,
    journal_command,
    verify_export,
    verify_journal,
)
from fedward.client.site_folder import SiteConfig, SiteFolder
from fedward.errors import ConfigurationError, LedgerError, LedgerRolledBack
from fedward.identity import Identity
from fedward.privacy.accounting import SampledGaussian
from fedward.privacy.ledger import Ledger

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Site:
    """A site whose daemon has reserved three rounds, and where somebody gave a command."""

    def __init__(self, root: Path) -> None:
        self.folder = SiteFolder.create(root / "site", SiteConfig(name="a"))
        self.key = self.folder.identity().public_key
        self.now = NOW
        journal_command(self.folder, "approved", {"plan": "aa"})
        for number in (1, 2, 3):
            self.reserve(number)

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def reserve(self, number: int) -> None:
        identity = self.folder.identity()
        with Journal(self.folder.journal, identity, clock=self.tick) as journal:
            ledger = Ledger.open(self.folder.ledger, identity, epsilon=8.0, delta=1e-5)
            event = SampledGaussian(noise_multiplier=5.0, sampling_rate=0.1, steps=1)
            ledger.open_run("r", bytes(32), event, 9)
            journal.record("reserved", {"round": number})
            ledger.reserve(Attempt(run="r", round=number), journal=journal.head)
            ledger.close()

    def cut(self, path: Path, lines: int) -> None:
        """The file without its last lines: a chain that is whole in itself."""
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_both_files_are_read_in_the_order_of_time(site):
    found = verify_journal(site.folder, site.key)
    assert [entry["what"] for entry in found] == ["reserved"] * 3 + ["approved"]
    assert found[0] == {"time": "2026-05-01T12:00:01.000+00:00", "what": "reserved", "round": 1}


def test_reading_needs_no_lock_and_writes_nothing(site):
    with Journal(site.folder.journal, site.folder.identity()):
        before = site.folder.journal.read_bytes()
        assert len(verify_journal(site.folder, site.key)) == 4
        assert site.folder.journal.read_bytes() == before
        with pytest.raises(LedgerError, match="another process holds it"):
            Journal(site.folder.journal, site.folder.identity())


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_journal_that_was_cut_is_noticed_by_the_ledger(site, lines):
    site.cut(site.folder.journal, lines)
    with pytest.raises(LedgerRolledBack, match="has seen line"):
        verify_journal(site.folder, site.key)


def test_a_journal_that_was_cut_and_written_on_is_noticed_too(site):
    site.cut(site.folder.journal, 2)
    with Journal(site.folder.journal, site.folder.identity()) as journal:
        for _ in range(5):
            journal.record("nothing")
    with pytest.raises(LedgerRolledBack, match="line 2 is not the one"):
        verify_journal(site.folder, site.key)


def test_without_the_witness_a_cut_journal_passes(site):
    """Control: it is the ledger that notices, not the chain."""
    site.folder.ledger.unlink()
    site.cut(site.folder.journal, 2)
    assert len(verify_journal(site.folder, site.key)) == 2


@pytest.mark.parametrize("name", ["journal", "command_journal", "ledger"])
def test_a_changed_line_is_named(site, name):
    path = getattr(site.folder, name)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(LedgerError, match="line 1"):
        verify_journal(site.folder, site.key)


def test_lines_of_another_key_are_refused(site):
    with pytest.raises(LedgerError, match="not signed by this site's key"):
        verify_journal(site.folder, Identity().public_key)


def test_an_export_is_checked_with_the_public_key_alone(site, tmp_path):
    data = export_journal(site.folder)
    here = verify_journal(site.folder, site.key)
    shutil.rmtree(site.folder.root)
    (tmp_path / "scratch").mkdir()
    assert verify_export(data, site.key, tmp_path / "scratch") == here


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda body: {**body, "journal.jsonl": ""}, LedgerRolledBack),
        (lambda body: {**body, "journal.jsonl": body["journal.jsonl"].replace("1", "2", 1)},
         LedgerError),
        (lambda body: {"site": "a"}, ConfigurationError),
        (lambda body: [], ConfigurationError),
    ],
)  # fmt: skip
def test_a_spoilt_export_is_refused(site, tmp_path, spoil, error):
    body = spoil(json.loads(export_journal(site.folder)))
    with pytest.raises(error):
        verify_export(json.dumps(body).encode(), site.key, tmp_path)


def test_nothing_is_exported_that_does_not_hold(site):
    site.cut(site.folder.journal, 1)
    with pytest.raises(LedgerRolledBack):
        export_journal(site.folder)


def test_an_empty_journal_is_one(tmp_path):
    folder = SiteFolder.create(tmp_path / "site", SiteConfig(name="a"))
    assert verify_journal(folder, folder.identity().public_key) == []


def test_a_clock_that_went_back_changes_no_line(site):
    site.now -= timedelta(days=365)
    site.reserve(4)
    assert verify_journal(site.folder, site.key)[0]["round"] == 4
