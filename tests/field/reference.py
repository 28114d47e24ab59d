"""The field test's run once more in one process over the simulation's grid: no wire, no kill."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedward.aggregation.packing import pack, unpack, weighed
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import Rule
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.agent import Agent
from fedward.client.app import client_app
from fedward.client.data_sources import DataSource, model_folder
from fedward.client.memory import SiteMemory
from fedward.client.site_folder import SiteFolder
from fedward.client.site_records import site_records
from fedward.client.trainer import LocalTrainer
from fedward.client.training import TrainRequest
from fedward.identity import Identity, Roster
from fedward.plan import Plan
from fedward.privacy.ledger import Ledger
from fedward.privacy.noise import SecureStream
from fedward.server.rounds import RoundEngine
from fedward.server.store import Phase, RunStore
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from fedward.tuning.vector import (
    Layout,
    moments_of,
    replace_vector,
    vector_of,
    without_moments,
)
from tests.field import scene


class _Crash(Exception):
    """The engine's process is gone."""


@dataclass
class Reference:
    """A federation with the field's keys, notes and roster, and books of its own.

    Args:
        folder: Where its books go.
        identity: The coordinator's.
        roster: As every site has pinned it.
        sites: Hospital → folder; each lends its key.
        sources: Hospital → its notes.
        plan: Frozen.
        start: The first adapter.
        layout: The trainable tensors.
    """

    folder: Path
    identity: Identity
    roster: Roster
    sites: Mapping[str, SiteFolder]
    sources: Mapping[str, DataSource]
    plan: Plan
    start: bytes
    layout: Layout
    held: dict[str, tuple[Ledger, SiteMemory]] = field(default_factory=dict)

    def run(self, *, missing: tuple[int, str], lost: int) -> list[str]:
        """The digest of the adapter after each round.

        Args:
            missing: A round, and the hospital that does not take part in it.
            lost: A round that the engine forgets once every masked update of its first attempt is
                in.
        """
        ids = {member.name: member.id for member in self.roster.members}
        nodes = {number: number + FIRST_NODE for number in ids.values()}
        away, adapters = nodes[ids[missing[1]]], list[str]()

        def fault(node: int, message: Message) -> bool:
            return (node, message.metadata.group_id) == (away, str(missing[0]))

        def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
            if phase is Phase.COMMITTED and isinstance(facts, Mapping):
                adapters.append(str(facts["adapter"]))
                grid.revive(away)
            if (phase, attempt.order, site) == (Phase.MASKED, (lost, 1, 1), max(ids.values())):
                raise _Crash

        grid = LocalGrid({nodes[ids[name]]: self.site(name) for name in ids}, fault=fault)
        store = RunStore(self.folder)
        engine = RoundEngine(
            plan=self.plan,
            run=scene.RUN,
            identity=self.identity,
            roster=self.roster,
            nodes=nodes,
            store=store,
            start=self.start,
            layout=self.layout,
            observer=observe,
        )
        try:
            engine.run(grid)
        except _Crash:
            engine.run(grid)
        store.close()
        grid.close()
        for name in list(self.held):
            self.close(name)
        return adapters

    def site(self, name: str) -> Callable[[], ClientApp]:
        """What makes one hospital's app, again after it was killed."""
        identity = self.sites[name].identity()
        (number,) = (member.id for member in self.roster.members if member.name == name)
        policy = scene.make_policy(str(self.plan.model.sha256))
        trainer = fixed_trainer(self.sites[name], self.sources[name], self.plan, name)

        def make() -> ClientApp:
            self.close(name)
            books, cap = self.folder / name, policy.max_epsilon
            books.mkdir(exist_ok=True)
            ledger = Ledger.open(books / "ledger", identity, epsilon=cap, delta=policy.delta)
            memory = SiteMemory.open(books / "memory", identity, ledger)
            self.held[name] = (ledger, memory)
            return client_app(
                Agent(
                    site=number,
                    identity=identity,
                    roster=self.roster,
                    policy=policy,
                    ledger=ledger,
                    memory=memory,
                    trainer=trainer,
                    key=scene.secret(name, "rounding"),
                )
            )

        return make

    def close(self, name: str) -> None:
        """Let go of a hospital's books."""
        for file in self.held.pop(name, ()):
            file.close()


def fixed_trainer(folder: SiteFolder, source: DataSource, plan: Plan, name: str) -> LocalTrainer:
    """The trainer of one hospital with its fixed key, as its train-service makes it."""
    config = folder.config()
    records, held_out = site_records(source, plan, held_out=config.held_out)
    return LocalTrainer(
        records,
        held_out=held_out,
        key=scene.secret(name, "noise"),
        physical_batch=config.physical_batch,
        model=model_folder(folder, plan),
    )


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a round makes of an adapter, in plain arithmetic: no session, no mask, no engine.

    Args:
        plan: Frozen.
        layout: The trainable tensors.
        trainers: Hospital → its trainer with the fixed key.
    """

    plan: Plan
    layout: Layout
    trainers: Mapping[str, LocalTrainer]

    def next(
        self, roster: Roster, attempt: Attempt, draws: Mapping[str, int], adapter: bytes
    ) -> bytes:
        """The adapter after a round.

        Args:
            roster: Of that round.
            attempt: The one that was committed.
            draws: Hospital of the cohort → how many updates of the round it had spent before.
            adapter: Before the round.
        """
        plan, ids = self.plan, {member.name: member.id for member in roster.members}
        rule = Rule(settings=plan.aggregation, layout=self.layout, attempt=attempt)
        task = task_hash(adapter, plan.hash(), plan.aggregation.scheme)
        parameters = planned_session(plan, roster, attempt, task_hash=task, dimension=rule.words)
        total = np.zeros(parameters.words, dtype=parameters.grid.dtype)
        for name, draw in draws.items():
            request = TrainRequest(
                plan=plan,
                attempt=attempt,
                draw=draw,
                adapter=without_moments(adapter),
                layout=self.layout,
            )
            result = self.trainers[name].train(request)
            place = (attempt.run, f"{attempt.round}/{attempt.session}/{draw}", task)
            stream = SecureStream(scene.secret(name, "rounding")).child("rounding", *place)
            update = weighed(rule.to_send(result.update), parameters, ids[name])
            total += pack(update, result.slots, parameters, stream)
        mean = unpack(total, parameters)[0] / parameters.divisor([ids[name] for name in draws])
        vector, moments = rule.advance(vector_of(adapter, rule.trained), moments_of(adapter), mean)
        return replace_vector(adapter, rule.trained, vector, moments)
