"""From a plan's file to what a run starts with: the frozen plan, the first adapter, its layout."""

import dataclasses
from pathlib import Path

from fedward.errors import ConfigurationError
from fedward.plan import Plan
from fedward.tuning.models import fingerprint, resolve_model
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import Layout


def prepare_start(plan: Plan, model: Path | None = None) -> tuple[Plan, bytes, Layout]:
    """Freeze a plan and make the adapter that round 1 starts from; needs the base model here.

    Args:
        plan: As its file has it.
        model: The base model's folder on this machine; left out, the plan's ``path``. The frozen
            plan keeps its own path, because sites find the model by its digest.

    Returns:
        The plan with the model's digest, the first state (safetensors bytes), the layout.

    Raises:
        ConfigurationError: The plan names another model, or lacks what only data could tell.
        ModelError: The model cannot be found or loaded.
    """
    if plan.task.objective == "classify" and not plan.task.labels:
        raise ConfigurationError(
            "[task] labels is empty: write the classes into the plan, because the coordinator sees "
            "no records to read them from"
        )
    local = plan.model if model is None else dataclasses.replace(plan.model, path=str(model))
    folder = resolve_model(local)
    digest = fingerprint(folder)
    if plan.model.sha256 not in (None, digest):
        raise ConfigurationError(
            f"[model] sha256 names another model than {folder}, whose digest is {digest}"
        )
    frozen = dataclasses.replace(plan, model=dataclasses.replace(plan.model, sha256=digest))
    here = dataclasses.replace(frozen.model, path=str(folder))
    tuned = tuned_model(dataclasses.replace(frozen, model=here))
    return frozen, tuned.start, tuned.layout
