"""Search for a job's best keys: many trials, of which the worse are stopped early.

Ray Tune runs the trials, and ASHA (Li et al. 2020, "A system for massively parallel hyperparameter
tuning", arXiv 1810.05934) stops them. Each trial is a job of its own in a folder of its own. An
interrupted search goes on from these folders: every trial tells the scheduler again what its log
says and goes on from its last checkpoint. Nothing that Ray wrote is read again, because that is
pickle.
"""

import io
import json
import math
import os
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from fedward import typed_toml
from fedward.errors import ConfigurationError, FedwardError, ModelError
from fedward.local_ray import local_ray
from fedward.server.central.curves import read_curves
from fedward.server.central.data import file_digest
from fedward.server.central.job import Job, Step
from fedward.server.central.running import claim, run_job
from fedward.server.central.space import Key, Search
from fedward.server.central.tracking import LOG
from fedward.server.central.validity import check_step

BEST = "best.toml"

_FAILED = "failed.txt"


def search(
    job: Path, space: Path, out: Path, console: Console, *, resume: bool = False
) -> dict[str, Any]:
    """Run a search, and write the best trial's job.

    Args:
        job: A job of one step, with ``[data] evaluation`` and ``[train] eval_strategy``.
        space: What to try (:class:`fedward.server.central.space.Search`).
        out: Gets a folder for each trial, ``search.json`` and ``best.toml``.
        console: Where the outcome is shown.
        resume: Go on with what is in ``out``.

    Returns:
        What ``search.json`` says.

    Raises:
        ConfigurationError: The job or the space, or ``out`` holds another search.
        ModelError: No trial could be evaluated.
    """
    asked = typed_toml.load(Search, space)
    drawn = asked.drawn()
    jobs = _jobs(job, drawn)
    claim(out, {"job": file_digest(job), "space": file_digest(space)}, resume=resume)
    folders = [out / f"trial-{number:03}" for number in range(len(jobs))]
    for folder, document in zip(folders, jobs, strict=True):
        folder.mkdir(exist_ok=True)
        (folder / "job.toml").write_text(tomli_w.dumps(document), encoding="utf-8")
    with console.status(f"{len(jobs)} trials, {asked.workers} at a time"):
        _tune(asked, folders)
    trials = [
        {"trial": folder.name, **_outcome(folder, jobs[0]["name"], asked), **_named(values)}
        for folder, values in zip(folders, drawn, strict=True)
    ]
    scored = [trial for trial in trials if trial["score"] is not None]
    if not scored:
        raise ModelError(f"no trial gave {asked.metric}: see {out}/trial-*/{_FAILED}")
    finished = [trial for trial in scored if trial["state"] == "finished"] or scored
    best = (min if asked.mode == "min" else max)(finished, key=lambda trial: trial["score"])
    document = {"metric": asked.metric, "mode": asked.mode, "best": best, "trials": trials}
    text = json.dumps(document, indent=2) + "\n"
    (out / "search.json").write_text(text, encoding="utf-8")
    (out / BEST).write_bytes((out / best["trial"] / "job.toml").read_bytes())
    return document


def trials_table(document: Mapping[str, Any]) -> Table:
    """The trials of ``search.json`` for the terminal, the best first."""
    keys = list(document["trials"][0]["values"])
    table = Table("trial", *keys, document["metric"], "evaluations", "state")
    sign = 1 if document["mode"] == "min" else -1
    for trial in sorted(
        document["trials"],
        key=lambda each: math.inf if each["score"] is None else sign * each["score"],
    ):
        values = [
            f"{value:.4g}" if isinstance(value, float) else str(value)
            for value in trial["values"].values()
        ]
        score = "" if trial["score"] is None else f"{trial['score']:.4g}"
        table.add_row(
            trial["trial"],
            *values,
            score,
            str(trial["evaluations"]),
            trial["state"],
            style="bold" if trial["trial"] == document["best"]["trial"] else "",
        )
    return table


def _jobs(path: Path, drawn: Sequence[Mapping[Key, Any]]) -> list[dict[str, Any]]:
    """The job of every trial as TOML's values, all of them checked."""
    typed_toml.load(Step, path)  # says what is wrong with the job itself
    text = path.read_text(encoding="utf-8")
    found = list[dict[str, Any]]()
    for values in drawn:
        document = tomllib.loads(text)
        for key, value in values.items():
            inner = document
            for section in key[:-1]:
                inner = inner.setdefault(section, {})
            inner[key[-1]] = value
        step = typed_toml.parse(Step, document)
        check_step(step)
        if step.data.evaluation is None or step.train.arguments.get("eval_strategy") is None:
            raise ConfigurationError(
                f"{path}: a search needs [data] evaluation and [train] eval_strategy"
            )
        found.append(document)
    return found


def _tune(asked: Search, folders: Sequence[Path]) -> None:
    os.environ |= {
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a job's paths are from the current folder
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command, and --resume goes on
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    try:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler
    except ImportError as error:
        raise ConfigurationError("--search needs pip install 'fedward[search]'") from error
    with local_ray(asked.workers, "--search"), tempfile.TemporaryDirectory() as place:
        gpus = torch.cuda.device_count()
        scheduler = ASHAScheduler(
            time_attr="evaluations",
            max_t=2**30,  # a job ends by itself
            grace_period=asked.grace,
            reduction_factor=asked.reduction,
        )
        tune.Tuner(
            tune.with_resources(_trial, {"cpu": 1, "gpu": min(1.0, gpus / asked.workers)}),
            param_space={
                "folder": tune.grid_search([str(folder.resolve()) for folder in folders]),
                "metric": asked.metric,
            },
            tune_config=tune.TuneConfig(
                metric=asked.metric,
                mode=asked.mode,
                scheduler=scheduler,
                max_concurrent_trials=asked.workers,
                reuse_actors=True,  # a process takes seconds to import what trains
            ),
            run_config=tune.RunConfig(storage_path=place, verbose=0),
        ).fit()


def _trial(given: Mapping[str, str]) -> None:
    """One trial, in a process of Ray."""
    from ray import tune

    folder, metric = Path(given["folder"]), given["metric"]
    step = typed_toml.load(Step, folder / "job.toml")
    told = _Tell(metric)
    for at, value in _evaluations(folder / step.name, metric):
        told.tell(at, value)
    try:
        quiet = Console(file=io.StringIO())
        run_job(Job(name=step.name, steps=(step,)), folder, quiet, resume=True, callbacks=[told])
    except FedwardError as error:
        (folder / _FAILED).write_text(f"{error}\n", encoding="utf-8")
        if not told.count:
            tune.report({metric: math.nan, "evaluations": 1})


class _Tell(TrainerCallback):
    """Tells the scheduler of every evaluation, each step once."""

    def __init__(self, metric: str) -> None:
        self.metric, self.count, self.last = metric, 0, -1

    def tell(self, at: int, value: float) -> None:
        """Report; Ray ends the trial here where the scheduler stops it."""
        from ray import tune

        if at > self.last:
            self.count, self.last = self.count + 1, at
            tune.report({self.metric: value, "evaluations": self.count})

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401  # theirs
        """Report an evaluation."""
        value = given["metrics"].get(self.metric)
        if value is not None:
            self.tell(state.global_step, float(value))


def _evaluations(folder: Path, metric: str) -> Sequence[tuple[int, float]]:
    log = folder / LOG
    return read_curves(log).get(metric, ()) if log.exists() else ()


def _outcome(folder: Path, step: str, asked: Search) -> dict[str, Any]:
    """How far a trial came, and how good it was in the end."""
    curve = _evaluations(folder / step, asked.metric)
    report = folder / step / "report.json"
    if report.exists():
        score = json.loads(report.read_bytes())["evaluation"].get(asked.metric)
        return {"state": "finished", "score": score, "evaluations": len(curve)}
    state = "failed" if (folder / _FAILED).exists() else "stopped"
    score = curve[-1][1] if curve and state == "stopped" else None
    return {"state": state, "score": score, "evaluations": len(curve)}


def _named(values: Mapping[Key, Any]) -> dict[str, Any]:
    return {"values": {".".join(key): value for key, value in values.items()}}
