"""What a task says of the round before it, read strictly: who was in the sum, in which attempt."""

import dataclasses
import hashlib
import json

from fedward.attempt import Attempt
from fedward.errors import ProtocolError
from fedward.identity import Roster
from fedward.plan import Plan
from fedward.tuning.vector import moments_of


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


def check_first(attempt: Attempt, adapter: bytes) -> None:
    """Refuse a first round that starts with moments: sites would make the next adapter of them.

    Raises:
        ProtocolError: It does.
        ModelError: The adapter is not a safetensors file.
    """
    if attempt.round == 1 and moments_of(adapter):
        raise ProtocolError("the first round starts without moments of a server optimizer")


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


def read_fallback(data: bytes | None, attempt: Attempt, plan: Plan) -> tuple[int, str] | None:
    """The last round that the coordinator completed by itself, and its adapter's hex digest.

    Args:
        data: What the task says of it; None where it says nothing.
        attempt: The task's.
        plan: Must have a ``[fallback]`` for this to be said.

    Raises:
        ProtocolError: It is malformed, not of an earlier round, or the plan has no such section.
    """
    if data is None:
        return None
    try:
        number, adapter = json.loads(data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("what a task says of a fallback is not a round and a digest") from error
    if plan.fallback is None or type(number) is not int or not 0 < number < attempt.round:
        raise ProtocolError("the plan has no [fallback], or not in an earlier round")
    if not isinstance(adapter, str):
        raise ProtocolError("the digest of a fallback's adapter is not text")
    return number, adapter


def check_named(adapter: bytes, digest: str) -> bytes:
    """The adapter, if it has this hex digest.

    Raises:
        ProtocolError: It has another.
    """
    if hashlib.sha256(adapter).hexdigest() != digest:
        raise ProtocolError("the adapter is not the one that the coordinator names as its own")
    return adapter
