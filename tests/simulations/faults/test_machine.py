"""Hypothesis looks for a schedule that breaks an invariant, and shrinks it."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedward.failpoints import NAMES
from fedward.simulations.faults.checker import check
from fedward.simulations.faults.schedule import (
    AT_A_MESSAGE,
    COORDINATOR,
    SITES,
    STAGES,
    Fault,
    Kind,
)
from fedward.simulations.faults.world import World

AT_A_POINT = (Kind.KILL, Kind.POWER, Kind.DELAY, Kind.ERROR, Kind.FULL)
POINTS = {
    party: [name for name in NAMES if name.split(".")[0] in rooms]
    for party, rooms in {
        "site": {"agent", "session", "memory", "ledger", "journal", "chain", "file"},
        "trainer": {"trainer"},
        COORDINATOR: {"round", "store", "book", "file"},
    }.items()
}
SECONDS = st.sampled_from([0.5, 4.0, 15.0, 40.0])


class Laboratory(RuleBasedStateMachine):
    """Arms faults, lets the coordinator live for a while, and looks after each of its lives."""

    @initialize(seed=st.integers(0, 2**16))
    def open(self, seed):
        note(f"seed {seed}")
        self.folder = Path(tempfile.mkdtemp(prefix="fedward-"))
        self.world, self.ended = World(self.folder / "world", seed), False

    @rule(
        data=st.data(),
        party=st.sampled_from(list(POINTS)),
        site=st.integers(0, SITES - 1),
        kind=st.sampled_from(AT_A_POINT),
        visit=st.integers(1, 6),
        seconds=SECONDS,
    )
    def a_place_fails(self, data, party, site, kind, visit, seconds):
        who = party if party == COORDINATOR else f"{party}-{site}"
        point = data.draw(st.sampled_from(POINTS[party]))
        self.world.arm(Fault(kind=kind, party=who, point=point, visit=visit, seconds=seconds))

    @rule(
        kind=st.sampled_from(AT_A_MESSAGE),
        site=st.integers(0, SITES - 1),
        stage=st.sampled_from(STAGES),
        seconds=SECONDS,
    )
    def a_letter_has_bad_luck(self, kind, site, stage, seconds):
        self.world.arm(Fault(kind=kind, party=f"site-{site}", stage=stage, seconds=seconds))

    @precondition(lambda self: not self.ended)
    @rule(events=st.integers(1, 40))
    def the_coordinator_lives_for(self, events):
        self.world.live_for(events)
        with self.world.at_work():
            self.ended = self.world.go()

    @invariant()
    def nothing_is_broken(self):
        found = check(self.world, ended=False)
        assert not found, [str(violation) for violation in found]

    def teardown(self):
        try:
            if not self.ended:
                self.world.run()
            found = check(self.world)
            assert not found, [str(violation) for violation in found]
        finally:
            self.world.close()
            shutil.rmtree(self.folder)


def run_machine(examples: int) -> None:
    run_state_machine_as_test(
        Laboratory,
        settings=settings(
            max_examples=examples,
            stateful_step_count=6,
            deadline=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


def test_no_schedule_breaks_an_invariant():
    run_machine(10)


@pytest.mark.slow
def test_no_schedule_of_many_breaks_an_invariant():
    run_machine(1000)
