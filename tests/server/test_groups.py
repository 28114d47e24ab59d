"""Rounds whose sites are dealt to groups: sessions side by side, and the median of their means."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from fedward.aggregation.groups import groups_of
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.last_round import read_cohorts, split_sum
from fedward.client.training import TrainRequest, TrainResult
from fedward.errors import InvalidValue, ProtocolError, RoundError
from fedward.plan import Plan
from fedward.plan_aggregation import Cohort
from fedward.plan_gate import Gate
from fedward.server.store import Phase
from fedward.tuning.vector import vector_of
from tests.client.desk import LAYOUT, PLAN, POLICY, RUN, START, Scripted
from tests.server.test_rounds import Rig, tasks

THREE = Cohort(minimum=3, colluders=1, groups=3)
GROUPED = dataclasses.replace(PLAN, cohort=THREE)
HASTY = dataclasses.replace(GROUPED, rounds=dataclasses.replace(PLAN.rounds, deadline="2s"))


@pytest.fixture
def make_rig(tmp_path):
    rigs = list[Rig]()

    def make(**options):
        given: dict[str, Any] = {"plan": GROUPED, "sites": 9} | options
        rigs.append(Rig(tmp_path / str(len(rigs)), **given))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def groups(rig: Rig, number: int, plan: Plan = GROUPED) -> list[list[int]]:
    found = groups_of(plan.cohort, rig.desk.roster, Attempt(run=RUN, round=number), list(rig.nodes))
    return [list(group) for group in found]


def updates(rig: Rig, number: int) -> np.ndarray[Any, Any]:
    """What each honest site has sent in a round that was its ``number``-th training."""
    made = [np.random.default_rng([t.site, number]).normal(0, 0.1, 10) for t in rig.desk.trainers]
    return np.array(made)


def test_the_adapter_moves_by_the_median_of_the_groups_means(make_rig):
    rig = make_rig()
    adapter = rig.run()
    vector = vector_of(START, LAYOUT).astype(np.float64)
    for number, (_, facts) in enumerate(rig.facts(Phase.COMMITTED), start=1):
        assert facts["groups"] == [list(range(9)), *groups(rig, number)]
        assert facts["cohort"] == list(range(9))
        assert len(set(facts["transcript"])) == 3
        sent = updates(rig, number)
        vector += np.median([sent[group].mean(axis=0) for group in facts["groups"][1:]], axis=0)
        now = vector_of(rig.store.blob(facts["adapter"]), LAYOUT)
        assert np.abs(now - vector).max() < 1e-5
        assert np.abs(now - START_VECTOR - sent.mean(axis=0)).max() > 1e-3, "negative control"
    assert len(rig.facts(Phase.COMMITTED)) == 3
    assert np.abs(vector_of(adapter, LAYOUT) - vector).max() < 1e-5


START_VECTOR = vector_of(START, LAYOUT).astype(np.float64)


def test_sites_make_the_adapter_from_all_groups_sums_and_have_signed_their_own(make_rig):
    rig = make_rig()
    rig.run()
    assert all("adapter" not in parts for (n, _, _), parts in tasks(rig).items() if n > 1)
    for site in range(9):
        (group,) = (tuple(group) for group in groups(rig, 3) if site in group)
        assert rig.desk.files[site][1].cohort(Attempt(run=RUN, round=3)) == group
        kept = rig.desk.files[site][1].last_task(RUN)
        assert kept is not None
        (_, second), (_, facts) = rig.facts(Phase.COMMITTED)[1:]
        assert kept.adapter == rig.store.blob(second["adapter"]) != rig.store.blob(facts["adapter"])


class Hostile(Scripted):
    """Sends the same long vector again and again."""

    def train(self, request: TrainRequest) -> TrainResult:
        result = super().train(request)
        return dataclasses.replace(result, update=np.full_like(result.update, -0.3))


@pytest.mark.parametrize(("cohort", "moved"), [(THREE, False), (Cohort(minimum=3), True)])
def test_one_hostile_site_moves_one_groups_mean_and_not_the_median(make_rig, cohort, moved):
    """Every coordinate stays between the means of the two honest groups."""
    rig = make_rig(plan=dataclasses.replace(GROUPED, cohort=cohort))
    rig.desk.trainers[4] = Hostile(4)
    rig.desk.agents[4] = rig.desk.agent(4)
    rig.run()
    ((_, facts), *_) = rig.facts(Phase.COMMITTED)
    step = vector_of(rig.store.blob(facts["adapter"]), LAYOUT) - START_VECTOR
    honest = [updates(rig, 1)[group].mean(axis=0) for group in groups(rig, 1) if 4 not in group]
    low, high = np.min(honest, axis=0) - 1e-5, np.max(honest, axis=0) + 1e-5
    assert bool(((low <= step) & (step <= high)).all()) is not moved


def test_a_group_that_is_lost_is_lost_alone(make_rig):
    four = dataclasses.replace(HASTY, cohort=dataclasses.replace(THREE, groups=4))
    rig = make_rig(plan=four, sites=12)
    gone = groups(rig, 1, four)[2][0]
    rig.grid.kill(rig.nodes[gone])
    rig.run(
        observer=lambda attempt, phase, *_: (
            phase is Phase.COMMITTED and rig.grid.revive(rig.nodes[gone])
        )
    )
    facts = [found for _, found in rig.facts(Phase.COMMITTED)]
    one = groups(rig, 1, four)
    assert facts[0]["groups"][1:] == [group for group in one if gone not in group]
    assert [len(found["cohort"]) for found in facts] == [9, 12, 12]
    lost = [site for site in one[2] if site != gone]
    for site in lost:  # their session never began, so that nothing has left
        assert rig.desk.files[site][0].spent_in(Attempt(run=RUN, round=1)) == 0


def test_who_does_not_come_is_not_dealt_again_and_costs_nobody_an_update(make_rig):
    """Ten sites in groups of four, three and three, of which one is dead for the whole run."""
    rig = make_rig(plan=HASTY, sites=10)
    small = next(group for group in groups(rig, 1) if len(group) == 3)
    gone = small[0]
    rig.grid.kill(rig.nodes[gone])
    rig.run()
    facts = [found for _, found in rig.facts(Phase.COMMITTED)]
    rest = [site for site in range(10) if site != gone]
    assert [found["cohort"] for found in facts] == [rest] * 3
    assert facts[0]["groups"][0] == rest
    ((_, lost), *_) = rig.facts(Phase.ABORTED)
    assert lost["reason"].startswith("2 of 3 groups are left, 3 are needed (2 sites of a group")
    assert lost["silent"] == [gone]
    for site in rest:
        assert rig.desk.files[site][0].spent_in(Attempt(run=RUN, round=1)) == 1


def test_with_fewer_than_three_groups_an_attempt_is_lost(make_rig):
    rig = make_rig(plan=HASTY)
    rig.grid.kill(rig.nodes[2])
    with pytest.raises(RoundError, match="8 of 9 sites are ready, 9 are needed"):
        rig.run()
    assert rig.facts(Phase.COMMITTED) == rig.facts(Phase.MASKED) == []


def test_a_federation_that_is_too_small_is_refused_before_anybody_trains(make_rig):
    rig = make_rig(sites=8)
    with pytest.raises(InvalidValue, match="groups = 3: expected 1 with 8 sites"):
        rig.run()
    assert [trainer.requests for trainer in rig.desk.trainers] == [[]] * 8


def test_a_sites_own_minimum_counts_for_its_group(make_rig):
    rig = make_rig(policy=dataclasses.replace(POLICY, minimum=4))
    with pytest.raises(RoundError, match="refused-policy"):
        rig.run()
    assert rig.facts(Phase.MASKED) == []


def test_the_gate_looks_at_the_median(make_rig):
    plan = dataclasses.replace(GROUPED, gate=Gate(data="x", norm=1e-6, refusals=9))
    rig = make_rig(plan=plan)
    assert rig.run(gate=lambda adapter: 0.0) == START
    found = [facts for _, facts in rig.facts(Phase.REFUSED)]
    assert len(found) == 3
    sent = updates(rig, 1)
    median = np.median([sent[group].mean(axis=0) for group in groups(rig, 1)], axis=0)
    assert found[0]["gate"]["norm"] == pytest.approx(np.linalg.norm(median), rel=1e-4)


def test_published_cohorts_are_read_strictly(make_rig):
    rig = make_rig()
    at, roster = Attempt(run=RUN, round=1), rig.desk.roster
    one = groups(rig, 1)

    def read(found: Any, plan: Plan = GROUPED) -> list[Any]:
        if plan is GROUPED and isinstance(found, list):
            found = [list(range(9)), *found]
        return read_cohorts(canonical_json(found), roster, plan, at)

    assert read(one) == [(tuple(group), tuple(group)) for group in one]
    mixed = [sorted([*one[0][:2], one[1][0]]), *one[1:]]
    wrong: list[Any] = [one[::-1], one[:2], [*one, one[0]], [one[0], one[0], one[2]], mixed]
    wrong += [[one[0][:2], *one[1:]], [one[0][::-1], *one[1:]], one[0], [[[0]], *one], "x", None]
    wrong += [[[], *one[1:]], [[True, *one[0]], *one[1:]]]
    for found in wrong:
        with pytest.raises(ProtocolError):
            read(found)
    for dealt in ([0], None, [*range(8), 99], list(range(9))[::-1]):
        with pytest.raises((ProtocolError, InvalidValue)):
            read_cohorts(canonical_json([dealt, *one]), roster, GROUPED, at)
    with pytest.raises(ProtocolError, match="not JSON"):
        read_cohorts(b"x", roster, GROUPED, at)
    assert read(list(range(9)), PLAN) == [((), tuple(range(9)))]
    with pytest.raises(ProtocolError, match="not the sums of 3 groups"):
        split_sum(bytes(8), 3)
    assert json.loads(canonical_json(one)) == one
