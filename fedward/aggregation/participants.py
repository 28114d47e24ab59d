"""Which sites a round asks (``[rounds] participants``): a public draw that every site recomputes.

A round has one order of the roster, by hashes over run, round, roster and site. Its attempts ask
stretches of that order one after the other, so that the next attempt asks others, as far as there
are; behind the plan's spare rounds the first stretch comes again (docs/adr/0015).

Guarantees:
    Under one roster a round of a run has ``spare + 1`` samples at most, whatever the coordinator
    does, and a site outside of the attempt's sample neither trains nor spends. **No privacy follows
    from a draw**: noise, minimum and colluders are those of a plan that asks everybody, and whoever
    names the run can choose among many draws.
"""

from collections.abc import Collection, Iterable, Sequence

from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import InvalidValue
from fedward.identity import Roster
from fedward.plan import Plan, Rounds


def drawn(tag: str, sites: Iterable[int], roster: Roster, attempt: Attempt) -> list[int]:
    """Sites in an order that nobody can foresee before the run has a name.

    Args:
        tag: What is drawn; draws of other tags are independent.
        sites: Their ids.
        roster: The pinned roster.
        attempt: Any at the round; all have the same order.
    """
    place = (attempt.run, attempt.round.to_bytes(4, "big"), roster.hash())
    return sorted(sites, key=lambda site: digest(tag, *place, site.to_bytes(4, "big")))


def asked_sites(plan: Plan, roster: Roster, attempt: Attempt) -> tuple[int, ...]:
    """The ids of the only sites that an attempt may ask, ascending; without a draw all members.

    Args:
        plan: The frozen plan.
        roster: The pinned roster.
        attempt: Its run, round and number decide; of both passes of a round they are the same.

    Raises:
        InvalidValue: The roster has fewer members than the plan asks.
    """
    ids = [member.id for member in roster.members]
    if plan.rounds.participants is None:
        return tuple(ids)
    check_participants(plan, len(ids))
    order = drawn("participant", ids, roster, attempt)
    return tuple(sorted(_stretch(order, plan.rounds, attempt.attempt)))


def another_sample_has(
    plan: Plan, roster: Roster, attempt: Attempt, there: Collection[int]
) -> bool:
    """Whether some attempt at the round asks the plan's minimum of sites that are there.

    Args:
        plan: The frozen plan, with participants.
        roster: The pinned roster.
        attempt: Any at the round.
        there: The ids of the sites that are there.

    Raises:
        InvalidValue: The roster has fewer members than the plan asks.
    """
    check_participants(plan, len(roster.members))
    order = drawn("participant", [member.id for member in roster.members], roster, attempt)
    numbers = range(1, min(plan.rounds.spare + 1, len(order)) + 1)  # behind them they come again
    samples = (_stretch(order, plan.rounds, number) for number in numbers)
    return any(len(sample & set(there)) >= plan.cohort.minimum for sample in samples)


def _stretch(order: Sequence[int], rounds: Rounds, number: int) -> set[int]:
    """The part of a round's order that an attempt asks."""
    size = rounds.participants or len(order)
    first = (number - 1) % (rounds.spare + 1) * size
    return {order[(first + place) % len(order)] for place in range(size)}


def check_participants(plan: Plan, sites: int) -> None:
    """Refuse so few sites that a round could not ask as many as the plan says.

    Raises:
        InvalidValue: With how many there are.
    """
    size = plan.rounds.participants
    if size is not None and size > sites:
        raise InvalidValue("participants", size, f"at most the {sites} sites there are")
