"""What ends in the registry: a federated run, and each step of a central training."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedward.canonical import digest
from fedward.errors import ConfigurationError, ModelError, RoundError
from fedward.plan import Plan
from fedward.plan_tuner import UNMERGEABLE
from fedward.server.central.job import Step
from fedward.server.central.manifest import (
    ADAPTER,
    BASES,
    PLAN,
    Manifest,
    read_manifest,
    write_manifest,
)
from fedward.server.registry import REGISTRY, Registry
from fedward.server.registry_version import Origin, Parent, Spent, Version
from fedward.server.store import Phase, RunStore


def add_run(
    registry: Registry,
    plan: Plan,
    run: str,
    store: RunStore,
    metrics: Mapping[str, Any] | None = None,
) -> Version:
    """Put in what a federated run has made; the same run again changes nothing.

    The files are the frozen plan and the adapter, byte for byte as the coordinator committed it.

    Args:
        registry: Where it goes.
        plan: The frozen plan.
        run: The run's name.
        store: The run's events.
        metrics: What was measured, by name; only numbers are taken.

    Raises:
        RoundError: The run has no committed round, or the store is damaged.
    """
    cohorts, adapter, central = list[list[int]](), "", 0
    for event in store.events(run):
        facts = json.loads(event.payload)
        if event.phase in {Phase.COMMITTED, Phase.FALLBACK}:
            adapter = facts["adapter"]
        if event.phase in {Phase.COMMITTED, Phase.REFUSED}:  # both were paid for
            cohorts.append(facts["cohort"])
        central += event.phase is Phase.FALLBACK
    if not adapter:
        raise RoundError(f"run {run!r} has no adapter yet: no round is committed")
    state, base_sha256 = store.blob(adapter), str(plan.model.sha256)
    classify = plan.task.objective == "classify"
    origin = Origin(
        name=plan.name,
        kind="classifier" if classify else "language",
        stage="federation",
        method=plan.tuner.method,
        quantize=plan.model.quantize,
        base=plan.model.path,
        base_sha256=base_sha256,
        made_from=digest("run", run.encode(), plan.hash(), state).hex(),
        parents=_made(registry, base_sha256),
        metrics=_finite(metrics or {}),
        spent=_spent(plan, cohorts, central),
    )

    def fill(folder: Path) -> None:
        (folder / PLAN).write_bytes(plan.to_json())
        (folder / ADAPTER).write_bytes(state)
        manifest = Manifest(
            kind=origin.kind,
            stage=origin.stage,
            method=origin.method,
            quantize=plan.model.quantize,
            base=f"{BASES}/{base_sha256}",
            base_sha256=base_sha256,
            job=plan.hash().hex(),
            mergeable=plan.tuner.method not in UNMERGEABLE,
        )
        write_manifest(folder, manifest)

    return registry.add(origin, fill)


def add_trained(
    registry: Registry,
    name: str,
    model: Path,
    *,
    start: tuple[str, Path],
    parents: Sequence[Parent],
    metrics: Mapping[str, Any],
) -> Version:
    """Put in what a step of a job has made; the same again changes nothing.

    Args:
        registry: Where it goes.
        name: The version's.
        model: The step's ``model`` folder.
        start: The whole model that it started from: in the job's words, and its folder. Where it
            was merged for this step its files are kept, else a link to it.
        parents: The versions of the registry that it learned from.
        metrics: What was measured, by name; only numbers are taken.

    Raises:
        ModelError: The folder is not what a job leaves.
    """
    from fedward.server.central.loading import identity  # imports torch
    from fedward.tuning.models import fingerprint

    manifest = read_manifest(model)
    if manifest is None:
        raise ModelError(f"{model}: not a model that a job made")
    words, base = start
    full = manifest.method == "full"
    if not full:
        merged = base.parent == model.parent
        registry.keep_base(base, manifest.base_sha256, copy=merged)
    below = words if full else f"{BASES}/{manifest.base_sha256}"
    origin = Origin(
        name=name,
        kind=manifest.kind,
        stage=manifest.stage,
        method=manifest.method,
        quantize=manifest.quantize,
        base=words,
        base_sha256=manifest.base_sha256,
        made_from=identity(model),
        whole_sha256=fingerprint(model) if full else None,
        parents=tuple(parents) or _made(registry, manifest.base_sha256),
        metrics=_finite(metrics),
    )

    def fill(folder: Path) -> None:
        shutil.copytree(model, folder, dirs_exist_ok=True)
        write_manifest(folder, dataclasses.replace(manifest, base=below))

    return registry.add(origin, fill)


def pinned(step: Step, registry: Registry | None) -> Step:
    """The step with the number of every version that it names.

    Raises:
        ConfigurationError: It names a version, but there is no registry, or not that version.
    """

    def pin(path: str) -> str:
        if not path.startswith(REGISTRY):
            return path
        if registry is None:
            raise ConfigurationError(f"{path!r}: there is no registry here; name a folder")
        return REGISTRY + registry.get(path).title

    reward, replace = step.reward, dataclasses.replace
    if reward is not None and reward.path is not None:
        reward = replace(reward, path=pin(reward.path))
    return replace(
        step,
        model=replace(step.model, path=pin(step.model.path)),
        reward=reward,
        teacher=step.teacher and pin(step.teacher),
    )


def _made(registry: Registry, sha256: str) -> tuple[Parent, ...]:
    """The version that is a base, if the registry has it."""
    found = [version for version in registry.all() if version.whole_sha256 == sha256]
    return (registry.parent(found[0].title),) if found else ()


def _spent(plan: Plan, cohorts: Sequence[Sequence[int]], central: int) -> Spent | None:
    if not plan.privacy.enabled:
        return None
    return Spent(
        epsilon=plan.privacy.epsilon + (plan.metrics.epsilon if plan.metrics else 0.0),
        delta=plan.privacy.delta,
        unit=plan.data.unit or "record",
        rounds=len(cohorts),
        sites=len({site for cohort in cohorts for site in cohort}),
        minimum=plan.cohort.minimum,
        central_rounds=central,
    )


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
