"""What stays the same in every run of the laboratory: plan, policy, keys and the first adapter."""

from dataclasses import replace

import numpy as np

from fedward.aggregation.rules import Rule
from fedward.attempt import Attempt
from fedward.client.policy import Policy
from fedward.identity import Identity, Member, Roster
from fedward.plan import Data, Model, Plan, Privacy, Rounds
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.simulations.faults.schedule import SITES
from fedward.tuning.vector import Layout, dimension, replace_vector

RUN = "laboratory"

_DIGEST = "a" * 64


def make_plan(count: int = 2, spare: int = 2) -> Plan:
    """The laboratory's plan with so many rounds, and so many lost ones that may be repeated."""
    return Plan(
        name="laboratory",
        model=Model(path="none", sha256=_DIGEST),
        data=Data(unit="patient"),
        rounds=Rounds(
            count=count,
            spare=spare,
            steps=1,
            sampling_rate=1.0,
            normaliser=1.0,
            learning_rate=1.0,
            deadline="10s",
        ),
        cohort=Cohort(minimum=3, colluders=1),
        aggregation=Aggregation(scheme="fedavg"),
        privacy=Privacy(epsilon=8.0, delta=1e-5),
    )


PLAN = make_plan()
POLICY = Policy(
    max_epsilon=8.0,
    delta=1e-5,
    max_rounds=1000,
    models=(_DIGEST,),
    minimum=3,
    colluders=1,
    automatic=True,
)
LAYOUT: Layout = (("a", (4,)), ("b", (2, 3)))
START = replace_vector(
    b"\x02\0\0\0\0\0\0\0{}", LAYOUT, np.arange(dimension(LAYOUT), dtype=np.float32)
)
_PAIR: Layout = (("head", (3,)), ("x.lora_A.weight", (2, 5)), ("x.lora_B.weight", (6, 2)))


def layout_of(plan: Plan) -> Layout:
    """The trained tensors of a run: under ``sketch`` there is a LoRA layer among them."""
    return _PAIR if plan.aggregation.scheme == "sketch" else LAYOUT


def start_of(plan: Plan) -> bytes:
    """The first adapter of a run."""
    if (layout := layout_of(plan)) is LAYOUT:
        return START
    first = np.linspace(-1, 1, dimension(layout), dtype=np.float32)
    return replace_vector(b"\x02\0\0\0\0\0\0\0{}", layout, first)


def paid_by(plan: Plan, attempt: Attempt) -> Attempt:
    """The attempt whose reservation pays for an input: a second pass has the first one's."""
    rule = Rule(settings=plan.aggregation, layout=layout_of(plan), attempt=attempt)
    return replace(attempt, session=attempt.session - 1) if rule.again else attempt


COORDINATOR_KEY = Identity(bytes([99]) * 32)
SITE_KEYS = tuple(Identity(bytes([site + 1]) * 32) for site in range(SITES))
ROSTER = Roster(
    epoch=1,
    coordinator=COORDINATOR_KEY.public_key,
    members=tuple(
        Member(id=site, name=f"site-{site}", public_key=key.public_key)
        for site, key in enumerate(SITE_KEYS)
    ),
)


def key_of(site: int) -> bytes:
    """The secret key of a site's noise and rounding."""
    return bytes([site + 65]) * 32
