"""What the field test works on: plan, notes, secret keys, folders, the run without a fault."""

import json
from pathlib import Path

from fedward.client.policy import Policy
from fedward.client.site_folder import SiteFolder
from fedward.plan import Data, Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.simulations.notes import SERVICES, vocabulary
from fedward.tuning.small import build_llama, build_tokenizer

HOSPITALS = ("northgate", "harbour", "valley", "summit")
RUN = "field"
ROUNDS, SPARE = 8, 3
MOST_ROUNDS = ROUNDS + SPARE
PATIENTS = 24
"""Patients of each hospital that are trained on: the test is of the wire, not of the model."""

EPSILON, DELTA = 8.0, 1e-5
MAX_EPSILON = 5 * EPSILON
"""The policies' cap, for the runs that look for leaks as well."""


def secret(name: str, purpose: str) -> bytes:
    """The fixed secret key of one site's noise or rounding."""
    return f"{purpose} {name}".encode().ljust(32, b"\0")[:32]


def make_base(folder: Path, hidden: int = 32) -> Path:
    """A Llama of one layer."""
    if not folder.exists():
        tokenizer = build_tokenizer(vocabulary(), 600)
        build_llama(folder, tokenizer, hidden=hidden, layers=1, heads=2, max_length=64)
    return folder


def make_plan(base: Path) -> Plan:
    """Eight rounds over the demo's notes, as a file would have them: without the digest."""
    return Plan(
        name="field",
        model=Model(path=str(base)),
        tuner=Tuner(arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}),
        task=Task(objective="classify", labels=SERVICES, max_length=40),
        data=Data(template="{text} Service:", unit="patient"),
        rounds=Rounds(
            count=ROUNDS,
            spare=SPARE,
            steps=3,
            sampling_rate=1.0,  # at this rate the noise is found at once
            normaliser=24.0,
            learning_rate=0.02,
            deadline="10m",
        ),
        cohort=Cohort(minimum=3, colluders=1),
        aggregation=Aggregation(scheme="fedavg", update_clip=1.0),
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
scheme = "{plan.aggregation.scheme}"
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


def masks_of(site: Path) -> Path:
    """Where an agent notes its mask streams (:func:`tests.field.evidence.mark`)."""
    return site.with_name(f"{site.name}.masks")


def draws_of(site: Path) -> Path:
    """Where a trainer notes its noise streams; it may write nowhere else."""
    return SiteFolder(root=site).cache / "draws"


def make_policy(digest: str, rounds: int = MOST_ROUNDS) -> Policy:
    """A policy that allows every run of the test, and adopts what the coordinator signs."""
    return Policy(
        max_epsilon=MAX_EPSILON,
        delta=DELTA,
        max_rounds=rounds,
        models=(digest,),
        datasets=("notes",),
        minimum=3,
        colluders=1,
        automatic=True,
        automatic_roster=True,
    )
