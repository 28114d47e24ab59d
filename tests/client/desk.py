"""A coordinator's desk: honest letters to real agents, and any other that a test makes up."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedward.aggregation.control import next_control, split_control
from fedward.aggregation.planned import planned_session
from fedward.aggregation.published import SumResult
from fedward.aggregation.server_optimizer import next_state
from fedward.aggregation.tally import Tally
from fedward.aggregation.transcript import task_hash
from fedward.attempt import Attempt
from fedward.canonical import canonical_json
from fedward.client.agent import Agent
from fedward.client.memory import SiteMemory
from fedward.client.policy import Policy
from fedward.client.training import Scores, Trainer, TrainRequest, TrainResult
from fedward.errors import DataError, ModelError, SiteCode
from fedward.identity import Identity, Member, Roster
from fedward.messages import Letter, open_letter, seal_letter
from fedward.plan import Model, Plan, Privacy, Rounds
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.ledger import Ledger
from fedward.tuning.vector import (
    Layout,
    dimension,
    layout_to_bytes,
    moments_of,
    replace_vector,
    vector_of,
)

LAYOUT: Layout = (("a", (4,)), ("b", (2, 3)))
START = replace_vector(
    b"\x02\0\0\0\0\0\0\0{}", LAYOUT, np.arange(dimension(LAYOUT), dtype=np.float32)
)
PLAN = Plan(
    name="desk",
    model=Model(path="m", sha256="a" * 64),
    rounds=Rounds(count=3, spare=1, steps=1, sampling_rate=1.0, normaliser=1.0, learning_rate=1.0),
    privacy=Privacy(epsilon=8.0, delta=1e-5),
    cohort=Cohort(minimum=3, colluders=0),
    aggregation=Aggregation(scheme="fedavg"),
)
POLICY = Policy(
    max_epsilon=8.0, delta=1e-5, max_rounds=4, models=("a" * 64,), minimum=3, automatic=True
)
RUN = "r"
SITES = 3


class Scripted:
    """A trainer whose updates are numbers of the site and the call; it may be told to fail."""

    def __init__(self, site: int) -> None:
        self.site, self.requests = site, list[TrainRequest]()
        self.error: Exception | None = None

    def prepare(self, request: TrainRequest) -> None:
        if vector_of(request.adapter, request.layout).shape != (dimension(LAYOUT),):
            raise ModelError("the adapter is not this model's")

    def train(self, request: TrainRequest) -> TrainResult:
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        generator = np.random.default_rng([self.site, len(self.requests)])
        update = generator.normal(0, 0.1, dimension(request.layout)).astype(np.float32)
        return TrainResult(update=update, slots=np.zeros(0))

    def evaluate(self, plan: Plan, adapter: bytes, run: str) -> Scores:
        raise self.error or DataError("no held-out records")


class Desk:
    """Sites with real folders, and the coordinator's key."""

    def __init__(
        self, folder: Path, *, sites: int = SITES, policy: Policy = POLICY, plan: Plan = PLAN
    ) -> None:
        self.folder, self.policy, self.plan = folder, policy, plan
        self.identity = Identity(bytes([9]) * 32)
        self.keys = [Identity(bytes([site + 1 + (site >= 8)]) * 32) for site in range(sites)]
        self.roster = Roster(
            epoch=1,
            coordinator=self.identity.public_key,
            members=tuple(
                Member(id=site, name=f"site {site}", public_key=key.public_key)
                for site, key in enumerate(self.keys)
            ),
        )
        self.trainers = [Scripted(site) for site in range(sites)]
        self.files: dict[int, tuple[Ledger, SiteMemory]] = {}
        self.agents = {site: self.agent(site) for site in range(sites)}
        self.adapter, self.previous = START, dict[str, bytes]()

    def agent(self, site: int, trainer: Trainer | None = None) -> Agent:
        """A site's agent, started from its folder."""
        for file in self.files.pop(site, ()):
            file.close()
        folder, key = self.folder / str(site), self.keys[site]
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger.open(
            folder / "ledger.jsonl", key, epsilon=self.policy.max_epsilon, delta=self.policy.delta
        )
        memory = SiteMemory.open(folder / "memory.jsonl", key, ledger)
        self.files[site] = (ledger, memory)
        return Agent(
            site=site,
            identity=key,
            roster=self.roster,
            policy=self.policy,
            ledger=ledger,
            memory=memory,
            trainer=trainer or self.trainers[site],
            key=bytes([site]) * 32,
        )

    def restart(self, site: int) -> None:
        """The site's process dies and starts again."""
        self.agents[site] = self.agent(site)

    def ledger(self, site: int) -> Ledger:
        return self.files[site][0]

    def close(self) -> None:
        for files in self.files.values():
            for file in files:
                file.close()

    def letter(
        self, action: str, attempt: Attempt, site: int, parts: Mapping[str, bytes]
    ) -> RecordDict:
        """A letter with the coordinator's true signature."""
        letter = Letter(action=action, attempt=attempt, site=site, parts=parts)
        return seal_letter(letter, self.identity, "coordinator")

    def ask(
        self, action: str, attempt: Attempt, site: int, parts: Mapping[str, bytes]
    ) -> tuple[SiteCode | None, Letter]:
        """Send a letter to its site and open the answer."""
        sealed = self.agents[site].answer(self.letter(action, attempt, site, parts))
        answer = open_letter(sealed, self.roster.key(site), "site")
        assert (answer.action, answer.attempt, answer.site) == (action, attempt, site)
        return answer.code, answer

    def task_parts(self, plan: Plan | None = None, **changes: bytes) -> dict[str, bytes]:
        """The parts of the open round's task, some replaced."""
        parts = {
            "plan": (plan or self.plan).to_json(),
            "adapter": self.adapter,
            "layout": layout_to_bytes(LAYOUT),
            **self.previous,
        }
        return {**parts, **changes}

    def task(self, attempt: Attempt, site: int, **changes: Any) -> SiteCode | None:
        """Send the task of the open round."""
        return self.ask("task", attempt, site, self.task_parts(**changes))[0]

    def tally(self, attempt: Attempt) -> Tally:
        hashed = task_hash(self.adapter, self.plan.hash(), self.plan.aggregation.scheme)
        parameters = planned_session(
            self.plan, self.roster, attempt, task_hash=hashed, dimension=dimension(LAYOUT)
        )
        return Tally(parameters=parameters, roster=self.roster)

    def exchange(
        self, tally: Tally, attempt: Attempt, action: str, todo: Mapping[int, bytes]
    ) -> None:
        """One honest exchange with every site."""
        for site, message in todo.items():
            code, answer = self.ask(action, attempt, site, {"message": message})
            assert code is SiteCode.DONE, (action, site, code)
            if action == "masked":
                words = np.frombuffer(answer.part("words"), dtype=np.uint32)
                tally.add_masked(site, answer.part("message"), words)
            else:
                getattr(tally, f"add_{action}")(site, answer.part("message"))

    def session(self, attempt: Attempt, *, until: str = "") -> tuple[Tally, Mapping[int, bytes]]:
        """The exchanges before ``until`` (all of them if left out); the next one's messages."""
        tally = self.tally(attempt)
        todo: Mapping[int, bytes] = dict.fromkeys(range(SITES), tally.request())
        for action, close in (
            ("hello", tally.close_hellos),
            ("shares", tally.close_shares),
            ("masked", tally.close_masked),
            ("consistency", tally.close_consistency),
            ("unmask", None),
        ):
            if action == until:
                break
            self.exchange(tally, attempt, action, todo)
            todo = close() if close else {}
        return tally, todo

    def commit(self, result: SumResult) -> None:
        """Make the next round's adapter, honestly."""
        start = vector_of(self.adapter, LAYOUT)
        control, moments = split_control(moments_of(self.adapter))
        vector, moments = next_state(start, moments, result.mean, self.plan.aggregation)
        moments |= next_control(control, result.mean, self.plan, self.roster, result.cohort)
        self.adapter = replace_vector(self.adapter, LAYOUT, vector, moments)
        self.previous = {
            "sum": result.words.tobytes(),
            "cohort": canonical_json(list(result.cohort)),
            "attempt": canonical_json(result.parameters.attempt.attempt),
        }

    def round(self, number: int, *, attempt: int = 1) -> SumResult:
        """One honest round with every site."""
        now = Attempt(run=RUN, round=number, attempt=attempt)
        for site in range(SITES):
            assert self.task(now, site) is SiteCode.READY
        result = self.session(now)[0].result()
        self.commit(result)
        return result


def replaced(records: RecordDict, **fields: bytes) -> RecordDict:
    """A letter's records with header or signature replaced."""
    for name, value in fields.items():
        records.config_records["letter"][name] = value
    return records


def other_plan() -> Plan:
    """The plan with one more step a round: allowed by the policy, but another plan."""
    return dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, learning_rate=2.0))
