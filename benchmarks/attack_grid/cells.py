"""The grid's cells: hostile sites among honest ones, and files that keep what came of them."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from reporting import kept_result
from rich.console import Console

from fedward.attempt import Attempt
from fedward.client.trainer import LocalTrainer
from fedward.client.training import Trainer
from fedward.errors import RoundError
from fedward.plan import Plan, Privacy, Rounds, Split
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_gate import Gate
from fedward.private_files import write_private
from fedward.server.gate import held_out_loss
from fedward.server.store import ROUND_ENDS, Phase
from fedward.simulations.case import Case, freeze_case
from fedward.simulations.comparison import evaluate_adapter
from fedward.simulations.demo import prepare_demo
from fedward.simulations.federation import Federation
from fedward.simulations.poisoning import Attack, UnclippedAgent, hostile_trainer, victims
from fedward.tuning.records import Records, make_sites, merge, select
from fedward.tuning.tuned import tuned_model

ATTACKS: tuple[Attack, ...] = get_args(Attack)
DEFENCES = ("none", "gate-alone", "clip", "gate", "groups")
HOSTILE = {10: 1, 30: 3}
"""Sites to how many of them are hostile."""
GROUPS = {10: 3, 30: 7}
"""Sites to how many groups there are, of three to five sites; under half have a hostile one."""
SEEDS = (0,)

LOOSE, TIGHT = 100.0, 2.0
"""``update_clip`` without a defence, and with the clip as one: honest updates have 1.4 to 1.7."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a cell does.

    Args:
        test: Most patients whose notes are tested on.
        public: Patients whose notes the coordinator has for its gate, and no site.
        rounds: Rounds of four local steps.
    """

    test: int = 120
    public: int = 60
    rounds: int = 6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One federation with hostile sites, or with none.

    Args:
        sites: Key of :data:`HOSTILE`.
        attack: What the hostile ones do; ``nothing`` for none of them.
        defence: ``none`` (a clip so wide that nobody feels it), ``gate-alone`` (the gate without
            a clip), ``clip``, and with the clip ``gate`` or ``groups``.
        seed: Of split and adapter.
    """

    sites: int
    attack: str
    defence: str
    seed: int

    @property
    def name(self) -> str:
        """Sites, seed, attack and defence with dots between; also the name of its file."""
        return f"{self.sites}.{self.seed}.{self.attack}.{self.defence}"


def grid() -> list[Cell]:
    """Every cell; what is compared stands together."""
    ways = itertools.product(SEEDS, HOSTILE, ("nothing", *ATTACKS), DEFENCES)
    return [
        Cell(sites=sites, attack=attack, defence=defence, seed=seed)
        for seed, sites, attack, defence in ways
    ]


class Grid:
    """The cells' results in one folder.

    Args:
        folder: Holds a file for each finished cell.
        size: How much a cell does.
    """

    def __init__(self, folder: Path, size: Size) -> None:
        self._folder, self._size = folder, size

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell found, or None.

        Raises:
            ConfigurationError: It was of another plan.
        """
        return kept_result(self._folder / f"{cell.name}.json", partial(self.plan, cell))

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run and evaluate one cell and keep what came of it."""
        began, load, plan = time.monotonic(), os.getloadavg()[0], self.plan(cell)
        work = self._folder / "runs" / cell.name
        shutil.rmtree(work, ignore_errors=True)
        facts = _federate(cell, plan, self._sites(cell), self._public, work)
        shutil.rmtree(work)
        adapter = facts.pop("adapter")
        scores: Any = evaluate_adapter(plan, adapter, self._case.test).correct
        fooled = evaluate_adapter(plan, adapter, victims(self._case.test, plan)).accuracy
        facts |= {"mean": float(np.mean(scores)), "backdoor": fooled}
        facts |= {
            "cell": cell.name,
            "plan": plan.hash().hex(),
            "seconds": round(time.monotonic() - began, 1),
            "load": round(load, 1),
        }
        write_private(self._folder / f"{cell.name}.json", json.dumps(facts).encode())
        return facts

    def plan(self, cell: Cell) -> Plan:
        """The example's plan with the cell's sites and defence, without privacy."""
        tight, case = cell.defence not in {"none", "gate-alone"}, self._case
        return dataclasses.replace(
            case.plan,
            name="attacked",
            seed=cell.seed,
            model=dataclasses.replace(case.plan.model, quantize="none"),
            data=dataclasses.replace(
                case.plan.data,
                site=None,
                split=Split(by="label", alpha=10.0, sites=cell.sites, seed=cell.seed),
            ),
            rounds=Rounds(
                count=self._size.rounds,
                spare=2,
                steps=4,
                sampling_rate=0.1,
                normaliser=0.1 * len(self._parts[0].units) / cell.sites,
                learning_rate=0.01,
                deadline="10m",
            ),
            cohort=Cohort(minimum=3, groups=GROUPS[cell.sites] if cell.defence == "groups" else 1),
            aggregation=Aggregation(scheme="fedavg", update_clip=TIGHT if tight else LOOSE),
            privacy=Privacy(epsilon=math.inf, delta=1e-5, clip=0.5, records_per_unit=2),
            gate=Gate(data="public.jsonl", refusals=1000)
            if cell.defence.startswith("gate")
            else None,
        )

    @cached_property
    def _case(self) -> Case:
        """The demo's model and notes."""
        plan, data, _ = prepare_demo(0, Console(stderr=True))
        case = freeze_case(plan, data)
        units = range(min(self._size.test, len(case.test.units)))
        return dataclasses.replace(case, test=select(case.test, units))

    @cached_property
    def _parts(self) -> tuple[Records, Records]:
        """Training records that the sites share, and those that the coordinator has."""
        everything = merge([self._case.sites[name] for name in sorted(self._case.sites)])
        order = np.random.default_rng(0).permutation(len(everything.units)).tolist()
        public = self._size.public
        return select(everything, order[public:]), select(everything, order[:public])

    def _sites(self, cell: Cell) -> dict[str, Records]:
        return make_sites(self._parts[0], self.plan(cell).data)

    @property
    def _public(self) -> Records:
        return self._parts[1]


def _federate(
    cell: Cell, plan: Plan, sites: Mapping[str, Records], public: Records, folder: Path
) -> dict[str, Any]:
    """Run one federation; what it did, and its adapter."""
    folder.mkdir(parents=True)
    tuned, names = tuned_model(plan), sorted(sites)
    hostile = [] if cell.attack == "nothing" else names[-HOSTILE[cell.sites] :]
    trainers: dict[str, Trainer] = {name: LocalTrainer(records) for name, records in sites.items()}
    for attack in ATTACKS:
        if attack == cell.attack:
            trainers |= {name: hostile_trainer(attack, sites[name], plan) for name in hostile}
    federation = Federation(
        folder=folder,
        plan=plan,
        start=tuned.start,
        layout=tuned.layout,
        trainers=trainers,
        gate=held_out_loss(plan, public) if plan.gate else None,
        agents=dict.fromkeys(hostile, UnclippedAgent) if cell.attack == "past-the-clip" else None,
    )
    ends, missed, adapter = Counter[str](), 0, tuned.start

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Any) -> None:  # noqa: ANN401
        nonlocal adapter, missed
        if phase in ROUND_ENDS | {Phase.ABORTED}:
            ends[phase.value] += 1
        if phase in ROUND_ENDS:
            there = {names[each] for each in facts["cohort"]}
            missed += len(set(names) - set(hostile) - there)
            adapter = (folder / "coordinator" / "blobs" / str(facts["adapter"])).read_bytes()

    try:
        federation.run(observe)
        ended = ""
    except RoundError as error:
        ended = str(error)
    return {
        "adapter": adapter,
        "ended": ended,
        "refused": ends[Phase.REFUSED],
        "aborted": ends[Phase.ABORTED],
        "rounds": ends[Phase.COMMITTED],
        "missed": missed,
    }
