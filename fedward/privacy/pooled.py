"""Mode ``pooled``: how much noise each site adds to a step's sum, and what the step costs.

A round is one step of DP-SGD over all sites together: each sends the sum of its clipped gradients,
times ``learning_rate / normaliser``, and a share of the noise (:mod:`fedward.privacy.distributed`).
All here follows from public constants: the plan and the length of an update.
"""

import dataclasses
import math
from bisect import bisect_left
from functools import lru_cache

from fedward.errors import InvalidValue
from fedward.plan import Plan
from fedward.privacy.accounting import epsilon
from fedward.privacy.distributed import COARSEST, SharedGaussian, share_of

FLOAT_MARGIN = 1.01
"""What the accounting takes a unit's bound to be over what the clip says: sums of gradients are
float32, and in them one unit also moves how the others' are rounded (docs/privacy.md)."""

_POINTS = range(1, 100_000_000)  # noise multipliers in thousandths


def unit_bound(plan: Plan) -> float:
    """L2 bound of what one unit changes in its site's part of a sum, in the unit of an update."""
    bound = plan.rounds.learning_rate * plan.privacy.clip / plan.rounds.normaliser
    return FLOAT_MARGIN * bound


def coarsest_step(plan: Plan, dimension: int) -> float:
    """The widest step of the fixed-point grid that :func:`pooled_event` covers."""
    return COARSEST * unit_bound(plan) / math.sqrt(max(1, dimension))


def noise_share(plan: Plan, dimension: int) -> float:
    """Deviation of one site's share, in the unit of an update; 0 where the plan has no privacy.

    Args:
        plan: ``pooled``; the noise nobody knows is the smallest, in thousandths of
            :func:`unit_bound`, for (epsilon, delta, sampling_rate, count + spare).
        dimension: Coordinates of an update.

    Guarantees:
        :func:`pooled_event`, ``count + spare`` times, is within the plan's epsilon at its delta.
    """
    return _share(plan, dimension) if plan.privacy.enabled else 0.0


def pooled_event(plan: Plan, dimension: int) -> SharedGaussian:
    """What one round of a plan with privacy costs a unit, if no more than its colluders collude."""
    return _event(plan, dimension, noise_share(plan, dimension))


def _event(plan: Plan, dimension: int, share: float) -> SharedGaussian:
    return SharedGaussian(
        clip=unit_bound(plan),
        grid_step=coarsest_step(plan, dimension),
        dimension=dimension,
        share=share,
        shares=plan.cohort.minimum - plan.cohort.colluders,
        sampling_rate=plan.rounds.sampling_rate,
        steps=1,
    )


@lru_cache(maxsize=16)
def _share(plan: Plan, dimension: int) -> float:
    cohort, privacy = plan.cohort, plan.privacy
    steps = plan.rounds.count + plan.rounds.spare

    def share(point: int) -> float:
        sigma = point / 1000 * unit_bound(plan)
        return share_of(sigma, minimum=cohort.minimum, colluders=cohort.colluders)

    def enough(point: int) -> bool:
        try:
            event = _event(plan, dimension, share(point))
        except InvalidValue:  # less than the accounting covers
            return False
        return epsilon([dataclasses.replace(event, steps=steps)], privacy.delta) <= privacy.epsilon

    place = bisect_left(_POINTS, True, key=enough)
    if place == len(_POINTS):
        raise InvalidValue(
            "epsilon", privacy.epsilon, "more (no noise reaches it), or fewer rounds"
        )
    return share(_POINTS[place])
