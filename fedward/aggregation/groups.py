"""Groups of sites with a sum each, and the median of their means (``[cohort] groups``).

In one sum over all sites nobody can tell whose update moved it. Sums over groups can be compared
instead, and their coordinate-wise median does not follow a minority of them: median of means (Chen,
Su and Xu 2017, arXiv 1705.05491) by coordinates (Yin et al. 2018, arXiv 1803.01498). Every round
deals the sites anew, by a public rule. Who names runs and invites can choose what comes of it, a
site cannot; and by chance alone any few sites meet in some round.

Guarantees:
    Each group is a session of its own with the plan's minimum, and a site is in one: what is
    learned of its update is a sum over its group, of at least the minimum, and no other. While at
    most ``colluders`` of all sites work with the coordinator, no dealing isolates anybody. As
    long as fewer than half of the groups that have a sum hold a hostile site, each coordinate of
    the result lies between the means of two honest groups (of an even number, between theirs and
    one more: the mean of the middle two).
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fedward.aggregation.participants import asked_sites, drawn
from fedward.attempt import Attempt
from fedward.errors import InvalidValue, ProtocolError
from fedward.identity import Roster
from fedward.plan import Plan
from fedward.plan_aggregation import Cohort

FEWEST = 3
"""Groups with a sum below which no median tells anything."""

Group = tuple[int, ...]
"""Site ids, ascending; empty: everybody."""


def groups_of(
    cohort: Cohort, roster: Roster, attempt: Attempt, dealt: Sequence[int]
) -> tuple[Group, ...]:
    """The groups of a round: the same sites are dealt alike in all its attempts.

    Args:
        cohort: The plan's.
        roster: The pinned roster.
        attempt: Any at the round.
        dealt: Ids of the sites that are invited. The coordinator leaves out who keeps away, and so
            has some choice of who is with whom; that is why each group has the minimum.

    Returns:
        Groups whose sizes differ by one at most; without groups in the plan, everybody's alone.

    Raises:
        InvalidValue: They are too few for the plan's groups.
    """
    if cohort.groups == 1:
        return ((),)
    check_groups(cohort, len(dealt))
    order = drawn("group", dealt, roster, attempt)
    return tuple(tuple(sorted(order[first :: cohort.groups])) for first in range(cohort.groups))


def read_dealt(found: object, asked: Iterable[int]) -> Group:
    """The sites that a coordinator says it has dealt to groups.

    Raises:
        ProtocolError: They are not ids of sites that it may ask, ascending.
    """
    return read_ids(found, asked, "deal of sites to groups")


def read_ids(found: object, known: Iterable[int], what: str) -> Group:
    """Site ids out of JSON: known ones, ascending.

    Args:
        found: What JSON had.
        known: The ids that there may be.
        what: What a refusal calls them.

    Raises:
        ProtocolError: They are not that.
    """
    if not isinstance(found, list) or not all(type(site) is int for site in found):
        raise ProtocolError(f"the {what} is not a list of ids")
    if found != sorted(set(known).intersection(found)):
        raise ProtocolError(f"the {what} is not ascending ids of the roster or group")
    return tuple(found)


def group_of(plan: Plan, roster: Roster, attempt: Attempt, dealt: bytes, site: int) -> Group:
    """The group that a site is in; empty where the plan has none.

    Args:
        plan: The frozen plan.
        roster: The pinned roster.
        attempt: Any at the round.
        dealt: What the task says of who is dealt: JSON.
        site: The site.

    Raises:
        ProtocolError: The attempt may not ask this site; or what is dealt is not a list of ids of
            sites that it may ask, or the site is not in it.
        InvalidValue: They are too few for the plan's groups, or the roster's for its participants.
    """
    asked = asked_sites(plan, roster, attempt)
    if site not in asked:
        raise ProtocolError(f"this attempt's draw asks sites {list(asked)}, and not this one")
    if plan.cohort.groups == 1:
        return ()
    try:
        ids = read_dealt(json.loads(dealt), asked)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the sites dealt to groups are not JSON") from error
    for group in groups_of(plan.cohort, roster, attempt, ids):
        if site in group:
            return group
    raise ProtocolError("this site is asked, and in none of the groups")


def check_groups(cohort: Cohort, sites: int) -> None:
    """Refuse so few sites that a group would be smaller than the minimum.

    Raises:
        InvalidValue: With how many groups there may be.
    """
    if cohort.groups > 1 and sites // cohort.groups < cohort.minimum:
        most = sites // cohort.minimum
        allowed = f"3 to {most}" if most >= FEWEST else "1"
        raise InvalidValue(
            "groups",
            cohort.groups,
            f"{allowed} with {sites} sites and minimum = {cohort.minimum} in each",
        )


def middle(means: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """The coordinate-wise median; of an even number the mean of the middle two, of one itself.

    Args:
        means: ``(d,)`` float64 each, at least one.

    Returns:
        ``(d,)`` float64, alike to the last bit wherever it is computed.
    """
    if len(means) == 1:
        return means[0]
    ordered = np.sort(np.stack(means), axis=0)
    low, high = ordered[(len(means) - 1) // 2], ordered[len(means) // 2]
    median: npt.NDArray[np.float64] = (low + high) / 2
    return median
