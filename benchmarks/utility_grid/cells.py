"""The grid's cells: a plan for each, the same rows for all, and the file that keeps a result."""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from federation_grid.cells import EXAMPLES
from reporting import kept_result

from fedward.plan import Data, Plan, Privacy, Rounds, load_plan
from fedward.privacy.planned import training_event
from fedward.privacy.planning import record_epsilon
from fedward.private_files import write_private
from fedward.simulations.comparison import evaluate_adapter, train_in_one_place
from fedward.tuning.models import fingerprint, resolve_model
from fedward.tuning.records import Records, find_splits, group, read_records, select
from fedward.tuning.tuned import tuned_model

Level = Literal["unit", "record"]
EPSILONS = (math.inf, 8.0, 3.0, 1.0)
LEVELS: tuple[Level, ...] = ("unit", "record")
SEEDS = (0, 1, 2)

NORMALISER = 50.0
"""What the rates below draw a step on average, at both levels."""

CLIP = 0.1  # below nearly every gradient's length; AdamW does not feel how far below
DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and how it is learned.

    Args:
        example: Plan in ``examples`` that gives model, tuner and labels.
        folder: Folder below ``--data``.
        test: The split that scores are taken on.
        data: Its columns.
        rates: Level to sampling rate; both draw about :data:`NORMALISER` of the rows' units.
        learning_rate: AdamW's, one for every epsilon and tuner; chosen on training units that no
            cell trains on (``docs/benchmarks.md``), without looking at a test row.
        score: What a test example scores.
    """

    example: str
    folder: str
    test: str
    data: Data
    rates: Mapping[Level, float]
    learning_rate: float
    score: Literal["accuracy", "loss"]


TASKS: Mapping[str, Task] = {
    "medquad": Task(
        example="medquad.toml",
        folder="medquad",
        test="test",
        data=Data(text="answer", label="qtype", unit="focus"),
        rates={"unit": 0.032, "record": 0.01},
        learning_rate=2e-2,
        score="accuracy",
    ),
    "e2e": Task(
        example="medquad-sft.toml",
        folder="e2e_nlg",
        test="validation",
        data=Data(prompt="input", completion="text", unit="mr"),
        rates={"unit": 0.085, "record": 0.01},
        learning_rate=3e-2,
        score="loss",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a cell does.

    Args:
        rows: Most training rows, taken as whole units.
        test: Most test rows, each of another unit.
        steps: Steps of DP-SGD.
    """

    rows: int = 5000
    test: int = 700
    steps: int = 32


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its evaluation.

    Args:
        task: Key of :data:`TASKS`.
        seed: Of LoRA's start; draws and noise are new in every training.
        level: Whom privacy protects: a ``unit`` with all its records, or each ``record`` alone.
        tuner: ``lora``, ``ffa`` (A frozen), ``base`` (the start, untrained), or ``patient``: no
            training, but what record level gives whoever has the most records.
        epsilon: Of the whole training; infinite without clip and noise.
    """

    task: str
    seed: int
    level: Level
    tuner: str
    epsilon: float

    @property
    def name(self) -> str:
        """Task, seed, level, tuner and epsilon with dots between; also the name of its file."""
        epsilon = f"{self.epsilon:g}" if math.isfinite(self.epsilon) else "none"
        return f"{self.task}.{self.seed}.{self.level}.{self.tuner}.{epsilon}"


def base_of(task: str) -> Cell:
    """What the task's start scores: B is zero, so it is the same for every tuner and seed."""
    return Cell(task=task, seed=0, level="unit", tuner="base", epsilon=math.inf)


def patient_of(task: str, epsilon: float) -> Cell:
    """The accounting for whoever has the most records; neither tuner nor seed changes it."""
    return Cell(task=task, seed=0, level="record", tuner="patient", epsilon=epsilon)


def grid() -> list[Cell]:
    """Every cell; the first are worth most where there is little time."""
    cells = []
    for seed, task in itertools.product(SEEDS, TASKS):
        cells += [base_of(task)] if seed == 0 else []
        cells += [
            Cell(task=task, seed=seed, level=level, tuner=tuner, epsilon=epsilon)
            for level, tuner, epsilon in itertools.product(LEVELS, ("ffa", "lora"), EPSILONS)
        ]
    # Last, because a minute of arithmetic is no use before there is a training that it belongs to.
    cells += [patient_of(task, eps) for task in TASKS for eps in EPSILONS if math.isfinite(eps)]
    return cells


class Grid:
    """The cells' results in one folder.

    Args:
        folder: Holds a file for each finished cell.
        data: The folder of the shared data sets.
        size: How much a cell does.
    """

    def __init__(self, folder: Path, data: Path, size: Size) -> None:
        self._folder, self._data, self._size = folder, data, size
        self._rows = cache(self._read)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell found, or None.

        Raises:
            ConfigurationError: It was of another plan.
        """
        return kept_result(self._folder / f"{cell.name}.json", partial(self._plan, cell))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Do one cell and keep what came of it."""
        plan, (train, test) = self._plan(cell), self._rows(cell.task)
        began, worked, load = time.monotonic(), time.process_time(), os.getloadavg()[0]
        if cell.tuner == "patient":
            most = max(map(len, train.units))
            whole = record_epsilon([training_event(plan)], most, DELTA)
            facts: dict[str, Any] = {"mean": whole, "most_records": most}
        else:
            records = train if cell.level == "unit" else group(train.rows, None)
            facts = _train(cell, plan, records, test)
        facts |= {
            "cell": cell.name,
            "plan": plan.hash().hex(),
            "noise_multiplier": training_event(plan).noise_multiplier,
            "rows": len(train.rows),
            "units": len(train.units),
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - worked, 1),
            "load": round(load, 1),
        }
        write_private(self._folder / f"{cell.name}.json", json.dumps(facts).encode())
        return facts

    def _plan(self, cell: Cell) -> Plan:
        task, size = TASKS[cell.task], self._size
        example, digest = _example(task.example)
        return dataclasses.replace(
            example,
            name=f"utility-{cell.task}",
            seed=cell.seed,
            model=dataclasses.replace(example.model, sha256=digest),
            task=dataclasses.replace(example.task, max_length=64),
            data=task.data if cell.level == "unit" else dataclasses.replace(task.data, unit=None),
            rounds=Rounds(
                count=1,  # AdamW's memory lasts for one round
                spare=0,
                steps=size.steps,
                sampling_rate=task.rates[cell.level],
                normaliser=NORMALISER,
                learning_rate=task.learning_rate,
            ),
            aggregation=dataclasses.replace(
                example.aggregation, scheme="ffa" if cell.tuner == "ffa" else "fedavg"
            ),
            privacy=Privacy(epsilon=cell.epsilon, delta=DELTA, clip=CLIP, records_per_unit=1),
        )

    def _read(self, name: str) -> tuple[Records, Records]:
        """Training rows as whole units, and one row of each test unit: the same for every cell."""
        task, plan = TASKS[name], self._plan(base_of(name))
        splits = find_splits(self._data / task.folder)
        train, test = (read_records(splits[split], plan) for split in ("train", task.test))
        generator = np.random.default_rng(0)
        order = generator.permutation(len(train.units))
        rows = np.cumsum([len(train.units[unit]) for unit in order])
        chosen = order[rows <= self._size.rows]
        # One row a unit, so that the interval's examples do not stand for each other.
        asked = generator.permutation(len(test.units))[: self._size.test]
        single = [test.rows[generator.choice(test.units[unit])] for unit in asked]
        return select(train, chosen.tolist()), group(single, None)


def _train(cell: Cell, plan: Plan, records: Records, test: Records) -> dict[str, Any]:
    """Train, or take the start, and score every test example."""
    start = cell.tuner == "base"
    adapter = tuned_model(plan).start if start else train_in_one_place(plan, records)
    metrics = evaluate_adapter(plan, adapter, test)
    scores = metrics.losses if metrics.correct is None else metrics.correct
    return {"mean": float(scores.mean()), "scores": scores.tolist()}


@cache
def _example(file: str) -> tuple[Plan, str]:
    """A plan of the examples, and the digest of its model."""
    plan = load_plan(EXAMPLES / file)
    return plan, fingerprint(resolve_model(plan.model))
