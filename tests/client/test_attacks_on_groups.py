"""A coordinator that deals sites to groups: whom it tells what, and one update for each of them."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from fedward.aggregation.groups import groups_of
from fedward.aggregation.planned import planned_session
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.errors import InvalidValue, SiteCode
from fedward.plan_aggregation import Cohort
from fedward.tuning.vector import dimension
from tests.client.desk import LAYOUT, PLAN, RUN, START, Desk

GROUPED = dataclasses.replace(PLAN, cohort=Cohort(minimum=3, colluders=1, groups=3))
SITES = 10
REFUSED = SiteCode.PROTOCOL_ABORTED
FIRST, NEXT = (Attempt(run=RUN, round=1, attempt=number) for number in (1, 2))
STEPS = ("hello", "shares", "masked", "consistency", "unmask")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, plan=GROUPED, sites=SITES)
    yield made
    made.close()


def dealing(desk: Desk, attempt: Attempt, dealt: Sequence[int]) -> list[tuple[int, ...]]:
    return list(groups_of(GROUPED.cohort, desk.roster, attempt, dealt))


def tell(desk: Desk, attempt: Attempt, dealt: Sequence[int], sites: Sequence[int]) -> None:
    said = canonical_json(list(dealt))
    assert {desk.task(attempt, site, dealt=said) for site in sites} == {SiteCode.READY}


def session_of(desk: Desk, attempt: Attempt, group: tuple[int, ...]) -> Tally:
    hashed = task_hash(START, desk.plan.hash(), desk.plan.aggregation.scheme)
    size = dimension(LAYOUT)
    parameters = planned_session(
        desk.plan, desk.roster, attempt, task_hash=hashed, dimension=size, group=group
    )
    return Tally(parameters=parameters, roster=desk.roster)


def led(desk: Desk, tally: Tally, sites: Sequence[int], until: str = "") -> Mapping[int, bytes]:
    """An honest session among these sites, up to an exchange, whose messages come back."""
    todo: Mapping[int, bytes] = dict.fromkeys(sites, tally.request())
    closes = (tally.close_hellos, tally.close_shares, tally.close_masked, tally.close_consistency)
    for action, close in itertools.zip_longest(STEPS, closes):
        if action == until:
            break
        desk.exchange(tally, tally.parameters.attempt, action, todo)
        todo = close() if close else {}
    return todo


def test_a_site_takes_part_in_its_own_group_s_session_alone(desk):
    everybody = range(9)
    tell(desk, FIRST, everybody, everybody)
    mine, other, third = dealing(desk, FIRST, everybody)
    swapped, union = tuple(sorted([*mine[:2], other[0]])), tuple(sorted(mine + other))
    for site, group in zip(mine, (other, swapped, union), strict=True):
        for asked in (group, mine):  # the second: after a wrong one the session is over
            message = {"message": session_of(desk, FIRST, asked).request()}
            assert desk.ask("hello", FIRST, site, message)[0] is REFUSED
    led(desk, session_of(desk, FIRST, third), third)  # control


def test_sites_that_are_told_of_other_dealings_share_no_session(desk):
    """A site left out for one of them, and not for the others, moves it to another group."""
    honest, told = range(9), (0, 1, 2, 3, 4, 5, 6, 7, 9)
    at = next(
        attempt
        for attempt in (Attempt(run=f"run {n}", round=1) for n in range(100))
        if {0, 1, 2} in map(set, dealing(desk, attempt, honest))
        and not any({0, 1, 2} <= set(group) for group in dealing(desk, attempt, told))
    )
    tell(desk, at, honest, (0, 1))
    tell(desk, at, told, (2,))
    message = {"message": session_of(desk, at, (0, 1, 2)).request()}
    codes = [desk.ask("hello", at, site, message)[0] for site in (0, 1, 2)]
    assert codes == [SiteCode.DONE, SiteCode.DONE, REFUSED]


def test_an_update_that_is_dealt_again_has_left_in_one_group_s_sum_at_most(desk):
    """What stopped before the masked input goes on in another group; what was sent is trained anew.

    The ten sites of the first attempt are dealt again without the last.
    """
    tell(desk, FIRST, range(10), range(10))
    groups = dealing(desk, FIRST, range(10))
    sent = groups[0]
    led(desk, session_of(desk, FIRST, sent), sent)
    stopped = session_of(desk, FIRST, groups[1])
    envelopes = led(desk, stopped, groups[1], until="masked")
    tell(desk, NEXT, range(9), range(9))
    assert dealing(desk, NEXT, range(9)) != groups
    for site in range(9):
        requests = desk.trainers[site].requests
        assert len(requests) == 1 + (site in sent), "trained again where the update had left"
        assert [each.draw for each in requests] == list(range(len(requests))), "with fresh noise"
    for site in groups[1]:
        if site < 9:
            assert desk.ask("masked", FIRST, site, {"message": envelopes[site]})[0] is REFUSED
    for group in dealing(desk, NEXT, range(9)):
        led(desk, session_of(desk, NEXT, group), group)
    for site in range(9):
        assert desk.ledger(site).spent(RUN) == 1 + (site in sent)


def test_whoever_deals_chooses_who_meets_so_colluders_count_in_the_whole_federation(desk):
    """Some choice has a victim alone with two others: more colluders than the plan says read it.

    A plan that says two has groups of four, and two honest sites in each.
    """
    victim, others = 0, {1, 2}
    dealings = (
        dealing(desk, Attempt(run=f"run {number}", round=1), dealt)
        for number in range(30)
        for dealt in itertools.combinations(range(10), 9)
    )
    assert any({victim, *others} == set(group) for groups in dealings for group in groups)
    with pytest.raises(InvalidValue, match="minimum"):
        Cohort(minimum=3, colluders=2, groups=3)
