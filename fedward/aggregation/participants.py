"""Which sites a round asks (``[rounds] participants``): a public draw that every site recomputes.

A round has one order of the roster, by hashes over run, round, roster and site. Its attempts ask
stretches of that order one after the other, so that the next attempt asks others, as far as there
are; behind the plan's spare rounds the first stretch comes again (docs/adr/0015).

Guarantees:
    In a round of a run there are ``spare + 1`` samples, whatever the coordinator does, and a site
    outside of the attempt's sample neither trains nor spends. **No privacy follows from a draw**:
    noise, minimum and colluders are those of a plan that asks everybody, and whoever names the
    run can choose among many draws.
"""

from collections.abc import Iterable

from fedward.attempt import Attempt
from fedward.canonical import digest
from fedward.errors import InvalidValue
from fedward.identity import Roster
from fedward.plan import Plan


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
    ids, size = [member.id for member in roster.members], plan.rounds.participants
    if size is None:
        return tuple(ids)
    check_participants(plan, len(ids))
    order = drawn("participant", ids, roster, attempt)
    first = (attempt.attempt - 1) % (plan.rounds.spare + 1) * size
    return tuple(sorted(order[(first + place) % len(order)] for place in range(size)))


def check_participants(plan: Plan, sites: int) -> None:
    """Refuse so few sites that a round could not ask as many as the plan says.

    Raises:
        InvalidValue: With how many there are.
    """
    size = plan.rounds.participants
    if size is not None and size > sites:
        raise InvalidValue("participants", size, f"at most the {sites} sites there are")
