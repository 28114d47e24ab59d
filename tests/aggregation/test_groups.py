"""Groups: who is with whom, what a median does, and what a plan with groups may not say."""

import dataclasses

import numpy as np
import pytest

from fedward.aggregation import wire
from fedward.aggregation.groups import check_groups, group_of, groups_of, middle
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.planned import planned_session
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import InvalidValue, ProtocolError
from fedward.identity import Identity, Member, Roster
from fedward.plan_aggregation import Aggregation, Cohort
from tests.aggregation.rig import make_rig
from tests.client.desk import PLAN

NINE = Roster(
    epoch=1,
    coordinator=Identity(bytes(32)).public_key,
    members=tuple(
        Member(id=i, name=f"site {i}", public_key=Identity(bytes([i + 1]) * 32).public_key)
        for i in range(11)
    ),
)
THREE = Cohort(minimum=3, colluders=1, groups=3)
PLANNED = dataclasses.replace(PLAN, cohort=THREE)
ALL = range(11)
SAID = canonical_json(list(ALL))


def at(number: int, attempt: int = 1) -> Attempt:
    return Attempt(run="r", round=number, attempt=attempt)


def test_every_site_is_in_one_group_and_sizes_differ_by_one():
    for number in range(1, 30):
        groups = groups_of(THREE, NINE, at(number), ALL)
        assert sorted(site for group in groups for site in group) == list(range(11))
        assert sorted(map(len, groups)) == [3, 4, 4]
        assert all(group_of(PLANNED, NINE, at(number), SAID, site) in groups for site in range(11))


def test_rounds_are_dealt_anew_and_attempts_are_not():
    seen = {groups_of(THREE, NINE, at(number), ALL) for number in range(1, 30)}
    assert len(seen) == 29
    assert groups_of(THREE, NINE, at(1), ALL) == groups_of(THREE, NINE, at(1, 5), ALL)
    other = dataclasses.replace(NINE, epoch=2)
    assert groups_of(THREE, NINE, at(1), ALL) != groups_of(THREE, other, at(1), ALL)


def test_who_stays_away_is_in_no_group():
    some = [site for site in ALL if site not in {3, 7}]
    groups = groups_of(THREE, NINE, at(1), some)
    assert sorted(site for group in groups for site in group) == some
    assert group_of(PLANNED, NINE, at(1), canonical_json(some), 4) in groups
    with pytest.raises(ProtocolError, match="in none of the groups"):
        group_of(PLANNED, NINE, at(1), canonical_json(some), 3)


@pytest.mark.parametrize(
    "said", [b"", b"x", b"{}", b"1", b"[1,0]", b"[0,0,1]", b"[0,1,99]", b'["a"]', b"[true]"]
)
def test_who_is_dealt_is_read_strictly(said):
    with pytest.raises(ProtocolError):
        group_of(PLANNED, NINE, at(1), said, 0)


def test_two_sites_meet_as_often_as_chance_says():
    """Three groups of 4, 4 and 3 of 11 sites: a pair meets with probability 15/55."""
    met = sum(
        group_of(PLANNED, NINE, at(n), SAID, 0) == group_of(PLANNED, NINE, at(n), SAID, 1)
        for n in range(1, 601)
    )
    expected, deviation = 600 * 15 / 55, (600 * 15 / 55 * 40 / 55) ** 0.5
    assert abs(met - expected) < 4 * deviation
    assert abs(600 - expected) > 4 * deviation, "negative control: always together"


def test_without_groups_everybody_is_one():
    assert groups_of(Cohort(), NINE, at(1), ALL) == ((),)
    assert group_of(PLAN, NINE, at(1), b"", 4) == ()


def test_a_roster_that_is_too_small_is_refused_with_what_would_do():
    with pytest.raises(InvalidValue, match="3 to 3 with 11 sites and minimum = 3 in each"):
        groups_of(dataclasses.replace(THREE, groups=4), NINE, at(1), ALL)
    with pytest.raises(InvalidValue, match="expected 1 with 8 sites"):
        check_groups(THREE, 8)
    check_groups(THREE, 9)


@pytest.mark.parametrize("groups", [0, 2, -1, 1001])
def test_how_many_groups_there_may_be(groups):
    with pytest.raises(InvalidValue, match="1, or 3 to 1000"):
        Cohort(groups=groups)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": Aggregation(scheme="sketch")},
        {"aggregation": Aggregation(scheme="sketch-once")},
        {"aggregation": Aggregation(weights=dict.fromkeys("abcd", 1.0))},
        {"mode": "pooled"},
    ],
)
def test_what_a_median_has_no_meaning_for(changes):
    rounds = dataclasses.replace(PLAN.rounds, optimizer="sgd")
    plan = dataclasses.replace(PLAN, rounds=rounds, cohort=Cohort(), **changes)
    with pytest.raises(InvalidValue, match="groups = 3"):
        dataclasses.replace(plan, cohort=THREE)


def test_a_plan_without_groups_has_the_hash_that_it_had():
    assert b"groups" not in PLAN.to_json()
    assert b'"groups":3' in dataclasses.replace(PLAN, cohort=THREE).to_json()


def test_the_median_is_numpys_and_follows_no_minority():
    generator = np.random.default_rng(0)
    for count in (1, 3, 4, 7, 8):
        means = list(generator.normal(size=(count, 50)))
        assert np.array_equal(middle(means), np.median(means, axis=0))
    means = list(generator.normal(size=(7, 50)))
    wild = [*means[:4], *(np.full(50, value) for value in (1e9, -1e9, 1e9))]
    honest = np.stack(means[:4])
    found = middle(wild)
    assert (found >= honest.min(axis=0)).all()
    assert (found <= honest.max(axis=0)).all()
    assert np.abs(np.mean(wild, axis=0)).max() > 1e8, "negative control: the mean"


def test_a_group_is_in_the_parameters_and_nobody_else_is_allowed():
    plan = dataclasses.replace(PLAN, cohort=THREE)
    group = groups_of(THREE, NINE, at(1), ALL)[0]
    made = planned_session(plan, NINE, at(1), task_hash=bytes(32), dimension=10, group=group)
    assert made.allowed == group
    assert (made.grid.sites, made.minimum) == (len(group), 3)
    assert SessionParameters.from_bytes(made.to_bytes()) == made
    other = dataclasses.replace(made, group=groups_of(THREE, NINE, at(1), ALL)[1])
    assert "group = " in made.difference(other.to_bytes())
    with pytest.raises(InvalidValue, match="group"):
        dataclasses.replace(made, group=group[::-1])


def test_a_site_of_another_group_is_let_into_no_session():
    """It would be in two sums, and this group's would tell less of who is in it."""
    sites = (1, 2, 3, 4)
    for group in ((1, 2, 3), (1, 2, 3, 4)):
        rig = make_rig(sites, group=group, minimum=3)
        rig.exchange("R0", dict.fromkeys(rig.sites, rig.tally.request()))
        hellos = wire.encode_hellos([wire.decode_hello(rig.said["R0"][site]) for site in sites])
        if group == sites:
            rig.answer("R1", 1, hellos)  # control: it is the group
            continue
        with pytest.raises(ProtocolError, match="not in the cohort of the first pass or group"):
            rig.tally.close_hellos()
        with pytest.raises(ProtocolError, match="not in the cohort of the first pass or group"):
            rig.answer("R1", 1, hellos)
