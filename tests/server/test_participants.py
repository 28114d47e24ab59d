"""Rounds that ask a public sample of the sites: nobody else trains, spends, or can be asked."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedward.aggregation.participants import asked_sites
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.last_round import read_cohorts
from fedward.errors import InvalidValue, ProtocolError, RoundError, SiteCode
from fedward.plan import Plan
from fedward.plan_aggregation import Cohort
from fedward.plan_gate import Gate
from fedward.server import cli
from fedward.server.rounds import RoundEngine
from fedward.server.run_state import State
from fedward.server.store import Phase
from fedward.tuning.vector import vector_of
from tests.client.desk import LAYOUT, PLAN, POLICY, RUN, START, Desk
from tests.server import office
from tests.server.test_rounds import Rig, tasks

FEW = dataclasses.replace(
    PLAN, rounds=dataclasses.replace(PLAN.rounds, participants=3, deadline="2s")
)
SITES = 6


@pytest.fixture
def make_rig(tmp_path):
    rigs = list[Rig]()

    def make(**options):
        given: dict[str, Any] = {"plan": FEW, "sites": SITES} | options
        rigs.append(Rig(tmp_path / str(len(rigs)), **given))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def asked(rig: Rig, number: int, attempt: int = 1) -> list[int]:
    at = Attempt(run=RUN, round=number, attempt=attempt)
    return list(asked_sites(rig.plan, rig.desk.roster, at))


def spent(rig: Rig, site: int) -> list[int]:
    """The rounds for which a site's ledger has spent an update."""
    return [n for n in (1, 2, 3) if rig.desk.ledger(site).spent_in(Attempt(run=RUN, round=n))]


def test_a_round_asks_its_sample_and_the_others_neither_train_nor_spend(make_rig):
    rig = make_rig()
    adapter = rig.run()
    samples = [asked(rig, number) for number in (1, 2, 3)]
    assert rig.cohorts == samples
    assert [facts["sites"] for _, facts in rig.facts(Phase.INVITED)] == samples
    assert len(set(map(tuple, samples))) > 1, "control: rounds ask others"
    for site in range(SITES):
        mine = [number for number, sample in enumerate(samples, start=1) if site in sample]
        assert spent(rig, site) == mine
        assert [r.attempt.round for r in rig.desk.trainers[site].requests] == mine
    vector = vector_of(START, LAYOUT).astype(np.float64)
    times = [0] * SITES
    for sample in samples:
        sent = []
        for site in sample:
            times[site] += 1
            sent.append(np.random.default_rng([site, times[site]]).normal(0, 0.1, 10))
        vector += np.mean(sent, axis=0)
    assert np.abs(vector_of(adapter, LAYOUT) - vector).max() < 1e-5


def test_who_was_in_the_round_before_makes_the_adapter_and_the_others_are_sent_it(make_rig):
    rig = make_rig()
    rig.run()
    for (number, _, site), parts in tasks(rig).items():
        known = number > 1 and site in asked(rig, number - 1)
        assert ("adapter" in parts) is not known
    kept = [rig.desk.files[site][1].last_task(RUN) for site in range(SITES)]
    committed = [facts["adapter"] for _, facts in rig.facts(Phase.COMMITTED)]
    starts = [START, *map(rig.store.blob, committed)]
    assert all(task is None or task.adapter == starts[task.attempt.round - 1] for task in kept)


def test_a_site_that_sat_out_takes_the_newest_adapter_and_says_what_it_could_not_check(
    make_rig, caplog
):
    """Six rounds, so that somebody is asked again after some that it sat out."""
    plan = dataclasses.replace(FEW, rounds=dataclasses.replace(FEW.rounds, count=6))
    policy = dataclasses.replace(POLICY, max_rounds=7)
    rig = make_rig(plan=plan, policy=policy)
    rig.run()
    # On a busy machine a sample may come too late, and then the next is asked.
    events = [event for event in rig.store.events(RUN) if event.phase is Phase.COMMITTED]
    samples = [asked(rig, event.attempt.round, event.attempt.attempt) for event in events]
    assert rig.cohorts == samples
    assert len(samples) == 6
    gaps = [
        (site, number)
        for number in range(3, 7)
        for site in samples[number - 1]
        if site not in samples[number - 2] and any(site in s for s in samples[: number - 2])
    ]
    assert gaps, "control: somebody missed a sum"
    assert "were not checked" in caplog.text
    strict = dataclasses.replace(policy, every_sum=True)
    assert list(policy.reasons(plan)) == []
    (reason,) = strict.reasons(plan)
    assert reason == "it would sit out rounds whose sums it cannot check, and every_sum is on"


def test_a_sampled_site_that_is_away_costs_an_attempt_and_the_next_one_asks_others(make_rig):
    rig = make_rig()
    gone = asked(rig, 1)[0]
    rig.grid.kill(rig.nodes[gone])
    rig.run(
        observer=lambda attempt, phase, *_: (
            phase is Phase.COMMITTED and rig.grid.revive(rig.nodes[gone])
        )
    )
    first, second = asked(rig, 1), asked(rig, 1, 2)
    assert set(first) | set(second) == set(range(SITES))
    assert rig.cohorts == [second, asked(rig, 2), asked(rig, 3)]
    ((_, lost),) = rig.facts(Phase.ABORTED)
    assert lost["reason"].startswith("round 1: 2 of 3 sites are ready, 3 are needed")
    assert all(1 not in spent(rig, site) for site in first), "nothing of theirs has left"


def test_of_a_sample_those_who_are_ready_are_enough_if_they_are_the_minimum(make_rig):
    plan = dataclasses.replace(FEW, rounds=dataclasses.replace(FEW.rounds, participants=4))
    rig = make_rig(plan=plan)
    gone = asked(rig, 1)[1]
    rig.grid.kill(rig.nodes[gone])
    rig.run(observer=lambda *_: None)
    assert rig.cohorts[0] == [site for site in asked(rig, 1) if site != gone]
    assert rig.facts(Phase.ABORTED) == []


def test_sites_that_refuse_end_no_run_while_others_can_be_asked(make_rig):
    """Without a draw, an attempt that all of so many refuse is the last."""
    rig = make_rig()
    strict = dataclasses.replace(POLICY, max_epsilon=0.5)
    for site in asked(rig, 1):
        rig.desk.policy = strict
        rig.desk.restart(site)
    rig.desk.policy = POLICY
    with pytest.raises(RoundError, match="round 2 failed in 4 attempts"):
        rig.run()
    assert rig.cohorts == [asked(rig, 1, 2)]


def test_there_are_no_more_samples_in_a_round_than_spare_rounds_and_one(make_rig):
    rig = make_rig()
    rig.grid.kill(rig.nodes[asked(rig, 1)[0]])
    rig.grid.kill(rig.nodes[asked(rig, 1, 2)[0]])
    with pytest.raises(RoundError, match="failed in 4 attempts"):
        rig.run()
    invited = [facts["sites"] for _, facts in rig.facts(Phase.INVITED)]
    assert invited == [asked(rig, 1), asked(rig, 1, 2)] * 2


@pytest.mark.parametrize("phase", [Phase.INVITED, Phase.MASKED, Phase.COMMITTED])
def test_a_killed_coordinator_goes_on(make_rig, phase):
    class Killed(BaseException):
        pass

    def kill(attempt, found, site, facts):
        if (found, attempt.order) == (phase, (2, 1, 1)):
            raise Killed

    rig = make_rig()
    with pytest.raises(Killed):
        rig.run(observer=kill)
    rig.run()
    again = 1 if phase is Phase.COMMITTED else 2
    assert rig.cohorts == [asked(rig, 1), asked(rig, 2, again), asked(rig, 3)]
    for site in range(SITES):
        due = {n for n, cohort in enumerate(rig.cohorts, start=1) if site in cohort}
        lost = {2} if phase is Phase.MASKED and site in asked(rig, 2) else set()
        assert due <= set(spent(rig, site)) <= due | lost


def test_a_roster_that_is_too_small_is_refused_before_anybody_trains(make_rig):
    plan = dataclasses.replace(FEW, rounds=dataclasses.replace(FEW.rounds, participants=7))
    rig = make_rig(plan=plan)
    with pytest.raises(InvalidValue, match="participants = 7: expected at most the 6 sites"):
        rig.run()
    assert [trainer.requests for trainer in rig.desk.trainers] == [[]] * SITES


class Others(RoundEngine):
    """A coordinator that asks whom it likes."""

    favourites: tuple[int, ...] = ()

    def _todo(self, attempt: Attempt, state: State) -> tuple[list[int], frozenset[int]]:
        return list(self.favourites), frozenset()


def others(rig: Rig, favourites: list[int], **changes: Any) -> Others:
    engine = Others(
        plan=rig.plan,
        run=RUN,
        identity=rig.desk.identity,
        roster=rig.desk.roster,
        nodes=rig.nodes,
        store=rig.store,
        start=START,
        layout=LAYOUT,
        **changes,
    )
    engine.favourites = tuple(favourites)
    return engine


def test_a_coordinator_that_asks_somebody_else_is_refused_and_nothing_is_spent(make_rig):
    rig = make_rig()
    left = [site for site in range(SITES) if site not in asked(rig, 1)]
    mixed = sorted([*asked(rig, 1)[:2], left[0]])
    engine = others(rig, mixed)
    with pytest.raises(RoundError, match="failed in 4 attempts"):
        engine.run(rig.grid)
    assert rig.facts(Phase.COMMITTED) == rig.facts(Phase.MASKED) == []
    refused = {site for site, facts in rig.facts(Phase.LEFT_OUT)}
    assert left[0] in refused
    assert not rig.desk.trainers[left[0]].requests or left[0] in asked(rig, 1, 2)
    twin = dataclasses.replace(FEW, rounds=dataclasses.replace(FEW.rounds, participants=None))
    free = make_rig(plan=twin)
    others(free, mixed).run(free.grid)
    assert free.cohorts == [mixed] * 3, "twin: without the draw they come"


def test_a_site_that_is_not_asked_answers_with_a_code_and_writes_no_line(tmp_path):
    desk = Desk(tmp_path, plan=FEW, sites=SITES)
    at = Attempt(run=RUN, round=1)
    sample = asked_sites(FEW, desk.roster, at)
    left = next(site for site in range(SITES) if site not in sample)
    assert desk.task(at, left) is SiteCode.PROTOCOL_ABORTED
    assert desk.ledger(left).head[0] == 0
    assert desk.trainers[left].requests == []
    assert desk.task(at, sample[0]) is SiteCode.READY
    assert desk.ledger(sample[0]).head[0] > 0
    desk.close()


def test_a_published_cohort_is_of_the_sites_that_were_asked(make_rig):
    rig = make_rig()
    sample = asked(rig, 1)
    left = [site for site in range(SITES) if site not in sample]
    at, roster = Attempt(run=RUN, round=1), rig.desk.roster
    assert read_cohorts(canonical_json(sample), roster, FEW, at) == [((), tuple(sample))]
    with pytest.raises(ProtocolError, match="published cohort"):
        read_cohorts(canonical_json(sorted([*sample[:2], left[0]])), roster, FEW, at)
    second = dataclasses.replace(at, attempt=2)
    with pytest.raises(ProtocolError, match="published cohort"):
        read_cohorts(canonical_json(sample), roster, FEW, second)


def test_groups_are_dealt_among_those_who_are_asked(make_rig):
    cohort = Cohort(minimum=3, colluders=1, groups=3)
    rounds = dataclasses.replace(FEW.rounds, participants=9)
    rig = make_rig(plan=dataclasses.replace(FEW, cohort=cohort, rounds=rounds), sites=12)
    rig.run()
    for number, (_, facts) in enumerate(rig.facts(Phase.COMMITTED), start=1):
        assert facts["groups"][0] == facts["cohort"] == asked(rig, number)
        assert [len(group) for group in facts["groups"][1:]] == [3, 3, 3]
    assert len(rig.cohorts) == 3


def test_suspects_stay_away_from_the_samples_that_they_are_in(make_rig):
    """Half of those behind a sum that was too long, by turns, as far as the minimum stays."""
    plan = dataclasses.replace(
        FEW,
        rounds=dataclasses.replace(FEW.rounds, participants=5, spare=3),
    )
    policy = dataclasses.replace(POLICY, max_rounds=9)
    rig = make_rig(plan=plan, policy=policy, sites=8)
    suspects = asked(rig, 1)
    at = Attempt(run=RUN, round=1)
    rig.store.record(at, Phase.STARTED, {"plan": plan.hash().hex()})
    rig.store.record(at, Phase.INVITED, {"sites": suspects})
    rig.store.record(at, Phase.ABORTED, {"reason": "too long", "suspects": [suspects]})
    rig.run()
    invited = [facts["sites"] for _, facts in rig.facts(Phase.INVITED)][1:]
    samples = [asked(rig, 1, 2), asked(rig, 2), asked(rig, 3)]
    assert len(invited) == 3
    for sites, sample in zip(invited, samples, strict=True):
        assert set(sites) <= set(sample)
        assert set(sample) - set(sites) <= set(suspects)
        assert len(sites) >= plan.cohort.minimum
    assert sum(map(len, invited)) < sum(map(len, samples)), "somebody's turn came"
    assert rig.cohorts == invited


def test_a_round_that_the_gate_refuses_leaves_the_adapter_to_another_sample(make_rig):
    plan: Plan = dataclasses.replace(FEW, gate=Gate(data="x", norm=1e-6, refusals=9))
    rig = make_rig(plan=plan)
    assert rig.run(gate=lambda adapter: 0.0) == START
    assert [facts["cohort"] for _, facts in rig.facts(Phase.REFUSED)] == [
        asked(rig, number) for number in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("participants", "groups", "said"),
    [
        (None, 1, ""),
        (3, 1, "each round asks 3 of 4 sites, by a public draw"),
        (5, 1, "asks 5 of 4 sites, by a public draw; it pauses until the roster has 5"),
        (9, 3, "9 sites in 3 groups of 3 or more"),
    ],
)
def test_the_start_of_a_run_says_how_many_are_asked(tmp_path, capsys, participants, groups, said):
    folder = office.make_coordinator(tmp_path / "c")
    office.enrol_sites(folder, tmp_path, ["w", "x", "y", "z"])
    plan = dataclasses.replace(
        PLAN,
        rounds=dataclasses.replace(PLAN.rounds, participants=participants),
        cohort=Cohort(minimum=3, groups=groups),
    )
    cli._show_asked(plan, folder)
    words = " ".join(capsys.readouterr().err.split())
    assert said in words
    assert bool(said) is bool(words)


def test_who_watches_a_run_reads_how_many_were_asked():
    event = {"round": 2, "attempt": 3, "phase": "invited", "site": "", "facts": {"sites": [0, 4]}}
    assert cli._line(event) == "round 2 attempt 3: invited (2 sites)"
