"""The alternatives train as the sites do: same start, rounds, steps, rate and sigma."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from fedward.attempt import Attempt
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.client.training import TrainRequest
from fedward.plan import Plan
from fedward.simulations.comparison import evaluate_adapter, pooled, train_in_one_place
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import vector_of
from tests.simulations import tiny

SITES = tiny.make_sites(3, patients=6)
TEST = tiny.make_records("t", 8)


def naked(base: Path, **rounds: Any) -> Plan:
    changes = {"count": 3, "steps": 4, "learning_rate": 0.05, **rounds}
    return tiny.make_plan(base, privacy=tiny.NAKED, rounds=tiny.make_rounds(**changes))


def test_pooled_has_every_record_and_keeps_patients_apart():
    together = pooled(SITES)
    assert len(together.rows) == sum(len(records.rows) for records in SITES.values())
    assert len(together.units) == 6 + 7 + 8
    for unit in together.units:
        assert len({together.rows[number]["patient"] for number in unit}) == 1


def test_training_learns_and_says_where_it_is(base):
    plan, rounds = naked(base), list[int]()
    adapter = train_in_one_place(plan, pooled(SITES), on_round=rounds.append)
    assert rounds == [1, 2, 3]
    before = evaluate_adapter(plan, tuned_model(plan).start, TEST)
    after = evaluate_adapter(plan, adapter, TEST)
    assert after.loss < before.loss
    assert len(after.losses) == len(TEST.rows)


def test_every_training_starts_anew(base):
    """The loaded model is shared: what one training left in it must not reach the next."""
    plan = naked(base)
    one = train_in_one_place(plan, SITES["a"])
    train_in_one_place(plan, SITES["b"])
    assert train_in_one_place(plan, SITES["a"]) == one


def test_evaluation_depends_on_its_adapter_alone(base):
    plan = naked(base)
    adapter = train_in_one_place(plan, SITES["a"])
    one = evaluate_adapter(plan, adapter, TEST)
    evaluate_adapter(plan, tuned_model(plan).start, TEST)
    assert np.array_equal(evaluate_adapter(plan, adapter, TEST).losses, one.losses)


def test_one_site_alone_is_what_the_site_would_do(base):
    """Without noise, one round of the federation's trainer and of the comparison are one thing."""
    plan = naked(base, count=1)
    tuned = tuned_model(plan)
    request = TrainRequest(
        plan=plan,
        attempt=Attempt(run="r", round=1),
        draw=0,
        adapter=tuned.start,
        layout=tuned.layout,
    )
    update = LocalTrainer(SITES["a"]).train(request).update
    alone = vector_of(train_in_one_place(plan, SITES["a"]), tuned.layout)
    start = vector_of(tuned.start, tuned.layout)
    assert np.abs(alone - start - update).max() < 1e-6


def test_with_privacy_the_noise_is_the_plans_whoever_trains(base):
    """Two runs differ by their noise; its scale shrinks with the sites' common normaliser."""
    rounds = tiny.make_rounds(count=1, optimizer="sgd", learning_rate=1.0)
    plan = tiny.make_plan(base, rounds=rounds)
    plan = dataclasses.replace(plan, privacy=dataclasses.replace(plan.privacy, epsilon=1.0))
    layout = tuned_model(plan).layout

    def spread(sites: int, factor: float = 1.0) -> float:
        step = mechanism(plan, normaliser=plan.rounds.normaliser * sites)
        pair = [
            vector_of(train_in_one_place(plan, SITES["a"], step=step), layout) for _ in range(2)
        ]
        noise = step.noise_multiplier * step.clip / step.normaliser * factor
        return float((pair[0] - pair[1]).std()) / math.sqrt(2) / noise

    assert abs(spread(1) - 1) < 0.25
    assert abs(spread(4) - 1) < 0.25
    for factor in (2 / 3, 3 / 2):
        assert abs(spread(1, factor) - 1) > 0.25, "negative control"
