"""What stays the same in every run of the laboratory: plan, policy, keys and the first adapter."""

import numpy as np

from fedward.client.policy import Policy
from fedward.identity import Identity, Member, Roster
from fedward.plan import Data, Model, Plan, Privacy, Rounds
from fedward.plan_aggregation import Cohort
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
