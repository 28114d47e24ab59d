"""The grid's cells: ways to train together, with and without privacy, and files that keep them."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from federation_grid.cells import EXAMPLES, federate
from reporting import kept_result

from fedward.client.trainer import mechanism
from fedward.plan import Plan, Privacy, Rounds, Tuner, load_plan
from fedward.privacy.pooled import noise_share
from fedward.private_files import write_private
from fedward.simulations.case import Case, freeze_case
from fedward.simulations.comparison import evaluate_adapter, pooled, train_in_one_place
from fedward.tuning.models import fingerprint, resolve_model
from fedward.tuning.records import Records, merge, select
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import dimension

Scheme = Literal["fedavg", "ffa", "alternating", "sketch", "sketch-once"]
SCHEMES: tuple[Scheme, ...] = ("fedavg", "ffa", "alternating", "sketch", "sketch-once")
MIXED = "sketch-mixed"
WAYS = ("alone", *SCHEMES, MIXED, "central", "pooled", "central-noise")
ONE_RANK = tuple(way for way in WAYS if way != MIXED)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, by whom, and how fast.

    Args:
        example: The example plan.
        data: The data set's folder.
        rate: AdamW's learning rate without privacy, for every way.
        private_rate: SGD's, with privacy. Both are chosen on a fifth of the training units, without
            looking at a test row (docs/benchmarks.md).
        own_rates: Ways that another rate than ``private_rate`` serves better.
        epsilons: With what privacy; infinite is none.
        rounds: Rounds without privacy.
        steps: Local steps of each; with privacy there is one.
        private_rounds: Rounds with privacy.
        rows: Most training rows of all sites, taken as whole units and from each site alike.
        ways: Those of :data:`WAYS` that are trained.
        alpha: Concentration of the labels' split in place of the example's; None leaves it.
    """

    example: str
    data: str
    rate: float
    private_rate: float
    own_rates: Mapping[str, float] = field(default_factory=dict)
    epsilons: tuple[float, ...] = (math.inf, 3.0)
    rounds: int = 8
    steps: int = 5
    private_rounds: int = 20
    rows: int = 2500
    ways: tuple[str, ...] = ONE_RANK
    alpha: float | None = None


ABSTRACTS = Task(
    example="med_abstracts",
    data="med_abstracts",
    rate=0.006,
    private_rate=10.0,
    rounds=32,
    steps=1,
    alpha=0.5,
)

TASKS = {
    "medquad": Task(
        example="medquad",
        data="medquad",
        rate=0.02,
        private_rate=30.0,
        own_rates={"fedavg": 10.0, "alternating": 10.0, "sketch": 3.0, "sketch-once": 3.0},
        epsilons=(math.inf, 3.0, 1.0, 8.0),
        ways=WAYS,
    ),
    "medquad-often": Task(
        example="medquad",
        data="medquad",
        rate=0.02,
        private_rate=30.0,
        epsilons=(math.inf,),
        rounds=64,
        steps=1,
        ways=(*SCHEMES, MIXED, "central"),
    ),
    "abstracts-half": ABSTRACTS,
    "abstracts-tenth": dataclasses.replace(ABSTRACTS, alpha=0.1),
    "dolly": Task(
        example="dolly-sft",
        data="dolly_fedit",
        rate=0.005,
        private_rate=1.0,
        own_rates={"ffa": 4.0},
        rounds=16,
        steps=1,
        private_rounds=12,
        rows=1000,
        ways=(*SCHEMES, "central", "pooled"),
    ),
}
"""Name to task. A score of ``dolly`` is a record's loss, of the others 1 for a right answer."""

TRIED = {True: (3.0, 10.0, 30.0), False: (0.002, 0.006, 0.02)}
"""Rates that ``--tune`` tries, with and without privacy."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a cell does.

    Args:
        rows: Most training rows, where the task has not fewer.
        test: Most test units.
        rounds: Most rounds, where the task has not fewer.
    """

    rows: int = 100_000
    test: int = 100_000
    rounds: int = 1000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its evaluation.

    Args:
        task: One of :data:`TASKS`.
        way: A scheme; ``sketch-mixed`` (a third of the sites each at rank 4, 8 and 16; the others
            are at 8); ``pooled`` (the mode); ``alone`` (each site for itself); ``central`` (all
            data in one place); or ``central-noise`` (the same with the noise of a pooled sum).
        epsilon: Of the whole training; infinite without clip and noise.
        seed: Of LoRA's start; draws and noise are new in every training.
    """

    task: str = "medquad"
    way: str
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        """Task, seed, epsilon and way with dots between; also the name of its file."""
        epsilon = f"{self.epsilon:g}" if math.isfinite(self.epsilon) else "none"
        return f"{self.task}.{self.seed}.{epsilon}.{self.way}"


def grid() -> list[Cell]:
    """Every cell; what is compared stands together."""
    return [
        Cell(task=name, way=way, epsilon=epsilon, seed=seed)
        for name, task in TASKS.items()
        for seed, epsilon, way in itertools.product(SEEDS, task.epsilons, task.ways)
        if math.isfinite(epsilon) or way not in {"pooled", "central-noise"}
    ]


class Grid:
    """The cells' results in one folder.

    Args:
        folder: Holds a file for each finished cell.
        data: The folder of the shared data sets.
        size: How much a cell does.
    """

    def __init__(self, folder: Path, data: Path, size: Size) -> None:
        self._folder, self._data, self._size = folder, data, size

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell found, or None.

        Raises:
            ConfigurationError: It was of another plan.
        """
        return kept_result(self._folder / f"{cell.name}.json", partial(self.plan, cell))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and evaluate one cell and keep what came of it."""
        began, load = time.monotonic(), os.getloadavg()[0]
        case = self._case(cell.task)
        facts = self.train(cell, self.plan(cell), case.sites, case.test) | {
            "cell": cell.name,
            "plan": self.plan(cell).hash().hex(),
            "seconds": round(time.monotonic() - began, 1),
            "load": round(load, 1),
        }
        write_private(self._folder / f"{cell.name}.json", json.dumps(facts).encode())
        return facts

    def tune(self, cell: Cell) -> dict[float, float]:
        """Learning rate to mean score on held-out training units, a fifth of each site's."""
        kept, held = dict[str, Records](), list[Records]()
        for name, records in self._case(cell.task).sites.items():
            order = np.random.default_rng(1).permutation(len(records.units)).tolist()
            fifth = math.ceil(len(order) / 5)
            held.append(select(records, order[:fifth]))
            kept[name] = select(records, order[fifth:])
        found = {}
        for rate in TRIED[math.isfinite(cell.epsilon)]:
            plan = self.plan(cell, rate)
            found[rate] = self.train(cell, plan, kept, merge(held))["mean"]
        return found

    def train(
        self, cell: Cell, plan: Plan, sites: Mapping[str, Records], test: Records
    ) -> dict[str, Any]:
        """What a way reaches on test records, and what it cost."""
        facts: dict[str, Any] = {}
        if cell.way == "alone":
            each = [
                self._scores(plan, train_in_one_place(plan, records), test)
                for _, records in sorted(sites.items())
            ]
            means = [float(scores.mean()) for scores in each]
            scores = np.mean(each, axis=0)
            facts = {"each": dict(zip(sorted(sites), means, strict=True))}
        elif cell.way.startswith("central"):
            noise = _noise_of_a_sum(plan, len(sites)) if cell.way == "central-noise" else None
            together = plan.rounds.normaliser * len(sites)
            step = mechanism(plan, normaliser=together, noise_multiplier=noise)
            scores = self._scores(plan, train_in_one_place(plan, pooled(sites), step=step), test)
        else:
            folder = self._folder / "runs" / cell.name
            shutil.rmtree(folder, ignore_errors=True)
            adapter, facts = federate(
                plan, dataclasses.replace(self._case(cell.task), sites=sites), folder
            )
            shutil.rmtree(folder)
            scores = self._scores(plan, adapter, test)
        return facts | {"mean": float(scores.mean()), "scores": scores.tolist()}

    def plan(self, cell: Cell, rate: float | None = None) -> Plan:
        """The example's plan with the cell's way, privacy and learning rate."""
        private, task = math.isfinite(cell.epsilon), TASKS[cell.task]
        plan, sites = self._example(cell.task), len(self._case(cell.task).sites)
        if rate is None:
            own = task.own_rates.get(cell.way, task.private_rate)
            rate = own if private else task.rate
        rounds = Rounds(
            count=min(task.private_rounds if private else task.rounds, self._size.rounds),
            spare=0,
            steps=1 if private else task.steps,
            sampling_rate=0.1,
            normaliser=self._rows(task) / sites * 0.1,
            learning_rate=rate,
            optimizer="sgd" if private else "adamw",
            deadline="10m",
        )
        scheme = "sketch" if cell.way == MIXED else cell.way
        scheme = scheme if scheme in SCHEMES else "fedavg"
        return dataclasses.replace(
            plan,
            mode="pooled" if cell.way in {"pooled", "central-noise"} else "local",
            seed=cell.seed,
            tuner=self._tuner(cell),
            rounds=rounds,
            aggregation=dataclasses.replace(plan.aggregation, scheme=scheme, update_clip=100.0),
            privacy=Privacy(epsilon=cell.epsilon, delta=1e-5, clip=0.5, records_per_unit=1),
        )

    def _tuner(self, cell: Cell) -> Tuner:
        """LoRA of rank 8, or of mixed ranks; the factor before B·A is 1."""
        tuner = self._example(cell.task).tuner
        r, ranks = 8, None
        if cell.way == MIXED:
            names = sorted(self._case(cell.task).sites)
            third = len(names) // 3
            r, ranks = 16, {name: (4, 8, 16)[min(i // third, 2)] for i, name in enumerate(names)}
        arguments = {**tuner.arguments, "r": r, "lora_alpha": r}
        return dataclasses.replace(tuner, arguments=arguments, ranks=ranks)

    @cache  # noqa: B019  # a grid lives as long as its process
    def _example(self, name: str) -> Plan:
        task = TASKS[name]
        plan = load_plan(EXAMPLES / f"{task.example}.toml")
        found = fingerprint(resolve_model(plan.model))
        split = plan.data.split
        if split is not None and task.alpha is not None:
            split = dataclasses.replace(split, alpha=task.alpha)
        return dataclasses.replace(
            plan,
            model=dataclasses.replace(plan.model, sha256=found),
            data=dataclasses.replace(plan.data, split=split),
        )

    @cache  # noqa: B019
    def _case(self, name: str) -> Case:
        """The task's sites, each with the same share of its units."""
        case = freeze_case(self._example(name), self._data / TASKS[name].data)
        rows = sum(len(records.rows) for records in case.sites.values())
        share = self._rows(TASKS[name]) / rows
        sites = {name: _part(records, share) for name, records in case.sites.items()}
        test = select(case.test, range(min(self._size.test, len(case.test.units))))
        return dataclasses.replace(case, sites=sites, test=test)

    def _rows(self, task: Task) -> int:
        return min(task.rows, self._size.rows)

    @staticmethod
    def _scores(plan: Plan, adapter: bytes, test: Records) -> Any:  # noqa: ANN401  # a float each
        found = evaluate_adapter(plan, adapter, test)
        return found.losses if plan.task.objective == "sft" else found.correct


def _noise_of_a_sum(plan: Plan, sites: int) -> float:
    """What the shares of all sites come to together, as a central step's noise multiplier."""
    share = noise_share(plan, dimension(tuned_model(plan).layout))
    bound = plan.rounds.learning_rate * plan.privacy.clip / plan.rounds.normaliser
    return share * math.sqrt(sites) / bound


def _part(records: Records, share: float) -> Records:
    """Whole units, drawn alike in every run, that hold about that share of the rows."""
    order = np.random.default_rng(0).permutation(len(records.units))
    rows = np.cumsum([len(records.units[unit]) for unit in order])
    return select(records, order[rows <= max(rows[0], share * rows[-1])].tolist())
