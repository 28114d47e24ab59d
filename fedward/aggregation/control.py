"""SCAFFOLD's control variate of all sites, made from the sum that is opened anyway.

A site steps along ``g - c_i + c`` and then has ``c_i+ = c_i - c - u / (K lr)``, ``u`` being the
update that it sent (Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II). Summed over
the sites of a round that is a function of their mean update, so nobody sends a second vector
(docs/adr/0014). What is kept is the weighted sum of all c_i, not their mean: a site that joins
brings a c_i of 0, and the sum stays right. It lies among the server optimizer's moments in the
adapter file, so that whatever keeps, binds, checks or sends an adapter does so for it.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from fedward.aggregation.schemes import Vector
from fedward.errors import ProtocolError
from fedward.identity import Roster
from fedward.plan import Plan

CONTROL = "control"
"""The moment's name: the weighted sum of all sites' control variates, ``(d,)`` float32."""


def split_control(moments: Mapping[str, Vector]) -> tuple[Vector | None, dict[str, Vector]]:
    """The control variates' sum, None where it is zero yet, and the server optimizer's moments."""
    rest = {name: moment for name, moment in moments.items() if name != CONTROL}
    return moments.get(CONTROL), rest


def next_control(
    control: Vector | None,
    mean: npt.NDArray[np.float64],
    plan: Plan,
    roster: Roster,
    cohort: Iterable[int],
) -> dict[str, Vector]:
    """The sum of all control variates after a round, as a moment; empty without ``scaffold``.

    Element-wise float64, so that every site has the coordinator's to the last bit. It takes the
    mean itself, whatever a server optimizer makes of it.

    Args:
        control: The sum before.
        mean: ``(d,)``: the mean update of the cohort, by the plan's weights.
        plan: The frozen plan.
        roster: Every site whose control variate is in the sum.
        cohort: The sites in the mean.

    Raises:
        ProtocolError: The sum before has another shape.
    """
    if not plan.rounds.scaffold:
        return {}
    control = np.zeros(mean.shape, dtype=np.float32) if control is None else control
    shared = shared_control(control, plan, roster).astype(np.float64)
    if shared.shape != mean.shape:
        raise ProtocolError(f"a control variate of shape {shared.shape} for {mean.shape} updates")
    length = plan.rounds.steps * plan.rounds.learning_rate
    moved = _weight(plan, roster, cohort) * (-mean / length - shared)
    return {CONTROL: (control.astype(np.float64) + moved).astype(np.float32)}


def shared_control(control: Vector, plan: Plan, roster: Roster) -> Vector:
    """The weighted mean c of all sites' control variates, ``(d,)`` float32, from their sum."""
    whole = _weight(plan, roster, (member.id for member in roster.members))
    return (control.astype(np.float64) / whole).astype(np.float32)


def _weight(plan: Plan, roster: Roster, sites: Iterable[int]) -> float:
    weights = plan.aggregation.weights or {}
    names = {member.id: member.name for member in roster.members}
    return math.fsum(weights.get(names[site], 1.0) for site in sites)
