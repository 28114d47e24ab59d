"""Which sites a round asks: uniform, alike for everyone who recomputes it, bounded in a round."""

import dataclasses
from collections import Counter
from itertools import combinations

import pytest

from fedward.aggregation.groups import group_of, groups_of
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.participants import (
    another_sample_has,
    asked_sites,
    check_participants,
    drawn,
)
from fedward.aggregation.planned import planned_session
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import InvalidValue, ProtocolError
from fedward.identity import Identity, Member, Roster
from fedward.plan import Plan, from_json
from fedward.plan_aggregation import Cohort
from fedward.plan_task import Data, Split
from fedward.privacy.planned import training_event
from fedward.privacy.pooled import pooled_event
from tests.client.desk import PLAN

SIX, ELEVEN = (
    Roster(
        epoch=1,
        coordinator=Identity(bytes(32)).public_key,
        members=tuple(
            Member(id=i, name=f"site {i}", public_key=Identity(bytes([i + 1]) * 32).public_key)
            for i in range(size)
        ),
    )
    for size in (6, 11)
)
FAR = 45.3
"""Chi-square with 19 degrees of freedom is above this once in 1,600 draws (99.94 %)."""


def of(participants: int | None, spare: int = 1, **changes: object) -> Plan:
    rounds = dataclasses.replace(PLAN.rounds, participants=participants, spare=spare)
    return dataclasses.replace(PLAN, rounds=rounds, **changes)  # type: ignore[arg-type]  # by test


def at(number: int, attempt: int = 1, run: str = "r") -> Attempt:
    return Attempt(run=run, round=number, attempt=attempt)


def chi_square(samples: list[tuple[int, ...]]) -> float:
    """How far the 20 samples of three sites out of six are from being drawn alike."""
    found, expected = Counter(samples), len(samples) / 20
    assert set(found) <= set(combinations(range(6), 3))
    return sum((found[each] - expected) ** 2 for each in combinations(range(6), 3)) / expected


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_sample_is_as_likely_as_any_other(attempt):
    samples = [asked_sites(of(3), SIX, at(number, attempt)) for number in range(1, 2001)]
    assert chi_square(samples) < FAR
    biased = [sample if number % 10 else (0, 1, 2) for number, sample in enumerate(samples)]
    assert chi_square(biased) > FAR, "negative control: one draw of ten is no draw"


def test_the_draw_is_of_run_round_and_roster():
    samples = {asked_sites(of(5), ELEVEN, at(number)) for number in range(1, 41)}
    assert len(samples) > 30
    first = asked_sites(of(5), ELEVEN, at(1))
    assert first == asked_sites(of(5), ELEVEN, at(1))
    other = dataclasses.replace(ELEVEN, epoch=2)
    runs = {asked_sites(of(5), ELEVEN, at(1, run=f"{n}")) for n in range(10)}
    assert len(runs) > 5
    assert any(
        asked_sites(of(5), ELEVEN, at(n)) != asked_sites(of(5), other, at(n)) for n in range(1, 4)
    )


def test_attempts_ask_other_sites_and_there_are_no_more_samples_than_spare_rounds_and_one():
    first, second = (asked_sites(of(3), SIX, at(7, attempt)) for attempt in (1, 2))
    assert set(first) | set(second) == set(range(6))
    for spare in (0, 1, 2, 4):
        plan = of(4, spare)
        samples = [asked_sites(plan, ELEVEN, at(1, attempt)) for attempt in range(1, 60)]
        assert len(set(samples)) == spare + 1
        assert samples[spare + 1] == samples[0]
        assert all(len(set(sample)) == 4 and list(sample) == sorted(sample) for sample in samples)
    later = Attempt(run="r", round=1, session=3, attempt=2)
    assert asked_sites(of(3), SIX, later) == asked_sites(of(3), SIX, at(1, 2))


def test_without_a_draw_everybody_is_asked():
    assert asked_sites(of(None), SIX, at(3)) == tuple(range(6))
    assert asked_sites(of(6), SIX, at(3, 2)) == tuple(range(6))
    made = planned_session(of(None), SIX, at(1), task_hash=bytes(32), dimension=10)
    assert (made.group, made.grid.sites) == ((), 6)


def test_groups_and_samples_are_drawn_apart():
    ids = range(11)
    same = sum(
        drawn("group", ids, ELEVEN, at(n))[:5] == drawn("participant", ids, ELEVEN, at(n))[:5]
        for n in range(1, 50)
    )
    assert same == 0


def test_a_session_lets_nobody_in_who_is_not_asked():
    made = planned_session(of(3), SIX, at(1), task_hash=bytes(32), dimension=10)
    assert made.group == made.allowed == asked_sites(of(3), SIX, at(1))
    assert (made.grid.sites, made.minimum) == (3, 3)
    assert SessionParameters.from_bytes(made.to_bytes()) == made
    second = planned_session(
        of(3), SIX, at(1), task_hash=bytes(32), dimension=10, cohort=made.group
    )
    assert (second.group, second.allowed, second.grid.sites) == ((), made.group, 3)


def test_a_site_that_is_not_asked_refuses_and_one_that_is_does_not():
    plan = of(3)
    asked = asked_sites(plan, SIX, at(1))
    for site in range(6):
        if site in asked:
            assert group_of(plan, SIX, at(1), b"", site) == ()
        else:
            with pytest.raises(ProtocolError, match="draw asks sites"):
                group_of(plan, SIX, at(1), b"", site)


def test_groups_are_dealt_of_those_who_are_asked():
    plan = of(9, cohort=Cohort(minimum=3, colluders=1, groups=3))
    asked = asked_sites(plan, ELEVEN, at(1))
    said = canonical_json(list(asked))
    groups = groups_of(plan.cohort, ELEVEN, at(1), asked)
    assert [len(group) for group in groups] == [3, 3, 3]
    assert {group_of(plan, ELEVEN, at(1), said, site) for site in asked} == set(groups)
    left = next(site for site in range(11) if site not in asked)
    swapped = canonical_json(sorted([*asked[1:], left]))
    everybody = canonical_json(list(range(11)))
    for dealt in (swapped, everybody):
        with pytest.raises(ProtocolError, match="deal of sites"):
            group_of(plan, ELEVEN, at(1), dealt, asked[-1])
        with pytest.raises(ProtocolError, match="draw asks sites"):
            group_of(plan, ELEVEN, at(1), dealt, left)
    wide = dataclasses.replace(plan, rounds=dataclasses.replace(plan.rounds, participants=None))
    assert group_of(wide, ELEVEN, at(1), everybody, left), "twin: without the draw"


def test_a_roster_that_is_too_small_is_named():
    with pytest.raises(InvalidValue, match="participants = 7: expected at most the 6 sites"):
        asked_sites(of(7), SIX, at(1))
    check_participants(of(7), 7)
    check_participants(of(None), 3)


def test_a_plan_that_asks_too_few_is_refused():
    with pytest.raises(InvalidValue, match=r"at least \[cohort\] minimum = 5"):
        of(4, cohort=Cohort(minimum=5))
    with pytest.raises(InvalidValue, match="minimum = 3 for each of 3 groups"):
        of(8, cohort=Cohort(minimum=3, groups=3))
    split = Data(split=Split(by="label", sites=6, alpha=1.0))
    with pytest.raises(InvalidValue, match=r"at most \[data\] split.sites = 6"):
        of(7, data=split)
    of(6, data=split)


def test_an_old_plan_keeps_its_hash_and_a_new_one_has_its_own():
    assert b"participants" not in PLAN.to_json()
    assert b'"participants":3' in of(3).to_json()
    assert from_json(of(3).to_json()) == of(3)
    assert of(3).hash() != of(None).hash()


def test_a_draw_buys_no_epsilon():
    """Noise and cost are those of a plan that asks everybody, in both modes."""
    assert training_event(of(3)) == training_event(of(None))
    rounds = dataclasses.replace(PLAN.rounds, optimizer="sgd")
    pooled = dataclasses.replace(
        PLAN, mode="pooled", rounds=rounds, cohort=Cohort(minimum=3, colluders=1)
    )
    few = dataclasses.replace(pooled, rounds=dataclasses.replace(rounds, participants=3))
    assert pooled_event(few, 10) == pooled_event(pooled, 10)
    sessions = [
        planned_session(plan, SIX, at(1), task_hash=bytes(32), dimension=10)
        for plan in (few, pooled)
    ]
    assert sessions[0].noise == sessions[1].noise > 0


def test_a_round_goes_to_another_sample_only_where_that_has_enough_sites():
    """What the coordinator does when too few of an attempt's sites are there."""
    plan, rest = of(3), set(range(6)) - set(asked_sites(of(3), SIX, at(1)))
    assert another_sample_has(plan, SIX, at(1), rest)
    assert another_sample_has(plan, SIX, at(1, 2), range(6))
    gone = {min(rest), asked_sites(plan, SIX, at(1))[0]}
    assert not another_sample_has(plan, SIX, at(1), set(range(6)) - gone)
    assert not another_sample_has(of(3, 0), SIX, at(1), rest), "no spare, no other sample"
    assert not another_sample_has(plan, SIX, at(1), [])
    assert another_sample_has(of(3, 100000), SIX, at(1), rest)


def test_the_parameters_of_the_largest_sample_can_be_sent():
    """``P`` names who is asked, and has 65,536 bytes at most."""
    made = planned_session(of(3), SIX, at(1), task_hash=bytes(32), dimension=10)
    largest = dataclasses.replace(made, group=tuple(range(2**32 - 5000, 2**32)))
    assert SessionParameters.from_bytes(largest.to_bytes()) == largest
    larger = dataclasses.replace(made, group=tuple(range(2**32 - 6000, 2**32)))
    with pytest.raises(ProtocolError, match="at most 65536"):
        SessionParameters.from_bytes(larger.to_bytes())
