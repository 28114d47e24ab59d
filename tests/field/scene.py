"""What the field test works on: plan, notes, secret keys, folders, the run without a fault."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Message
from flwr.clientapp import ClientApp

from fedward.attempt import Attempt
from fedward.canonical import Json
from fedward.client.agent import Agent
from fedward.client.app import client_app
from fedward.client.memory import SiteMemory
from fedward.client.policy import Policy
from fedward.client.site_folder import SiteFolder
from fedward.client.trainer import LocalTrainer
from fedward.identity import Roster
from fedward.plan import Aggregation, Cohort, Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.privacy.ledger import Ledger
from fedward.private_files import write_private
from fedward.server.coordinator_folder import CoordinatorFolder
from fedward.server.rounds import RoundEngine
from fedward.server.store import Phase, RunStore
from fedward.simulations.grid import FIRST_NODE, LocalGrid
from fedward.simulations.notes import SERVICES, generate, vocabulary
from fedward.tuning.records import Records, group
from fedward.tuning.small import build_llama, build_tokenizer
from fedward.tuning.vector import Layout

HOSPITALS = ("northgate", "harbour", "valley", "summit")
RUN = "field"
ROUNDS = 6
PATIENTS = 24
"""Patients of each hospital that are trained on: the test is of the wire, not of the model."""

EPSILON, DELTA = 8.0, 1e-5


def secret(name: str, purpose: str) -> bytes:
    """The fixed secret key of one site's noise or rounding."""
    return f"{purpose} {name}".encode().ljust(32, b"\0")[:32]


def make_base(folder: Path) -> Path:
    """A Llama of one layer."""
    if not folder.exists():
        tokenizer = build_tokenizer(vocabulary(), 600)
        build_llama(folder, tokenizer, hidden=32, layers=1, heads=2, max_length=64)
    return folder


def make_plan(base: Path) -> Plan:
    """Six rounds over the demo's notes, as a file would have them: the digest is not filled in."""
    return Plan(
        name="field",
        model=Model(path=str(base)),
        tuner=Tuner(arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}),
        task=Task(objective="classify", labels=SERVICES, max_length=40),
        data=Data(template="{text} Service:", unit="patient"),
        rounds=Rounds(
            count=ROUNDS,
            spare=3,
            steps=3,
            sampling_rate=1.0,  # at this rate the noise is found at once
            normaliser=24.0,
            learning_rate=0.02,
            deadline="10m",
        ),
        cohort=Cohort(minimum=3, colluders=1),
        aggregation=Aggregation(update_clip=1.0),
        privacy=Privacy(epsilon=EPSILON, delta=DELTA, clip=0.2, records_per_unit=2),
    )


def write_plan(plan: Plan, path: Path) -> Path:
    """The plan as the TOML that ``fedward run start`` reads."""
    arguments = plan.tuner.arguments
    path.write_text(
        f"""name = "{plan.name}"
[model]
path = "{plan.model.path}"
[tuner]
r = {arguments["r"]}
lora_alpha = {arguments["lora_alpha"]}
target_modules = {json.dumps(arguments["target_modules"])}
[task]
objective = "classify"
max_length = {plan.task.max_length}
labels = {json.dumps(plan.task.labels)}
[data]
template = "{plan.data.template}"
unit = "patient"
[rounds]
count = {plan.rounds.count}
spare = {plan.rounds.spare}
steps = {plan.rounds.steps}
sampling_rate = {plan.rounds.sampling_rate}
normaliser = {plan.rounds.normaliser}
learning_rate = {plan.rounds.learning_rate}
deadline = "{plan.rounds.deadline}"
[cohort]
minimum = {plan.cohort.minimum}
colluders = {plan.cohort.colluders}
[aggregation]
update_clip = {plan.aggregation.update_clip}
[privacy]
epsilon = {plan.privacy.epsilon}
delta = {plan.privacy.delta}
clip = {plan.privacy.clip}
records_per_unit = {plan.privacy.records_per_unit}
""",
        encoding="utf-8",
    )
    return path


def records_of(hospital: str) -> Records:
    """The first patients of one hospital of the demo."""
    whole = group(generate(0).train[hospital], "patient")
    rows = [row for row in whole.rows if row["patient"] in _first(whole)]
    return group(rows, "patient")


def _first(records: Records) -> set[str]:
    units = records.units[:PATIENTS]
    return {str(records.rows[unit[0]]["patient"]) for unit in units}


def make_trainer(hospital: str) -> LocalTrainer:
    """The trainer of one hospital with its fixed key."""
    return LocalTrainer(records_of(hospital), key=secret(hospital, "noise"))


def make_policy(digest: str) -> Policy:
    """A policy that allows the plan, and adopts what the coordinator signs."""
    return Policy(
        max_epsilon=EPSILON,
        delta=DELTA,
        max_rounds=ROUNDS + 3,
        models=(digest,),
        datasets=("notes",),
        minimum=3,
        colluders=1,
        automatic=True,
        automatic_roster=True,
    )


def write_policy(folder: SiteFolder, digest: str) -> None:
    """``policy.toml`` of a site."""
    policy = make_policy(digest)
    text = (
        f"max_epsilon = {policy.max_epsilon}\n"
        f"delta = {policy.delta}\n"
        f"max_rounds = {policy.max_rounds}\n"
        f'models = ["{digest}"]\n'
        'datasets = ["notes"]\n'
        f"minimum = {policy.minimum}\n"
        f"colluders = {policy.colluders}\n"
        "automatic = true\n"
        "automatic_roster = true\n"
    )
    write_private(folder.policy, text.encode())


def undisturbed(
    folder: Path,
    *,
    coordinator: CoordinatorFolder,
    sites: Mapping[str, SiteFolder],
    roster: Roster,
    plan: Plan,
    start: bytes,
    layout: Layout,
    missing: tuple[int, str],
) -> list[str]:
    """The same run in this process over the simulation's grid, without a fault.

    Args:
        folder: Where its books go.
        coordinator: Lends its key.
        sites: Hospital → folder; each lends its key.
        roster: As every site has pinned it.
        plan: Frozen.
        start: The first adapter.
        layout: The trainable tensors.
        missing: A round, and the hospital that does not take part in it.

    Returns:
        The digest of the adapter after each round.
    """
    ids = {member.name: member.id for member in roster.members}
    nodes = {number: number + FIRST_NODE for number in ids.values()}
    policy = make_policy(str(plan.model.sha256))

    def build(name: str) -> Callable[[], ClientApp]:
        identity = sites[name].identity()

        def make() -> ClientApp:
            for file in held.pop(name, ()):
                file.close()
            ledger = Ledger.open(folder / f"{name}.ledger", identity, epsilon=EPSILON, delta=DELTA)
            memory = SiteMemory.open(folder / f"{name}.memory", identity, ledger)
            held[name] = (ledger, memory)
            return client_app(
                Agent(
                    site=ids[name],
                    identity=identity,
                    roster=roster,
                    policy=policy,
                    ledger=ledger,
                    memory=memory,
                    trainer=trainers[name],
                    key=secret(name, "rounding"),
                )
            )

        return make

    def fault(node: int, message: Message) -> bool:
        number, name = missing
        return (node, message.metadata.group_id) == (nodes[ids[name]], str(number))

    adapters = list[str]()

    def observe(attempt: Attempt, phase: Phase, site: int, facts: Json) -> None:
        if phase is Phase.COMMITTED and isinstance(facts, Mapping):
            adapters.append(str(facts["adapter"]))
            grid.revive(nodes[ids[missing[1]]])

    held = dict[str, tuple[Ledger, SiteMemory]]()
    trainers = {name: make_trainer(name) for name in ids}
    grid = LocalGrid({nodes[ids[name]]: build(name) for name in ids}, fault=fault)
    store = RunStore(folder)
    RoundEngine(
        plan=plan,
        run=RUN,
        identity=coordinator.identity(),
        roster=roster,
        nodes=nodes,
        store=store,
        start=start,
        layout=layout,
        observer=observe,
    ).run(grid)
    store.close()
    grid.close()
    for files in held.values():
        for file in files:
            file.close()
    return adapters


def spent_at_most(plan: Plan) -> float:
    """The epsilon that no ledger may pass."""
    return math.nextafter(plan.privacy.epsilon, math.inf)


def frozen_like(plan: Plan, digest: str) -> Plan:
    """The plan with its model's digest."""
    return dataclasses.replace(plan, model=dataclasses.replace(plan.model, sha256=digest))
