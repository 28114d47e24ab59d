"""A disk that was restored from a copy is noticed, by the site and by the coordinator alone."""

import shutil
from collections.abc import Mapping

import pytest

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.agent import Agent
from fedward.errors import CohortTooSmall, LedgerRolledBack
from fedward.messages import Letter
from fedward.server.anchors import Anchors
from fedward.server.store import Phase
from tests.client.desk import RUN
from tests.server.test_rounds import Rig

VICTIM = 1


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.close()


class Restoring:
    """Keeps a copy of a site's folder after round 1 and puts it back after round 2."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.site = rig, rig.desk.folder / str(VICTIM)
        self.copy = rig.folder / "backup"

    def __call__(self, attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase is Phase.COMMITTED and attempt.round == 1:
            shutil.copytree(self.site, self.copy)
        elif phase is Phase.COMMITTED and attempt.round == 2:
            self.restore()

    def restore(self) -> None:
        # Without its last task it would refuse for want of an adapter, checks or no checks.
        shutil.copytree(self.site / "tasks", self.copy / "tasks", dirs_exist_ok=True)
        shutil.rmtree(self.site)
        shutil.copytree(self.copy, self.site)
        node = self.rig.nodes[VICTIM]
        self.rig.grid.kill(node)
        self.rig.desk.restart(VICTIM)
        self.rig.grid.revive(node)


def unchecked(monkeypatch: pytest.MonkeyPatch, *, site: bool, coordinator: bool) -> None:
    """Take the checks of one side away."""
    if site:
        monkeypatch.setattr(Agent, "_check_receipt", lambda self, letter: None)
    if coordinator:
        monkeypatch.setattr(Anchors, "check", lambda self, site, lines: None)


def left_out(rig: Rig) -> list[tuple[int, str]]:
    return [(site, facts["reason"]) for site, facts in rig.facts(Phase.LEFT_OUT)]


def test_a_restored_site_refuses_and_the_round_goes_on_without_it(rig, caplog):
    rig.run(observer=Restoring(rig))
    assert rig.cohorts == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    assert left_out(rig) == [(VICTIM, "refused-ledger")]
    assert "line 4 is missing: 5 lines were once acknowledged and 3 are there" in caplog.text


def test_the_coordinator_notices_a_restored_site_that_does_not(rig, monkeypatch):
    unchecked(monkeypatch, site=True, coordinator=False)
    rig.run(observer=Restoring(rig))
    assert rig.cohorts[2] == [0, 2, 3]
    [(site, reason)] = left_out(rig)
    assert site == VICTIM
    # It has reserved once more, so that its ledger ends one line before the one acknowledged.
    assert "ends at line 4 and lacks line 5 as it was acknowledged" in reason


def test_without_both_checks_a_restored_ledger_forgets_what_was_sent(rig, monkeypatch):
    """Negative control: three updates of the site are in the sums, its ledger has two."""
    unchecked(monkeypatch, site=True, coordinator=True)
    rig.run(observer=Restoring(rig))
    assert [cohort.count(VICTIM) for cohort in rig.cohorts] == [1, 1, 1]
    assert rig.desk.ledger(VICTIM).spent(RUN) == 2


def test_a_restored_ledger_that_was_written_on_is_another_one(rig):
    """It has as many lines as the coordinator has seen, but others."""
    restoring = Restoring(rig)

    def observe(attempt, phase, site, facts):
        restoring(attempt, phase, site, facts)
        if phase is Phase.COMMITTED and attempt.round == 2:
            ledger = rig.desk.ledger(VICTIM)
            for number in (2, 3):
                ledger.reserve(Attempt(run=RUN, round=number))
            assert ledger.head[0] == 5

    rig.run(observer=observe)
    assert rig.cohorts[2] == [0, 2, 3]
    assert left_out(rig) == [(VICTIM, "refused-ledger")]


def test_an_undisturbed_run_leaves_nobody_out(rig):
    rig.run()
    assert left_out(rig) == []
    for site, key in enumerate(rig.desk.keys):
        assert rig.store.ledger_lines()[key.public_key] == rig.desk.ledger(site).head
    assert {ledger.head[0] for ledger, _ in rig.desk.files.values()} == {7}


def test_what_was_seen_in_one_run_holds_in_the_next(rig):
    """The coordinator's process is another one as well; the store is all that it remembers."""
    rig.run(observer=Restoring(rig))  # left as it was restored
    with pytest.raises(CohortTooSmall) as caught:
        rig.run(run="another")
    assert "site 1: refused-ledger" in str(caught.value)
    assert "site 0: refused-budget" in str(caught.value), "control: the others have no more budget"


def test_a_ledger_lost_altogether_is_refused(rig):
    def observe(attempt, phase, site, facts):
        if phase is Phase.COMMITTED and attempt.round == 2:
            shutil.rmtree(rig.desk.folder / str(VICTIM))
            rig.grid.kill(rig.nodes[VICTIM])
            rig.desk.restart(VICTIM)
            rig.grid.revive(rig.nodes[VICTIM])

    rig.run(observer=observe)
    assert left_out(rig) == [(VICTIM, "refused-ledger")]


def answer(rig: Rig, lines: Mapping[int, str]) -> Letter:
    return Letter(
        action="task",
        attempt=Attempt(run=RUN, round=1),
        site=VICTIM,
        lines=tuple(sorted(lines.items())),
    )


def test_a_coordinator_refuses_lines_that_are_not_those_it_knows(rig):
    anchors = Anchors(rig.desk.identity, rig.desk.roster, rig.store)
    assert anchors.receipt(VICTIM) is None
    anchors.learn(answer(rig, {4: "aa"}))
    receipt = anchors.receipt(VICTIM)
    assert receipt is not None
    receipt.check(rig.desk.identity.public_key, rig.desk.keys[VICTIM].public_key, "aa")
    for lines in ({4: "aa"}, {4: "aa", 9: "bb"}):
        anchors.check(VICTIM, answer(rig, lines).lines)
    for lines in ({}, {3: "aa"}, {4: "bb"}, {9: "bb"}, {4: "bb", 9: "bb"}, {3: "aa", 9: "aa"}):
        with pytest.raises(LedgerRolledBack):
            anchors.check(VICTIM, answer(rig, lines).lines)
    anchors.check(0, answer(rig, {1: "x"}).lines)  # control: another site's first


def test_an_older_coordinator_is_content_with_a_newer_ledger(rig):
    """The coordinator's own disk was restored: it asks for a line that the ledger still has."""
    anchors = Anchors(rig.desk.identity, rig.desk.roster, rig.store)
    rig.run()
    ledger = rig.desk.ledger(VICTIM)
    anchors.learn(answer(rig, {3: ledger.line(3)}))
    letter = Letter(
        action="task",
        attempt=Attempt(run="later", round=1),
        site=VICTIM,
        parts=rig.desk.task_parts(),
        receipt=anchors.receipt(VICTIM),
    )
    agent = rig.desk.agents[VICTIM]
    agent._check_receipt(letter)
    anchors.check(VICTIM, agent._lines(letter.receipt))
