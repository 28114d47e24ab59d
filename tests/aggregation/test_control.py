"""The sum of control variates follows from the mean update, and stays the sites' own sum."""

import dataclasses

import numpy as np
import pytest

from fedward.aggregation.control import CONTROL, next_control, shared_control, split_control
from fedward.aggregation.schemes import Vector
from fedward.errors import ProtocolError
from fedward.identity import Identity, Member, Roster
from fedward.plan import Model, Plan, Rounds
from fedward.plan_aggregation import Aggregation, Cohort

WEIGHTS = {"0": 2.0, "1": 1.0, "2": 1.5, "3": 1.0, "4": 1.0}
PLAN = Plan(
    name="control",
    model=Model(path="m"),
    rounds=Rounds(
        count=9,
        steps=4,
        sampling_rate=1.0,
        normaliser=1.0,
        learning_rate=0.25,
        optimizer="sgd",
        scaffold=True,
    ),
)
WEIGHED = dataclasses.replace(
    PLAN,
    aggregation=Aggregation(scheme="fedavg", weights=WEIGHTS),
    cohort=Cohort(minimum=4, colluders=1),
)
LENGTH = 1.0  # 4 steps of 0.25


def roster(count: int) -> Roster:
    key = Identity(bytes(32)).public_key
    members = tuple(
        Member(id=i, name=str(i), public_key=key[:-1] + bytes([i])) for i in range(count)
    )
    return Roster(epoch=1, coordinator=key, members=members)


@pytest.mark.parametrize("plan", [PLAN, WEIGHED], ids=["alike", "weighed"])
def test_it_is_the_sum_of_what_sites_have_whoever_takes_part(plan):
    """Sites that come later bring a zero. The control: it is not the sum of those who took part."""
    draw = np.random.default_rng(0)
    weights = plan.aggregation.weights or dict.fromkeys(WEIGHTS, 1.0)
    own, control = {i: np.zeros(6) for i in range(5)}, None
    for members, cohort in ((4, (0, 1, 2)), (4, (1, 2, 3)), (5, (0, 1, 2, 3)), (5, (2, 3, 4))):
        among = roster(members)
        shared = 0.0 if control is None else shared_control(control, plan, among)
        updates = {i: draw.normal(0, 1, 6) for i in cohort}
        for i in cohort:
            own[i] = own[i] - shared - updates[i] / LENGTH
        whole = sum(weights[str(i)] for i in cohort)
        mean = np.sum([weights[str(i)] * updates[i] for i in cohort], axis=0) / whole
        control = next_control(control, mean, plan, among, cohort)[CONTROL]
        total = sum(weights[str(i)] * own[i] for i in range(members))
        np.testing.assert_allclose(control, total, atol=1e-5)
        mean_of_all = total / sum(weights[str(i)] for i in range(members))
        np.testing.assert_allclose(shared_control(control, plan, among), mean_of_all, atol=1e-5)
    assert np.abs(control - sum(weights[str(i)] * own[i] for i in cohort)).max() > 0.1


def test_it_is_float32_and_the_same_for_everybody():
    draw = np.random.default_rng(1)
    control: Vector = draw.normal(0, 1, 1000).astype(np.float32)
    mean = draw.normal(0, 1, 1000)
    one, other = (next_control(control, mean, PLAN, roster(3), each)[CONTROL] for each in (
        (0, 1, 2), (2, 1, 0)))  # fmt: skip
    assert one.dtype == np.float32
    assert one.tobytes() == other.tobytes()


def test_a_plan_without_has_none():
    plan = dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, scaffold=False))
    assert next_control(None, np.ones(3), plan, roster(3), (0, 1, 2)) == {}


def test_another_shape_is_refused():
    wrong = np.zeros(4, dtype=np.float32)
    with pytest.raises(ProtocolError, match="control variate of shape"):
        next_control(wrong, np.ones(3), PLAN, roster(3), (0, 1, 2))


def test_a_server_optimizers_moments_are_apart():
    first, control = np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.float32)
    found, rest = split_control({"first": first, CONTROL: control})
    assert found is control
    assert rest.keys() == {"first"}
    assert split_control({"first": first})[0] is None
