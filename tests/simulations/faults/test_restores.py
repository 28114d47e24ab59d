"""A disk restored from a copy: no site forgets what it has spent, and somebody says so."""

import pytest

from fedward.client.agent import Agent
from fedward.server.anchors import Anchors
from fedward.simulations.faults.restores import RESTORES, Restore, try_restore

BY_NAME = {restore.name: restore for restore in RESTORES}
EXPECTED: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "a site's folder": ((3,), (4,), "refused-ledger"),
    "a site's ledger alone": ((3,), (4,), "does not start: LedgerRolledBack"),
    "a site's journal alone": ((3,), (4,), "does not start: LedgerRolledBack"),
    "a site's memory alone": ((3,), (4,), "protocol-aborted"),
    "the coordinator's folder, two rounds old": ((), (4, 4), "later round than this coordinator"),
    "the coordinator's folder, one round old": ((4,), (4, 4), "round 3, attempt 1: committed"),
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_an_older_copy(name):
    found = try_restore(BY_NAME[name])
    before, after, said = EXPECTED[name]
    assert (found.before, found.after) == (before, after), found.said
    assert any(said in words for words in found.said), found.said
    assert not found.violations


def test_every_restore_of_the_page_is_tried():
    assert set(EXPECTED) == set(BY_NAME)


def test_without_the_checks_a_restored_site_goes_on_with_a_ledger_that_forgot(monkeypatch):
    """Negative control: the newest copy never comes back."""
    restore = Restore(name="control", newest=False, sees="")
    assert try_restore(restore).after == (3,)
    monkeypatch.setattr(Agent, "_check_receipt", lambda self, letter: None)
    monkeypatch.setattr(Anchors, "check", lambda self, site, lines: None)
    found = try_restore(restore)
    assert found.after == (4,), "nobody noticed"
    assert "I1" in {violation.invariant for violation in found.violations}
