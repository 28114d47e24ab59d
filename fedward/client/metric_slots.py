"""Held-out metrics that may leave a site: clipped per unit, noised, charged, inside the sum.

Off unless the plan has ``[metrics]``. Each held-out unit counts once with the vector
(loss / loss_bound, accuracy, 1) / √3, whose L2 norm is at most 1; a round releases the noised sum.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedward.plan import Plan
from fedward.privacy.noise import SecureStream
from fedward.privacy.planned import metric_event
from fedward.tuning.metrics import Metrics


def metric_slots(
    metrics: Metrics | None,
    units: Sequence[Sequence[int]],
    plan: Plan,
    stream: SecureStream,
) -> npt.NDArray[np.float64]:
    """Noised sums over the held-out units, in the order of the session's slots.

    Args:
        metrics: The evaluation of every held-out record; None where there is none.
        units: Record indices of each unit; a unit counts with the mean over its records.
        plan: Gives ``loss_bound`` and the noise.
        stream: The noise.

    Returns:
        ``(3,)``: sums of clipped loss over ``loss_bound``, of accuracy, and of units; empty where
        the plan asks for none.

    Guarantees:
        One unit changes the sum before noise by at most √3 in L2; the noise's standard deviation
        is √3 times :func:`metric_event`'s multiplier. A unit whose loss is not finite counts as
        ``loss_bound``; no units give noise alone.
    """
    event = metric_event(plan)
    if event is None or plan.metrics is None:
        return np.zeros(0)
    total = np.zeros(3)
    if metrics is not None:
        for unit in units:
            total += _unit_vector(metrics, list(unit), plan.metrics.loss_bound)
    return total + stream.normal(3) * (math.sqrt(3.0) * event.noise_multiplier)


def _unit_vector(metrics: Metrics, unit: list[int], bound: float) -> tuple[float, float, float]:
    """One unit's part of the sum: three numbers from 0 to 1."""
    loss = float(np.mean(metrics.losses[unit])) / bound
    loss = min(max(loss, 0.0), 1.0) if math.isfinite(loss) else 1.0
    return loss, 0.0 if metrics.correct is None else float(np.mean(metrics.correct[unit])), 1.0
