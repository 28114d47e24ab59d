"""The grid's cells: what each trains, by the house's own code, and the file that keeps it."""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from rich.console import Console

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.errors import ConfigurationError
from fedward.plan import Plan
from fedward.private_files import write_private
from fedward.server.store import Phase
from fedward.simulations import baseline
from fedward.simulations.case import Case, Options, load_case
from fedward.simulations.comparison import evaluate_adapter, pooled, train_in_one_place
from fedward.simulations.federation import Federation
from fedward.simulations.grid import FIRST_NODE
from fedward.simulations.notes import HOSPITALS
from fedward.tuning.tuned import tuned_model

EXAMPLES = Path(__file__).parents[2] / "examples"
NIH = [
    "CDC",
    "CancerGov",
    "GARD",
    "GHR",
    "MPlusHealthTopics",
    "NHLBI",
    "NIDDK",
    "NIHSeniorHealth",
    "NINDS",
]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and a plan.

    Args:
        plan: File in ``examples``; None is the built-in demo.
        data: Folder below ``--data``.
        sites: Whom the data makes.
        seeds: Of the adapter's start, and for the demo of its world.
        free: What is also trained without privacy.
        classical: Whether TF-IDF can do it.
    """

    plan: str | None
    data: str
    sites: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    free: Sequence[str] = ("federated", "alone", "central")
    classical: bool = True


TASKS: Mapping[str, Task] = {
    "demo": Task(plan=None, data="", sites=tuple(HOSPITALS), seeds=range(5), free=("central",)),
    "medquad": Task(plan="medquad.toml", data="medquad", sites=NIH),
    "med_abstracts": Task(
        plan="med_abstracts.toml",
        data="med_abstracts",
        sites=[f"site-{number}" for number in range(6)],
    ),
    "medquad-sft": Task(
        plan="medquad-sft.toml", data="medquad", sites=NIH, seeds=(0,), classical=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its evaluation.

    Args:
        task: Key of :data:`TASKS`.
        seed: One of the task's.
        private: With the plan's privacy, or with none.
        way: ``base``, ``classical``, ``federated``, ``central`` or ``alone-SITE``.
    """

    task: str
    seed: int
    private: bool
    way: str

    @property
    def name(self) -> str:
        """Task, seed, privacy and way with dots between; also the name of its file."""
        return f"{self.task}.{self.seed}.{'dp' if self.private else 'free'}.{self.way}"


def grid() -> list[Cell]:
    """Every cell; each way stands beside those that it is compared with."""
    cells = []
    for name, task in TASKS.items():
        for seed in task.seeds:
            ways = [(False, "base")]
            if task.classical:
                ways.append((False, "classical"))
            if task.plan is not None and seed != task.seeds[0]:
                ways = []  # the same data and, LoRA's B being zero, the same start
            for private in (True, False):
                for way in ("federated", "alone", "central") if private else task.free:
                    each = [f"alone-{site}" for site in task.sites] if way == "alone" else [way]
                    ways += [(private, one) for one in each]
            cells += [Cell(task=name, seed=seed, private=p, way=way) for p, way in ways]
    return cells


class Grid:
    """The cells' results in one folder.

    Args:
        folder: Holds a file for each finished cell.
        data: The folder of the shared data sets.
        shorten: Makes a plan quicker; the identity outside ``--quick``.
    """

    def __init__(self, folder: Path, data: Path, shorten: Callable[[Plan], Plan]) -> None:
        self._folder, self._data, self._shorten = folder, data, shorten
        self._case = lru_cache(maxsize=1)(self._load)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell found, or None."""
        path = self._folder / f"{cell.name}.json"
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and evaluate one cell and keep what came of it.

        Raises:
            ConfigurationError: The folder has cells of another plan.
        """
        case = self._case(cell.task, cell.seed)
        began, load = time.monotonic(), os.getloadavg()[0]
        if cell.way == "classical":
            facts: dict[str, Any] = {
                "mean": baseline.accuracy(case.plan, pooled(case.sites), case.test)
            }
        else:
            plan = case.plan if cell.private else without_privacy(case.plan)
            adapter, facts = self._train(cell, plan, case)
            facts["seconds_training"] = round(time.monotonic() - began, 1)
            metrics = evaluate_adapter(plan, adapter, case.test)
            scores = metrics.losses if metrics.correct is None else metrics.correct
            facts |= {"mean": float(scores.mean()), "scores": scores.tolist()}
            facts |= {"loss": metrics.loss, "macro_f1": metrics.macro_f1}
        facts |= {
            "cell": cell.name,
            "plan": case.plan.hash().hex(),
            "seconds": round(time.monotonic() - began, 1),
            "load": round(load, 1),
        }
        write_private(self._folder / f"{cell.name}.json", json.dumps(facts).encode())
        shutil.rmtree(self._folder / "runs" / cell.name, ignore_errors=True)
        return facts

    def _load(self, task: str, seed: int) -> Case:
        plan = TASKS[task].plan
        options = Options(
            plan=None if plan is None else EXAMPLES / plan,
            data=None if plan is None else self._data / TASKS[task].data,
            model=None,
            out=self._folder,
            seed=seed,
        )
        case = load_case(options, Console(stderr=True))
        case = dataclasses.replace(case, plan=self._shorten(case.plan))
        for cell in grid():
            done = self.result(cell) if (cell.task, cell.seed) == (task, seed) else None
            if done is not None and done["plan"] != case.plan.hash().hex():
                raise ConfigurationError(
                    f"{self._folder}: {cell.name} is of another plan than today's; remove that "
                    "task's files or choose another --out"
                )
        return case

    def _train(self, cell: Cell, plan: Plan, case: Case) -> tuple[bytes, dict[str, Any]]:
        """The adapter that a way comes to, and what it cost."""
        if cell.way == "base":
            return tuned_model(plan).start, {}
        if cell.way == "federated":
            return federate(plan, case, self._folder / "runs" / cell.name)
        if cell.way == "central":
            step = mechanism(plan, normaliser=plan.rounds.normaliser * len(case.sites))
            return train_in_one_place(plan, pooled(case.sites), step=step), {}
        return train_in_one_place(plan, case.sites[cell.way.removeprefix("alone-")]), {}


def without_privacy(plan: Plan) -> Plan:
    """The plan without clip and noise; plain steps then go as far along a gradient of length 1."""
    rounds, privacy = plan.rounds, dataclasses.replace(plan.privacy, epsilon=math.inf)
    if rounds.optimizer == "sgd":  # AdamW does not feel the length of a gradient
        rate = rounds.learning_rate * plan.privacy.clip
        rounds = dataclasses.replace(rounds, learning_rate=rate)
    return dataclasses.replace(plan, rounds=rounds, privacy=privacy)


def federate(plan: Plan, case: Case, folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Run a whole federation, with the demo's accident in round 2 where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    tuned, names = tuned_model(plan), sorted(case.sites)

    def kill(node: int, message: Message) -> bool:
        at = (message.metadata.message_type, message.metadata.group_id)
        return (
            case.killed is not None
            and node == names.index(case.killed) + FIRST_NODE
            and at == ("train.masked", "2")
        )

    federation = Federation(
        folder=folder,
        plan=plan,
        start=tuned.start,
        layout=tuned.layout,
        trainers={name: LocalTrainer(records) for name, records in case.sites.items()},
        fault=kill,
    )
    sent: list[int] = []

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase is Phase.COMMITTED:
            for node in federation.nodes.values():
                sent.append(federation.grid.take_bytes_up(node))
                federation.grid.revive(node)

    adapter = federation.run(observe)
    facts: dict[str, Any] = {"bytes_up_a_round": float(np.median(sent or [0]))}
    if plan.privacy.enabled:
        facts["epsilon"] = {name: federation.epsilon_spent(name) for name in names}
    return adapter, facts
