"""Schedules from seeds: whatever goes wrong, nothing is lost, counted twice, untold or leaked."""

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.client.memory import SiteMemory
from fedward.simulations.faults.laboratory import run_schedule, run_seed
from fedward.simulations.faults.schedule import COORDINATOR, Fault, Kind, random_schedule


@pytest.mark.parametrize("seed", range(40))
def test_the_invariants_hold(seed):
    outcome = run_seed(seed)
    assert not outcome.violations, outcome.transcript()


def test_without_faults_nothing_happens():
    outcome = run_schedule(())
    assert not outcome.violations
    words = [words for _, words in outcome.history.lines]
    assert [w for w in words if "committed" in w] == [
        f"round {number}, attempt 1: committed with sites [0, 1, 2, 3]" for number in (1, 2)
    ]
    assert not [w for w in words if "fault" in w or "left out" in w or "aborted" in w]


def test_the_same_seed_gives_the_same_transcript():
    assert run_seed(3).transcript() == run_seed(3).transcript()
    assert random_schedule(3) == random_schedule(3) != random_schedule(4)


def test_the_command_prints_the_transcript_and_fails_where_an_invariant_does(monkeypatch):
    done = CliRunner().invoke(app, ["simulate", "--faults", "3"])
    assert (done.exit_code, done.stdout) == (0, f"{run_seed(3).transcript()}\n")
    monkeypatch.setattr(SiteMemory, "mark_spent", lambda *_: None)
    done = CliRunner().invoke(app, ["simulate", "--faults", "3"])
    assert done.exit_code == 1
    assert "VIOLATED" in done.stdout


def test_a_killed_coordinator_goes_on_where_it_was():
    fault = Fault(kind=Kind.KILL, party=COORDINATOR, point="round.kept")
    outcome = run_schedule((fault,))
    assert outcome.history.fired == ["round.kept"]
    assert not outcome.violations, outcome.transcript()
