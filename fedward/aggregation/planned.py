"""The session that a plan implies: coordinator and sites derive the same parameters from it."""

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.parameters import SessionParameters, Slot
from fedward.attempt import Attempt
from fedward.identity import Roster
from fedward.plan import Plan

METRIC_SLOTS = ("loss", "correct", "units")
"""The extra words of a plan with ``[metrics]``, in order."""

_METRIC_CLIP = float(1 << 20)  # a site's sum over held-out units; a public constant


def planned_session(
    plan: Plan, roster: Roster, attempt: Attempt, *, task_hash: bytes, dimension: int
) -> SessionParameters:
    """The parameters of a session of this plan.

    Args:
        plan: The frozen plan.
        roster: The pinned roster; its size is the most sites that a sum can have.
        attempt: Run, round, session, attempt.
        task_hash: What the updates start from, 32 bytes.
        dimension: Coordinates of an update.

    Raises:
        InvalidValue: The plan's cohort does not fit the roster.
    """
    sites = len(roster.members)
    aggregation, metrics = plan.aggregation, plan.metrics
    return SessionParameters(
        attempt=attempt,
        roster_hash=roster.hash(),
        task_hash=task_hash,
        dimension=dimension,
        grid=Grid(clip=aggregation.update_clip, sites=sites, word_bits=aggregation.word_bits),
        slots=tuple(Slot(name=n, clip=_METRIC_CLIP) for n in METRIC_SLOTS) if metrics else (),
        colluders=plan.cohort.colluders,
        dropouts=sites // 10,
        minimum=plan.cohort.minimum,
        deadline=plan.rounds.deadline_seconds,
    )
