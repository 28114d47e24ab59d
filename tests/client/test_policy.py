"""The site's word is the last, and it says all of its reasons at once."""

import dataclasses
import math

import pytest

from fedward.client.policy import Policy, load_policy
from fedward.errors import ConfigurationError, InvalidValue, PolicyRefusal
from fedward.plan import Cohort, Model, Plan, Privacy, Rounds

PLAN = Plan(
    name="p",
    model=Model(path="m", sha256="a" * 64),
    rounds=Rounds(count=4, spare=1, steps=1, sampling_rate=0.1, normaliser=1, learning_rate=1),
    privacy=Privacy(epsilon=2.0, delta=1e-6),
    cohort=Cohort(minimum=3, colluders=1),
)
POLICY = Policy(
    max_epsilon=2.0, delta=1e-6, max_rounds=5, models=("a" * 64,), colluders=1, automatic=True
)


def test_a_plan_at_every_limit_is_allowed():
    POLICY.check(PLAN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_epsilon": 1.9}, "max_epsilon = 1.9"),
        ({"delta": 1e-7}, "delta = 1e-07"),
        ({"max_rounds": 4}, "max_rounds = 4"),
        ({"models": ()}, "not in models"),
        ({"modes": ()}, "not in modes"),
        ({"objectives": ("classify",)}, "not in objectives"),
        ({"minimum": 4}, "minimum = 4"),
        ({"colluders": 2}, "colluders = 2"),
        ({"automatic": False}, "not in approved"),
    ],
)
def test_each_limit_refuses_with_its_name(change, reason):
    with pytest.raises(PolicyRefusal, match=reason) as caught:
        dataclasses.replace(POLICY, **change).check(PLAN)
    assert len(caught.value.reasons) == 1


def test_all_reasons_come_at_once():
    strict = dataclasses.replace(POLICY, max_epsilon=1.0, models=(), max_rounds=1)
    with pytest.raises(PolicyRefusal) as caught:
        strict.check(PLAN)
    assert len(caught.value.reasons) == 3


def test_a_run_without_privacy_is_refused_unless_the_policy_says_inf():
    naked = dataclasses.replace(PLAN, privacy=Privacy(epsilon=math.inf))
    with pytest.raises(PolicyRefusal, match="epsilon inf"):
        POLICY.check(naked)
    dataclasses.replace(POLICY, max_epsilon=math.inf).check(naked)


def test_approval_is_for_exactly_one_plan():
    manual = dataclasses.replace(POLICY, automatic=False, approved=(PLAN.hash().hex(),))
    manual.check(PLAN)
    with pytest.raises(PolicyRefusal):
        manual.check(dataclasses.replace(PLAN, seed=1))


def test_no_file_no_training(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file"):
        load_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    "change", [{"max_epsilon": 0.0}, {"delta": 0.5}, {"minimum": 2}, {"max_rounds": 0}]
)
def test_a_senseless_policy_is_refused(change):
    with pytest.raises(InvalidValue):
        dataclasses.replace(POLICY, **change)
