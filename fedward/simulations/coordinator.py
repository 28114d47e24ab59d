"""What the coordinator of a simulation does by itself, on data that it may use."""

from collections.abc import Callable
from pathlib import Path

from fedward.plan import Plan
from fedward.server.fallback import fallback_job, train_apart
from fedward.server.gate import Loss, gate_records, held_out_loss
from fedward.tuning.models import resolve_model


def fallback_of(plan: Plan, work: Path) -> Callable[[int, bytes], bytes] | None:
    """The job of the plan's ``[fallback]``, checked before anybody trains."""
    if plan.fallback is None:
        return None
    step, base = fallback_job(plan, Path(plan.fallback.job)), resolve_model(plan.model)
    return lambda _, adapter: train_apart(plan, step, base, adapter, work)


def gate_of(plan: Plan) -> Loss | None:
    """The plan's ``[gate]`` over its records, read before anybody trains."""
    if plan.gate is None:
        return None
    return held_out_loss(plan, gate_records(plan, Path(plan.gate.data)))
