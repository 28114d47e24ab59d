"""Mode ``pooled``: the steps of training on all data in one place, under noise nobody knows."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.fixed_point import decode
from fedward.aggregation.shared_noise import noisy_grid
from fedward.client.policy import Policy
from fedward.client.trainer import LocalTrainer, mechanism
from fedward.errors import InvalidValue
from fedward.identity import Identity
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.accounting import epsilon
from fedward.privacy.ledger import read_books
from fedward.privacy.planned import training_event
from fedward.privacy.pooled import noise_share, pooled_event, unit_bound
from fedward.server.store import Phase
from fedward.simulations.comparison import pooled, train_in_one_place
from fedward.simulations.federation import Federation
from fedward.tuning.records import Records, select
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import Vector, dimension, vector_of
from tests.simulations import tiny

SITES = tiny.make_sites(4)
NOBODY = {name: Records(rows=(), units=()) for name in SITES}


def make_plan(base: Path, *, rounds: dict[str, Any] | None = None, **sections: Any) -> Plan:
    given = {"learning_rate": 0.5, "optimizer": "sgd"} | (rounds or {})
    return tiny.make_plan(base, mode="pooled", rounds=tiny.make_rounds(**given), **sections)


def federate(folder: Path, plan: Plan, sites: dict[str, Records]) -> tuple[Vector, Federation]:
    federation = tiny.make_federation(folder, plan, tiny.recorders(sites))
    return vector_of(federation.run(), tuned_model(plan).layout), federation


def test_without_noise_every_step_is_that_of_central_training(tmp_path, base):
    """Everybody is drawn, gradients are clipped, and only the noise is left out."""
    wide = Aggregation(scheme="fedavg", update_clip=100.0)
    plan = make_plan(base, privacy=tiny.NAKED, rounds={"count": 3}, aggregation=wide)
    found, _ = federate(tmp_path, plan, SITES)
    step = mechanism(plan, normaliser=plan.rounds.normaliser * len(SITES))
    central = vector_of(
        train_in_one_place(plan, pooled(SITES), step=step), tuned_model(plan).layout
    )
    start = vector_of(tuned_model(plan).start, tuned_model(plan).layout)
    moved = float(np.linalg.norm(central - start))
    assert np.linalg.norm(found - central) < 1e-4 * moved
    fewer = dict(list(SITES.items())[:3])
    other = vector_of(train_in_one_place(plan, pooled(fewer), step=step), tuned_model(plan).layout)
    assert np.linalg.norm(other - central) > 0.01 * moved, "control: a site more or less shows"


def sums_of(folder: Path, plan: Plan) -> list[npt.NDArray[np.float64]]:
    """What each round's sum was, over sites without a patient: nothing but noise."""
    federate(folder, plan, NOBODY)
    grid = noisy_grid(
        plan.aggregation.update_clip,
        share=noise_share(plan, dimension(tuned_model(plan).layout)),
        sites=len(NOBODY),
    )
    words = [
        tiny.words_of(tiny.blob(folder, facts["sum"]))
        for _, facts in tiny.facts_of(folder, Phase.COMMITTED)
    ]
    return [decode(each, grid) for each in words]


def test_the_noise_of_a_sum_is_all_sites_shares_and_of_no_two_sums_the_same(tmp_path, base):
    plan = make_plan(base, rounds={"count": 8})
    sums = sums_of(tmp_path, plan)
    share = noise_share(plan, sums[0].size)
    numbers = np.concatenate(sums)
    found = float(numbers.std()) / (share * math.sqrt(len(NOBODY)))
    tolerance = 5 / math.sqrt(2 * numbers.size)
    assert abs(found - 1) < tolerance
    assert abs(found * math.sqrt(4 / 3) - 1) > tolerance, "control: a site that adds none"
    rows = np.corrcoef(sums) - np.eye(len(sums))
    assert np.abs(rows).max() < 6 / math.sqrt(sums[0].size)
    assert np.corrcoef(sums[0], sums[0])[0, 1] == pytest.approx(1), "control: the same twice"


def test_the_shares_nobody_knows_keep_the_plans_epsilon(base):
    plan = make_plan(base, cohort=Cohort(minimum=4, colluders=2))
    length = dimension(tuned_model(plan).layout)
    steps = plan.rounds.count + plan.rounds.spare

    def cost(colluders: int, factor: float = 1.0) -> float:
        event = pooled_event(plan, length)
        event = dataclasses.replace(event, share=event.share * factor, shares=4 - colluders)
        return epsilon([event.times(steps)], plan.privacy.delta)

    assert 0.99 * plan.privacy.epsilon < cost(2) <= plan.privacy.epsilon
    assert cost(2, 0.995) > plan.privacy.epsilon, "the noise is the smallest"
    assert cost(3) > plan.privacy.epsilon > cost(1), "more colluders know more of it"
    known = noise_share(plan, length) * math.sqrt(2) / unit_bound(plan)
    local = training_event(plan).noise_multiplier
    assert 1 <= known / local < 1.15, "about what one hospital alone would need"


def test_the_ledger_has_what_was_shared_and_what_the_own_share_gives(tmp_path, base):
    plan = make_plan(base)
    _, federation = federate(tmp_path, plan, SITES)
    for name in SITES:
        assert 0 < federation.epsilon_spent(name) <= plan.privacy.epsilon
    (file,) = (tmp_path / "sites").glob("0000-*/ledger.jsonl")
    (event,) = json.loads(file.read_text().splitlines()[0])["entry"]["events"]
    assert (event["shares"], event["steps"]) == (plan.cohort.minimum - plan.cohort.colluders, 1)
    assert event["clip"] == unit_bound(plan)
    key = Identity.load_or_create(file.parent / "key").public_key
    books = read_books(file, key, epsilon=plan.privacy.epsilon, delta=plan.privacy.delta)
    alone = dataclasses.replace(pooled_event(plan, event["dimension"]), shares=1, steps=2)
    assert books.epsilon_alone() == pytest.approx(epsilon([alone], plan.privacy.delta))
    assert books.epsilon_alone() > books.epsilon_spent()


def sum_of(plan: Plan, records: Records) -> Vector:
    """What the trainer hands to the agent."""
    return LocalTrainer(records, key=bytes(32)).train(tiny.make_request(plan)).update


@pytest.mark.parametrize("ratio", [1e-9, 0.125, 1e9])
def test_one_patient_moves_a_sum_by_no_more_than_the_accounting_says(base, ratio):
    """At the ends of what a plan allows: nothing underflows, nothing overflows."""
    rounds = {"learning_rate": 4.0 * ratio, "normaliser": 4.0}
    plan = make_plan(
        base, rounds=rounds, aggregation=Aggregation(scheme="fedavg", update_clip=100.0 * ratio)
    )
    records = tiny.make_records("a", 6)
    whole = sum_of(plan, records).astype(np.float64)
    moves = [
        float(
            np.linalg.norm(whole - sum_of(plan, select(records, [u for u in range(6) if u != n])))
        )
        for n in range(6)
    ]
    assert max(moves) <= unit_bound(plan)
    assert max(moves) > 0.9 * unit_bound(plan), "control: every patient's gradient is clipped"
    assert not sum_of(plan, NOBODY["a"]).any()


def test_a_policy_says_whether_a_site_pools(base):
    plan = make_plan(base)
    allowed: dict[str, Any] = {
        "max_epsilon": 8.0,
        "delta": 1e-5,
        "max_rounds": 4,
        "models": (str(plan.model.sha256),),
        "automatic": True,
    }
    (reason,) = Policy(**allowed).reasons(plan)
    assert "mode" in reason
    assert not list(Policy(**allowed, modes=("local", "pooled")).reasons(plan))


@pytest.mark.parametrize(
    "sections",
    [
        {"rounds": {"steps": 2}},
        {"rounds": {"optimizer": "adamw"}},
        {"rounds": {"proximal": 0.1}},
        {"rounds": {"normaliser": 1e-40}},
        {"rounds": {"learning_rate": 1e38, "normaliser": 1e-3}},
        {"cohort": Cohort(minimum=3, colluders=0)},
        {"aggregation": Aggregation(scheme="alternating")},
        {"aggregation": Aggregation(scheme="sketch-once")},
        {"aggregation": Aggregation(scheme="fedavg", word_bits=16)},
        {
            "aggregation": Aggregation(
                scheme="fedavg", weights={"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
            )
        },
    ],
)
def test_what_has_no_meaning_for_a_step_over_all_is_refused(base, sections):
    with pytest.raises(InvalidValue, match="pooled"):
        make_plan(base, **sections)


def test_a_grid_that_is_too_coarse_for_the_accounting_is_refused(tmp_path, base):
    plan = make_plan(base, aggregation=Aggregation(scheme="fedavg", update_clip=1e6))
    with pytest.raises(InvalidValue, match="update_clip"):
        federate(tmp_path, plan, SITES)
