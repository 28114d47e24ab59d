"""``[fallback]``: the coordinator completes a round by its own training, on data that it may use.

The training goes on from the last good adapter, over the plan's base and with the plan's tuner, so
that sites can take its result for the next round's start. It runs in a process of its own:
``python -m fedward.server.fallback WORK BASE``. Killed, it goes on from its last checkpoint.
"""

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from fedward import typed_toml
from fedward.canonical import digest
from fedward.errors import ConfigurationError, FedwardError, ModelError
from fedward.plan import Plan, from_json
from fedward.private_files import make_private_folder, write_private
from fedward.server.apart import last_line, run_apart
from fedward.server.central.job import Step, load_job

_LOG = logging.getLogger(__name__)

_PLAN, _JOB, _START, _RESULT = "plan.json", "job.toml", "start.safetensors", "end.safetensors"
_LOOK_SECONDS = 0.2

_OBJECTIVES = ("sft", "classify")
"""What goes on from an adapter; TRL's preference stages would add a second one as reference."""


def fallback_job(plan: Plan, path: Path) -> Step:
    """Read the job of a plan's fallback, and check that it trains what the sites would.

    Args:
        plan: Its base, tuner and objective are what the job has to name too.
        path: The job's file; its data are found from the current folder.

    Returns:
        The job's one step, with its data's absolute paths.

    Raises:
        ConfigurationError: With what is expected.
        DataError: ``classify``: rows that cannot be read.
    """
    if plan.task.objective not in _OBJECTIVES:
        raise ConfigurationError(
            f"[fallback]: the objective {plan.task.objective!r} cannot be trained on centrally, "
            f"only {' and '.join(_OBJECTIVES)}: leave the section out"
        )
    job = load_job(path)
    if len(job.steps) != 1:
        raise ConfigurationError(f"{path}: a fallback is one step, not {len(job.steps)}")
    (step,) = job.steps
    expected = {
        "stage": (step.stage, plan.task.objective),
        "[model] path": (step.model.path, plan.model.path),
        "[model] quantize": (step.model.quantize, plan.model.quantize),
        "[tuner] method": (step.tuner.method, plan.tuner.method),
        "[tuner]": (dict(step.tuner.arguments), dict(plan.tuner.arguments)),
    }
    for key, (given, wanted) in expected.items():
        if given != wanted:
            raise ConfigurationError(
                f"{path}: {key} = {given!r}: expected {wanted!r}, as in the plan whose adapter it "
                "goes on with"
            )
    held_out = step.data.evaluation
    data = dataclasses.replace(
        step.data,
        train=str(Path(step.data.train).absolute()),
        evaluation=held_out and str(Path(held_out).absolute()),
    )
    for name in (data.train, data.evaluation):
        if name is not None and not Path(name).exists():
            raise ConfigurationError(f"{path}: [data] {name}: no such file")
        if name is not None and step.stage == "classify":
            _check_labels(Path(name), step, plan)
    return dataclasses.replace(step, data=data)


def _check_labels(path: Path, step: Step, plan: Plan) -> None:
    """Refuse classes that the plan's head does not have, before anybody trains."""
    from fedward.server.central.data import read_dataset  # imports datasets

    strange = set(read_dataset(path, step)["label"]) - set(plan.task.labels)
    if strange:
        raise ConfigurationError(
            f"{path}: label {min(strange)!r}: expected one of the plan's, "
            f"{', '.join(plan.task.labels)}"
        )


def train_apart(
    plan: Plan,
    step: Step,
    base: Path,
    adapter: bytes,
    work: Path,
    look: Callable[[], None] = lambda: None,
) -> bytes:
    """Train on from an adapter, in a process of its own.

    Args:
        plan: The frozen plan.
        step: From :func:`fallback_job`.
        base: The base model's folder.
        adapter: The state to go on from, safetensors bytes.
        work: Each adapter, job and data have a folder in it; what a kill left there is gone on
            with.
        look: Called while it trains; what it raises ends the process, whose checkpoints stay.

    Returns:
        The adapter's whole state, safetensors bytes.

    Raises:
        ModelError: The training failed, and the message has its last line; or the job's data cannot
            be read.
    """
    files = {_PLAN: plan.to_json(), _JOB: typed_toml.dump(step).encode(), _START: adapter}
    read = [Path(name) for name in (step.data.train, step.data.evaluation) if name is not None]
    work = work / digest("fallback", *files.values(), *map(_hash, read)).hex()[:16]
    make_private_folder(work)
    for name, data in files.items():
        write_private(work / name, data)
    result = work / _RESULT
    if not result.exists():
        said = work / "said"
        status = run_apart("fedward.server.fallback", [work, base], said, look)
        if not result.exists():
            raise ModelError(f"the fallback's training ended with {status}: {last_line(said)}")
    return result.read_bytes()


def _hash(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


def train_on(plan: Plan, step: Step, base: Path, adapter: bytes, work: Path) -> bytes:
    """Train on from an adapter, in this process; see :func:`train_apart`."""
    from fedward.server.central.checkpoints import latest  # imports torch and TRL
    from fedward.server.central.loading import device
    from fedward.server.central.stages import build
    from fedward.server.central.validity import check_step
    from fedward.tuning.adapter import adapter_state, from_bytes, load_adapter, to_bytes
    from fedward.tuning.models import load_base
    from fedward.tuning.tuners import attach

    check_step(step)
    held = dataclasses.replace(plan.model, path=str(base))
    loaded, tokenizer = load_base(held, plan.task, device=device())
    model = attach(loaded, plan)
    trainer = build(step, base, work / "checkpoints", tuned=(model, tokenizer))
    load_adapter(trainer.model, from_bytes(adapter))  # TRL has rounded it over a quantised base
    checkpoint = latest(work / "checkpoints")
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return to_bytes(adapter_state(trainer.model))


def main(work: Path, base: Path) -> int:
    """Do what :func:`train_apart` has asked for; returns the exit status."""
    try:
        plan = from_json((work / _PLAN).read_bytes())
        step = typed_toml.load(Step, work / _JOB)
        result = train_on(plan, step, base, (work / _START).read_bytes(), work)
        write_private(work / _RESULT, result)
    except FedwardError as error:
        _LOG.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
