"""What a simulation works on: plan, sites and public test records, read, checked and frozen."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedward.canonical import digest
from fedward.errors import ConfigurationError, DataError
from fedward.plan import Plan, load_plan
from fedward.simulations.demo import prepare_demo
from fedward.tuning.models import fingerprint, resolve_model
from fedward.tuning.records import (
    Records,
    find_splits,
    hold_out,
    labels_of,
    make_sites,
    read_records,
)

_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says; see ``fedward simulate --help``."""

    plan: Path | None
    data: Path | None
    model: Path | None
    out: Path
    resume: bool = False
    ray_workers: int = 0
    seed: int = 0
    compare: bool = True
    registry: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that is trained on.

    Args:
        plan: Frozen: labels and the model's digest are filled in.
        sites: Site name → its training records.
        test: The public held-out records on which everything is evaluated.
        digest: Hex SHA-256 of the files that the records were read from.
        held_out: Site name → records of other patients for the site's own metrics; empty unless
            the plan has ``[metrics]``.
        killed: Site that the demo kills in the middle of a round; None kills nobody.
    """

    plan: Plan
    sites: Mapping[str, Records]
    test: Records
    digest: str
    held_out: Mapping[str, Records] = field(default_factory=dict)
    killed: str | None = None


def load_case(options: Options, console: Console) -> Case:
    """Read plan and data, or make the demo's, and freeze the plan.

    Raises:
        ConfigurationError: A plan without data, or data without a plan.
        DataError: The data does not fit the plan.
        ModelError: The base model cannot be found.
    """
    killed = None
    if options.plan is None:
        if options.data is not None:
            raise ConfigurationError("--data needs a PLAN: fedward simulate PLAN --data PATH")
        plan, data, killed = prepare_demo(options.seed, console)
    else:
        if options.data is None:
            raise ConfigurationError("a PLAN needs --data PATH: a file or a folder with splits")
        plan, data = load_plan(options.plan), options.data
        if options.seed:
            plan = dataclasses.replace(plan, seed=options.seed)
    if options.model is not None:
        plan = dataclasses.replace(
            plan, model=dataclasses.replace(plan.model, path=str(options.model))
        )
    return freeze_case(plan, data, killed)


def freeze_case(plan: Plan, data: Path, killed: str | None = None) -> Case:
    """Read the data of a plan, and fill in its labels and its model's digest.

    Raises:
        ConfigurationError: The plan's model digest is not the model's.
        DataError: The data does not fit the plan, or leaves a site without a patient.
        ModelError: The base model cannot be found.
    """
    splits = find_splits(data)
    train = read_records(splits["train"], plan)
    if plan.task.objective == "classify" and not plan.task.labels:
        labels = labels_of(train, plan.data.label)
        plan = dataclasses.replace(plan, task=dataclasses.replace(plan.task, labels=labels))
    if "test" in splits:
        test = read_records(splits["test"], plan)
    else:
        train, test = hold_out(train, _HELD_OUT_SHARE, seed=0)
    found = fingerprint(resolve_model(plan.model))
    if plan.model.sha256 not in (None, found):
        raise ConfigurationError(
            f"[model] sha256 names another model than {plan.model.path!r}, whose digest is {found}"
        )
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, sha256=found))
    sites, held_out = make_sites(train, plan.data), dict[str, Records]()
    empty = [name for name, records in sites.items() if not records.units]
    if empty:
        raise DataError(
            f"{data}: the split leaves {', '.join(empty)} without a patient; give it a larger "
            "alpha or fewer sites"
        )
    if plan.metrics is not None:
        for name, records in sites.items():
            sites[name], held_out[name] = hold_out(records, _HELD_OUT_SHARE, seed=0)
    read = [path.read_bytes() for name, path in splits.items() if name in {"train", "test"}]
    return Case(
        plan=plan,
        sites=sites,
        test=test,
        digest=digest("data", *read).hex(),
        held_out=held_out,
        killed=killed,
    )
