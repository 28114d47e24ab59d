"""What a task says of the round before it, read strictly: who was in the sum, in which attempt."""

import dataclasses
import json

from fedward.attempt import Attempt
from fedward.errors import ProtocolError
from fedward.identity import Roster
from fedward.plan import Plan


def read_cohort(data: bytes, roster: Roster, plan: Plan) -> tuple[int, ...]:
    """A published cohort: ids of the roster, ascending, at least the plan's minimum.

    Raises:
        ProtocolError: It is not that.
    """
    try:
        cohort = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the published cohort is not JSON") from error
    known = {member.id for member in roster.members}
    holds = isinstance(cohort, list) and all(type(site) is int for site in cohort)
    if not holds or cohort != sorted(known.intersection(cohort)):
        raise ProtocolError("the published cohort is not ascending ids of the roster")
    if len(cohort) < plan.cohort.minimum:
        raise ProtocolError("the published cohort is smaller than the minimum")
    return tuple(cohort)


def read_committed(data: bytes, last: Attempt) -> Attempt:
    """Which attempt at the last round was committed: this site's last one, or a later.

    Raises:
        ProtocolError: No number, or that of an earlier attempt.
    """
    try:
        number = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the committed attempt is not JSON") from error
    if type(number) is not int or number < last.attempt:
        raise ProtocolError(f"attempt {last.attempt} was this site's, and no earlier one counts")
    return dataclasses.replace(last, attempt=number)
