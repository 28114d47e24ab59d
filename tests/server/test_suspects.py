"""What a liar or a silent site can cost the others, and who stays away for it."""

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedward.aggregation import wire
from fedward.aggregation.masks import Words
from fedward.aggregation.transcript import party, sign
from fedward.errors import CohortTooSmall, RoundError, SiteCode
from fedward.messages import Letter, open_letter, seal_letter
from fedward.plan_aggregation import Cohort
from fedward.server import rounds
from fedward.server.store import Phase
from fedward.server.suspects import Record, proven
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from tests.client.desk import PLAN, POLICY
from tests.server.test_rounds import Rig

LIAR = 1


def groups(*members: str) -> tuple[frozenset[int], ...]:
    return tuple(frozenset(map(int, group)) for group in members)


@pytest.mark.parametrize(
    ("shown", "colluders", "expected"),
    [
        ((), 1, ""),
        (("2",), 3, "2"),
        (("12",), 0, ""),
        (("12", "12", "12"), 1, ""),  # the same lie again shows nothing new
        (("12", "23"), 1, "2"),
        (("12", "23"), 2, ""),  # 1 and 3 may be corrupt both
        (("12", "23", "24"), 2, "2"),
        (("1234", "124"), 1, ""),
        (("1234", "124", "13"), 1, "1"),  # the one liar is in all of them
        (("1234", "124", "13"), 2, ""),
        (("12", "23", "7"), 2, "7"),
    ],
)
def test_what_groups_of_suspects_prove(shown, colluders, expected):
    assert proven(groups(*shown), colluders) == frozenset(map(int, expected))


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_no_honest_site_is_ever_proven(colluders):
    """Whatever pairs and cohorts a coalition of the allowed size can bring about."""
    generator = np.random.default_rng(colluders)
    caught = 0
    for _ in range(300):
        corrupt = set(generator.choice(8, colluders, replace=False).tolist())
        shown = []
        for _ in range(generator.integers(1, 40)):
            liar = int(generator.choice(sorted(corrupt)))
            size = int(generator.choice([1, 1, 3, 5]))
            others = generator.choice(sorted(set(range(8)) - {liar}), size, replace=False)
            shown.append(frozenset({liar, *others.tolist()}))
        found = proven(shown, colluders)
        assert found <= corrupt
        caught += bool(found)
    assert caught > 100, "control: it is not empty for want of looking"


def test_twin_with_more_liars_than_allowed_for_an_honest_site_is_framed():
    assert proven(groups("12", "13"), 2) == frozenset()
    assert proven(groups("12", "13"), 1) == {1}


def away(record: Record, number: int, *, sites: int = 8, minimum: int = 3) -> frozenset[int]:
    return record.away(range(sites), minimum=minimum, colluders=1, number=number)


def test_the_two_of_a_dispute_take_turns():
    record = Record(groups=groups("25"))
    assert [away(record, number) for number in (1, 2, 3)] == [{5}, {2}, {5}]


def test_both_halves_of_a_cohort_take_turns():
    record = Record(groups=groups("0123456"))
    one, other = away(record, 1), away(record, 2)
    assert len(one) == len(other) == 4
    assert one | other == set(range(7))


def test_nobody_stays_away_whom_the_minimum_needs():
    record = Record(groups=groups("0123"), silent=((1, 1), (1, 3)))
    assert away(record, 1, sites=3) == set()
    taken = set[int]().union(*(away(Record(groups=groups("0123")), n, sites=4) for n in range(4)))
    assert taken == {0, 1, 2, 3}, "each has its turn"
    assert len(away(record, 1, sites=4)) == 1
    assert len(away(record, 1, sites=5, minimum=4)) == 1


@pytest.mark.parametrize("sites", [5, 8, 16, 33])
@pytest.mark.parametrize("liar", [0, 2, 4])
def test_one_liar_is_found_after_few_sums_that_are_too_long(sites, liar):
    """It lies whenever it is asked; the number of rounds in between does not count."""
    record, lies = Record(), 0
    for number in range(1, 200):
        while True:
            out = away(record, number, sites=sites) | proven(record.groups, 1)
            cohort = sorted(set(range(sites)) - out)
            if liar not in cohort:
                break
            record = record.after(number, {"suspects": [cohort]})
            lies += 1
    assert proven(record.groups, 1) == {liar}
    assert lies <= np.ceil(np.log2(sites)) + 1


def test_silence_that_ended_an_attempt_counts_for_the_round_and_twice_for_the_run():
    record = Record().after(1, {"silent": [4, 6]})
    assert away(record, 1) == {4, 6}
    assert away(record, 2) == frozenset()
    record = record.after(2, {"silent": [6]})
    assert away(record, 2) == {6}
    assert away(record, 9) == {6}
    assert record.after(3, {"reason": "too few are ready"}) == record


# Over real agents and the round engine.


class Changing(LocalGrid):
    """Answers of sites are changed; the change is signed with their true keys."""

    rig: Rig

    def change(self, letter: Letter) -> Letter:
        raise NotImplementedError

    def _deliver(self, message: Message) -> Message:
        reply = super()._deliver(message)
        site, desk = reply.metadata.src_node_id - FIRST_NODE, self.rig.desk
        letter = open_letter(reply.content, desk.roster.key(site), "site")
        changed = self.change(letter)
        if changed is letter:
            return reply
        return Message(seal_letter(changed, desk.keys[site], "site"), reply_to=message)


@pytest.fixture
def make_rig(tmp_path):
    rigs = []

    def make(grid: type[LocalGrid], *, count: int, spare: int, sites: int, colluders: int) -> Rig:
        plan = dataclasses.replace(
            PLAN,
            rounds=dataclasses.replace(PLAN.rounds, count=count, spare=spare),
            cohort=Cohort(minimum=3, colluders=colluders),
        )
        policy = dataclasses.replace(POLICY, max_rounds=count + spare)
        rigs.append(Rig(tmp_path, grid=grid, plan=plan, sites=sites, policy=policy))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


class Slander(Changing):
    """Site 1 says of one site's honest envelope that it does not open, with a key it made up."""

    rounds = 99

    def change(self, letter: Letter) -> Letter:
        if letter.site != LIAR or letter.action != "masked" or letter.attempt.round > self.rounds:
            return letter
        work: Any = self.rig.desk.agents[LIAR]._work
        cohort = work.session._state.cohort
        dealer, key = min(set(cohort.hellos) - {LIAR}), os.urandom(32)
        signature = sign(
            self.rig.desk.keys[LIAR], "C", cohort.session, party(LIAR), party(dealer), key
        )
        complaint = wire.encode_complaint(wire.Complaint(LIAR, dealer, key, signature))
        return dataclasses.replace(
            letter, code=SiteCode.PROTOCOL_ABORTED, parts={"complaint": complaint}
        )


def test_a_false_complaint_costs_the_liar_as_many_rounds_as_the_dealer(make_rig):
    Slander.rounds = 1
    rig = make_rig(Slander, count=4, spare=1, sites=4, colluders=1)
    rig.run()
    assert rig.cohorts == [[0, 2, 3], [1, 2, 3], [0, 2, 3], [1, 2, 3]]
    assert rig.facts(Phase.ABORTED) == []


def test_a_second_false_complaint_costs_the_liar_the_run_and_gives_the_dealer_back(make_rig):
    Slander.rounds = 99
    rig = make_rig(Slander, count=4, spare=1, sites=4, colluders=1)
    rig.run()
    assert rig.cohorts == [[0, 2, 3]] * 4
    aborted = [facts["suspects"] for _, facts in rig.facts(Phase.ABORTED)]
    assert aborted == [[[LIAR, 2]]], "one attempt, at round 2, where site 0 had its turn away"


def test_twin_with_both_of_a_dispute_put_out_one_lie_ends_the_run(make_rig, monkeypatch):
    def both(found, colluders):
        return frozenset().union(*found)

    monkeypatch.setattr(rounds, "proven", both)
    monkeypatch.setattr("fedward.server.suspects.proven", both)
    Slander.rounds = 1
    rig = make_rig(Slander, count=4, spare=1, sites=4, colluders=1)
    with pytest.raises(CohortTooSmall, match="2 of 2 sites are ready, 3 are needed"):
        rig.run()


def too_long(work: object) -> Words:
    return np.full(10, 1 << 30, dtype=np.uint32)  # twice the clip in each coordinate


def test_a_site_that_sends_too_much_is_found_and_the_run_goes_on(make_rig, monkeypatch):
    rig = make_rig(LocalGrid, count=3, spare=5, sites=4, colluders=1)
    monkeypatch.setattr(rig.desk.agents[3], "_words", too_long)
    rig.run()
    assert rig.cohorts == [[0, 1, 2]] * 3
    suspects = [facts["suspects"] for _, facts in rig.facts(Phase.ABORTED)]
    assert suspects == [[[0, 1, 2, 3]], [[0, 2, 3]], [[0, 1, 3]], [[1, 2, 3]]]
    assert rig.facts(Phase.INVITED)[-1] == (-1, {"sites": [0, 1, 2]}), "found: not asked again"


def test_twin_without_a_record_of_suspects_it_ends_the_run(make_rig, monkeypatch):
    monkeypatch.setattr(Record, "after", lambda self, number, facts: self)
    rig = make_rig(LocalGrid, count=3, spare=5, sites=4, colluders=1)
    monkeypatch.setattr(rig.desk.agents[3], "_words", too_long)
    with pytest.raises(RoundError, match="longer than its sites' updates can be"):
        rig.run()
    assert rig.cohorts == []


class Mute(Changing):
    """Sites 3 and 4 give their masked input, and then nothing more."""

    def change(self, letter: Letter) -> Letter:
        if letter.site in {3, 4} and letter.action in {"consistency", "unmask"}:
            return dataclasses.replace(letter, parts={})
        return letter


def test_sites_silent_after_their_input_cost_two_attempts_and_no_more(make_rig):
    rig = make_rig(Mute, count=4, spare=2, sites=5, colluders=1)
    rig.run()
    assert rig.cohorts == [[0, 1, 2]] * 4
    aborted = [facts["silent"] for _, facts in rig.facts(Phase.ABORTED)]
    assert aborted == [[3, 4], [3, 4]]
    committed = [e.attempt for e in rig.store.events("r") if e.phase is Phase.COMMITTED]
    assert [attempt.attempt for attempt in committed] == [2, 2, 1, 1]


def test_twin_without_a_record_of_silence_the_spare_rounds_are_used_up(make_rig, monkeypatch):
    monkeypatch.setattr(Record, "after", lambda self, number, facts: self)
    rig = make_rig(Mute, count=4, spare=2, sites=5, colluders=1)
    with pytest.raises(RoundError):
        rig.run()
    assert rig.cohorts == []


def test_who_was_silent_is_asked_after_all_if_too_few_are_left(make_rig):
    """Sites 3 and 4 come back, and one of the others does not."""
    rig = make_rig(Mute, count=1, spare=2, sites=5, colluders=1)

    def observe(attempt, phase, site, facts):
        if phase is Phase.ABORTED:
            rig.grid.change = lambda letter: letter
            rig.desk.trainers[0].error = RuntimeError("broken")

    rig.run(observer=observe)
    assert rig.cohorts == [[1, 2, 3, 4]]
