"""Schedules from seeds: whatever goes wrong, nothing is lost, counted twice, untold or leaked."""

import dataclasses

import pytest
from typer.testing import CliRunner

from fedward.cli import app
from fedward.client.memory import SiteMemory
from fedward.plan_aggregation import Aggregation
from fedward.server.summed import Summed
from fedward.simulations.faults.ground import PLAN
from fedward.simulations.faults.laboratory import run_schedule, run_seed
from fedward.simulations.faults.schedule import COORDINATOR, Fault, Kind, random_schedule

FEW = dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, participants=3))
TWICE = dataclasses.replace(PLAN, aggregation=Aggregation(scheme="sketch"))
SLOW = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 100)]


@pytest.mark.parametrize("seed", range(40))
def test_the_invariants_hold(seed):
    outcome = run_seed(seed)
    assert not outcome.violations, outcome.transcript()


@pytest.mark.parametrize("plan", [FEW, TWICE], ids=["participants", "sketch"])
@pytest.mark.parametrize("seed", [0, 1, *SLOW])
def test_the_invariants_hold_for_other_plans(seed, plan):
    outcome = run_seed(seed, plan)
    assert not outcome.violations, outcome.transcript()


@pytest.mark.parametrize(
    ("plan", "cohort", "session"), [(FEW, 3, 1), (TWICE, 4, 2)], ids=["participants", "sketch"]
)
def test_other_plans_are_run_as_they_say(plan, cohort, session):
    outcome = run_schedule((), plan=plan)
    assert not outcome.violations, outcome.transcript()
    assert [(attempt, len(sites)) for attempt, sites in outcome.rounds] == [(1, cohort)] * 2
    assert {order[1] for order in outcome.history.task_hashes} == set(range(1, session + 1))
    assert sum(map(len, outcome.spent)) == 2 * cohort


def test_a_draw_that_nobody_keeps_to_is_found(monkeypatch):
    """Negative control: neither the coordinator nor the sites look at who is asked."""
    monkeypatch.setattr(
        "fedward.server.rounds.RoundEngine._todo",
        lambda self, *_: (sorted(self._nodes), frozenset()),
    )
    outcome = run_schedule((), plan=FEW)
    assert not outcome.violations, "the sites refuse"
    assert [len(sites) for _, sites in outcome.rounds] == [3, 3]
    monkeypatch.setattr("fedward.client.agent.group_of", lambda *_: ())
    found = run_schedule((), plan=FEW).violations
    assert {violation.invariant for violation in found} == {"I1"}
    assert all("which does not ask it" in violation.words for violation in found)


@pytest.mark.parametrize("name", ["basis", "sum"])
def test_a_second_pass_that_says_something_else_is_found(monkeypatch, name):
    """Negative control: what is published of the second pass is off by one bit."""
    facts = Summed.facts

    def wrong(self, put_blob):
        found = dict(facts(self, put_blob))
        data = self.basis if name == "basis" else self.results[-1].words
        return {**found, name: put_blob(bytes([data.tobytes()[0] ^ 1]) + data.tobytes()[1:])}

    monkeypatch.setattr(Summed, "facts", wrong)
    monkeypatch.setattr(
        "fedward.client.last_round.LastRound._recompute",
        lambda _, letter, *__: letter.part("adapter"),
    )
    found = run_schedule((), plan=TWICE).violations
    assert {violation.invariant for violation in found} == {"I3"}
    assert all(f"its {name} is not that" in violation.words for violation in found)


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
