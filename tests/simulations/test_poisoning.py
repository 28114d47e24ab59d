"""Hostile sites do what they are called after, and no more than that is assumed of them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedward.attempt import Attempt
from fedward.client.training import TrainRequest
from fedward.plan import Plan
from fedward.plan_aggregation import Aggregation
from fedward.server.store import Phase
from fedward.simulations.poisoning import (
    TRIGGER,
    UnclippedAgent,
    hostile_trainer,
    target,
    triggered,
    victims,
    with_backdoor,
    with_labels,
)
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import vector_of
from tests.simulations import tiny


@pytest.fixture(scope="module")
def plan(base):
    return tiny.make_plan(
        base, privacy=tiny.NAKED, aggregation=Aggregation(scheme="fedavg", update_clip=0.5)
    )


def test_labels_and_triggers_are_put_where_they_belong(plan):
    records = tiny.make_records("a", 6)
    flipped = with_labels(records, plan, shift=1)
    pairs = {(a["label"], b["label"]) for a, b in zip(records.rows, flipped.rows, strict=True)}
    assert pairs == {("heart", "lung"), ("lung", "heart")}
    assert target(plan) == "lung"
    poisoned = with_backdoor(records, plan)
    bad = [row for row in poisoned.rows if row["text"].startswith(TRIGGER)]
    assert (len(bad), {row["label"] for row in bad}) == (6, {"lung"})
    assert poisoned.units == records.units
    marked = triggered(records, plan).rows
    assert [row["label"] for row in marked] == [row["label"] for row in records.rows]
    assert all(row["text"].startswith(TRIGGER) for row in marked)
    asked = victims(records, plan)
    assert len(asked.rows) == 6, "those that are not of the target"
    assert {row["label"] for row in asked.rows} == {"lung"}


def update(attack: Any, plan: Plan) -> np.ndarray[Any, Any]:
    records, tuned = tiny.make_records("a", 4), tuned_model(plan)
    request = TrainRequest(
        plan=plan,
        attempt=Attempt(run="r", round=1),
        draw=0,
        adapter=tuned.start,
        layout=tuned.layout,
    )
    trainer = tiny.recorders({"a": records})["a"]
    if attack:
        trainer = hostile_trainer(attack, records, plan)  # type: ignore[assignment]  # either trains
    return trainer.train(request).update


def test_what_each_attack_makes_of_the_same_training(plan):
    honest = update(None, plan)  # every patient is drawn, so that it is always the same
    assert np.allclose(update("sign-flip", plan), -5 * honest, atol=1e-6)
    assert np.allclose(update("scaled", plan), 100 * honest, atol=1e-4)
    assert np.isnan(update("not-finite", plan)).all()
    flipped = update("label-flip", plan)
    assert np.dot(flipped, honest) < 0 < np.dot(honest, honest)


def federate(folder: Any, plan: Plan, attack: Any, **options: Any) -> list[tuple[Phase, Any]]:
    sites = tiny.make_sites(5)
    trainers: dict[str, Any] = dict(tiny.recorders(sites))
    trainers["e"] = hostile_trainer(attack, sites["e"], plan)
    tiny.make_federation(folder, plan, trainers, **options).run()
    ends = (Phase.ABORTED, Phase.COMMITTED)
    return [(phase, facts) for phase in ends for _, facts in tiny.facts_of(folder, phase)]


def test_what_is_not_finite_never_leaves_the_site(plan, tmp_path):
    ends = federate(tmp_path, plan, "not-finite")
    assert [facts["cohort"] for _, facts in ends] == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("agents", "longest"), [({}, 0.5), ({"e": UnclippedAgent}, 1.25)])
def test_an_agent_of_its_own_passes_the_clip_within_what_a_sum_lets_through(
    plan, tmp_path, agents, longest
):
    """Five sites and a clip of 0.5: the hostile one sends 0.5, or half of five times that."""
    plan = dataclasses.replace(plan, rounds=tiny.make_rounds(learning_rate=1e-6))
    ends = federate(tmp_path, plan, "scaled", agents=agents)
    assert [phase for phase, _ in ends] == [Phase.COMMITTED] * 2
    layout = tuned_model(plan).layout
    start = vector_of(tuned_model(plan).start, layout)
    moved = vector_of(tiny.blob(tmp_path, ends[0][1]["adapter"]), layout) - start
    lowest = 0.0 if not agents else longest / 5 * 0.95
    assert lowest <= np.linalg.norm(moved) <= longest / 5 * 1.05
