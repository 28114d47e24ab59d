"""A job from its file to its models: steps in order, each interrupted and resumed at will.

A step's folder holds ``step.json`` (what it is made from), ``start`` (base and adapter merged,
where it starts from an adapter), ``checkpoints``, ``log.jsonl``, ``model`` and, when it is done,
``report.json``.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import TrainerCallback

from fedward.canonical import canonical_json, digest
from fedward.errors import ConfigurationError, ModelError
from fedward.plan import Model
from fedward.server.central.checkpoints import latest
from fedward.server.central.data import file_digest
from fedward.server.central.job import STEP, Job, Merge, Step
from fedward.server.central.keeping import measure
from fedward.server.central.loading import identity, starting_folder
from fedward.server.central.manifest import Manifest, read_manifest, write_manifest
from fedward.server.central.merging import base_of, merge_adapters
from fedward.server.central.stages import build, kind_of
from fedward.server.central.tracking import trackers
from fedward.server.central.validity import check_step
from fedward.server.registry import REGISTRY, Registry
from fedward.server.registry_entries import add_trained, pinned
from fedward.server.registry_version import Parent
from fedward.tuning.methods import METHODS
from fedward.tuning.models import fingerprint, resolve_model
from fedward.tuning.tuners import trainable

Report = dict[str, Any]


def run_job(
    job: Job,
    out: Path,
    console: Console,
    *,
    resume: bool = False,
    registry: Registry | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[Report]:
    """Train every step of a job.

    Args:
        job: Checked here as a whole before anything is loaded.
        out: One folder a step is made in it.
        console: Where progress is shown.
        resume: Go on with what is in ``out``: steps that are done are kept, an interrupted one goes
            on from its last checkpoint to the very weights it would have had.
        registry: Where ``registry:`` models come from and every step's model goes; None: nowhere.
        callbacks: Told of every step's training, beside the job's own.

    Returns:
        What each step's ``report.json`` says, and as ``version`` what the registry calls it.

    Raises:
        ConfigurationError: The job, or ``out`` holds another job's work, or some without
            ``resume``.
        DataError: Records that a stage cannot use.
        ModelError: A model that cannot be loaded, or a training that failed.
    """
    for each in job.steps:
        check_step(each)
    reports, titles = list[Report](), dict[str, str]()
    for named in job.order():
        step = named if isinstance(named, Merge) else pinned(named, registry)
        if isinstance(step, Merge):
            adapters = [_find(path, out, registry) for path in step.models]
            report = _merge(step, out, adapters, resume=resume)
            start = (step.models[0], base_of(out / step.name / "model"))
        else:
            models = _models(step, out, registry)
            report = _run(step, out, console, models, callbacks, resume=resume)
            merged = out / step.name / "start"
            start = (step.model.path, merged if merged.exists() else models[0])
        if registry is not None and PartialState().is_main_process:
            version = add_trained(
                registry,
                job.name if len(job.order()) == 1 else f"{job.name}-{step.name}",
                out / step.name / "model",
                start=start,
                parents=_parents(step, registry, titles),
                metrics={"training_loss": report["training_loss"], **report["evaluation"]},
            )
            titles[step.name] = report["version"] = version.title
        reports.append(report)
    return reports


_Models: TypeAlias = tuple[Path, Path | None, Path | None]
"""Where the starting model, the reward model and the teacher of a step are."""


def _run(
    step: Step,
    out: Path,
    console: Console,
    models: _Models,
    callbacks: Sequence[TrainerCallback],
    *,
    resume: bool,
) -> Report:
    folder = out / step.name
    start, judge, teacher = models
    made_from = _made_from(step, [path for path in models if path is not None])
    processes = PartialState(cpu=not torch.cuda.is_available())  # or torchrun's are not seen there
    with processes.main_process_first():
        if processes.is_main_process:
            claim(folder, made_from, resume=resume)
        report = folder / "report.json"
        if report.exists():
            done: Report = json.loads(report.read_bytes())
            return done
        base = starting_folder(start, folder / "start")
    # A model of gigabytes is not read again: what is no job's is known by its fingerprint.
    known = base == start and read_manifest(start) is None
    base_sha256 = made_from["model 0"] if known else fingerprint(base)
    if step.model.sha256 not in (None, base_sha256):
        raise ModelError(f"{base}: sha256 is {base_sha256}, but the job names another")
    progress = Progress(console=console)
    began = time.monotonic()
    with progress:
        watch = _Watch(progress, progress.add_task(step.name, total=None))
        told = [watch, *trackers(step.log, folder.parent, step.name), *callbacks]
        trainer = build(
            step, base, folder / "checkpoints", judge=judge, teacher=teacher, callbacks=told
        )
        before = measure(trainer)
        checkpoint = latest(folder / "checkpoints")
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        kept = {"before": before, "after": measure(trainer)} if before else {}
        metrics = trainer.evaluate() if step.data.evaluation is not None else {}
    if not math.isfinite(result.training_loss):
        raise ModelError(f"{step.name}: the loss is {result.training_loss}: lower learning_rate")
    written: Report = {
        "name": step.name,
        "stage": step.stage,
        "tuner": step.tuner.method,
        "quantize": step.model.quantize,
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - began, 2),
        "trained_parameters": sum(p.numel() for p in trainable(trainer.model).values()),
        "training_loss": result.training_loss,
        "evaluation": metrics,
        "kept": kept,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "model": str(folder / "model"),
    }
    save_trained(trainer, step, base, base_sha256, folder / "model", made_from)
    if trainer.is_world_process_zero():
        report.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return written


def _merge(merge: Merge, out: Path, models: list[Path], *, resume: bool) -> Report:
    folder, began = out / merge.name, time.monotonic()
    made_from = _made_from(merge, models)
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process:
            claim(folder, made_from, resume=resume)
        report = folder / "report.json"
        if not report.exists():
            job = digest("made from", canonical_json(dict(made_from))).hex()
            merge_adapters(merge, models, folder / "model", job)
            written: Report = {
                "name": merge.name,
                "stage": "merge",
                "tuner": merge.how,
                "steps": 0,
                "seconds": round(time.monotonic() - began, 2),
                "training_loss": None,
                "evaluation": {},
                "model": str(folder / "model"),
            }
            _replace(report, json.dumps(written, indent=2) + "\n")
    done: Report = json.loads(report.read_bytes())
    return done


def _parents(step: Step | Merge, registry: Registry, titles: Mapping[str, str]) -> list[Parent]:
    """The versions that a step learned from, its start first."""
    found = [titles.get(path.removeprefix(STEP), path) for path in step.needs()]
    named = [path for path in found if path.startswith(REGISTRY) or path in titles.values()]
    return [registry.parent(path) for path in named]


def _find(path: str, out: Path, registry: Registry | None) -> Path:
    """Where a model is that a job names."""
    if path.startswith(STEP):
        return out / path.removeprefix(STEP) / "model"
    if registry is not None and path.startswith(REGISTRY):
        return registry.path(path)
    return resolve_model(Model(path=path))


def _models(step: Step, out: Path, registry: Registry | None) -> _Models:
    judge = None if step.reward is None else step.reward.path
    return (
        _find(step.model.path, out, registry),
        None if judge is None else _find(judge, out, registry),
        None if step.teacher is None else _find(step.teacher, out, registry),
    )


def _made_from(step: Step | Merge, models: list[Path]) -> dict[str, str]:
    """Digests of all that decides what a step gives."""
    fields = canonical_json(json.loads(json.dumps(dataclasses.asdict(step))))
    files = step.files() if isinstance(step, Step) else []
    return {
        "step": digest("step", fields).hex(),
        **{f"data {name}": file_digest(Path(name)) for name in files},
        **{f"model {number}": identity(path) for number, path in enumerate(models)},
    }


def claim(folder: Path, made_from: Mapping[str, str], *, resume: bool) -> None:
    """Make a folder for some work, or check that it holds this very work.

    Args:
        folder: Gets ``step.json``.
        made_from: Name to digest of all that decides the work.
        resume: Whether work that is there may go on.

    Raises:
        ConfigurationError: It may not, or it is other work.
    """
    path = folder / "step.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(made_from, indent=2) + "\n")
        return
    if not resume:
        raise ConfigurationError(f"{folder} is there already: use --resume, or another --out")
    before = json.loads(path.read_bytes())
    changed = sorted(key for key in {*before, *made_from} if before.get(key) != made_from.get(key))
    if changed:
        raise ConfigurationError(
            f"{folder} was made from another {changed[0].split()[0]} ({', '.join(changed)}): "
            "use another --out"
        )


def save_trained(
    trainer: Any,  # noqa: ANN401  # TRL's
    step: Step,
    base: Path,
    base_sha256: str,
    folder: Path,
    made_from: Mapping[str, str],
) -> None:
    """Write a trained model with its manifest, whole or not at all.

    Args:
        trainer: TRL's, after training.
        step: What it trained.
        base: The whole model that it started from.
        base_sha256: Its fingerprint.
        folder: Replaced.
        made_from: Digests of all that decides the model.
    """
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle
    near = base.parent == folder.parent
    method = METHODS[step.tuner.method]
    write_manifest(
        partial,
        Manifest(
            kind=kind_of(step),
            stage=step.stage,
            method="full" if method.config is None else step.tuner.method,
            quantize=step.model.quantize,
            base=f"../{base.name}" if near else str(base),
            base_sha256=base_sha256,
            job=digest("made from", canonical_json(dict(made_from))).hex(),
            mergeable=method.mergeable,
            labels=_labels(trainer, step),
        ),
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _labels(trainer: Any, step: Step) -> tuple[str, ...]:  # noqa: ANN401  # TRL's
    if kind_of(step) != "classifier":
        return ()
    named: Mapping[int, str] = trainer.model.config.id2label
    return tuple(named[number] for number in sorted(named))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Watch(TrainerCallback):
    """Shows how far a step is."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Show the steps to come, and those done before a resumption."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401  # theirs
        """Count a step."""
        self.progress.update(self.task, completed=state.global_step)
