"""Federations whose rounds send a part of the update: bytes, the mean to the bit, and the cost."""

import math

import numpy as np
import pytest
from flwr.app import Message

from fedward.aggregation.coordinates import draw_sent
from fedward.aggregation.groups import middle
from fedward.aggregation.packing import unpack
from fedward.aggregation.planned import planned_session
from fedward.aggregation.rules import masked_bytes
from fedward.client.trainer import LocalTrainer
from fedward.errors import InvalidValue
from fedward.plan import Metrics, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.server.store import Phase
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import vector_of
from tests.simulations import tiny
from tests.simulations.test_federation import VICTIM, Accident, bytes_of_masked

WEIGHTS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 2.0}
ROUNDS = tiny.make_rounds(count=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"word_bits": 32, "weights": WEIGHTS},
        {"word_bits": 16, "update_clip": 0.5},
        {"scheme": "ffa", "server_learning_rate": 0.5},
    ],
    ids=["weights", "16-bit", "ffa"],
)
def test_four_rounds_of_a_quarter_with_a_dropout(tmp_path, base, settings):
    """The mean on the drawn numbers, the old ones elsewhere; after the cycle each was sent once."""
    plan = tiny.make_plan(
        base,
        aggregation=Aggregation(**{"scheme": "fedavg", "coordinates": 0.25, **settings}),
        cohort=Cohort(minimum=3, colluders=0),
        rounds=ROUNDS,
    )
    trainers, seen = tiny.recorders(tiny.make_sites(4)), list[Message]()
    federation = tiny.make_federation(
        tmp_path, plan, trainers, fault=Accident("masked"), watch=seen.append
    )
    adapter = federation.run(tiny.reviving(federation))
    assert tiny.cohorts(tmp_path)[0] == [0, 2, 3], f"site {VICTIM} died in round 1"
    layout = tuned_model(plan).layout
    vector = vector_of(tuned_model(plan).start, layout)
    size, times = len(vector), np.zeros(len(vector), dtype=int)
    words, rate = math.ceil(size / 4), plan.aggregation.server_learning_rate
    sent_bytes = words * plan.aggregation.word_bits // 8
    assert masked_bytes(plan, layout) == (sent_bytes, sent_bytes)
    assert set(bytes_of_masked(federation, seen)) == {sent_bytes}
    for attempt, facts in tiny.facts_of(tmp_path, Phase.COMMITTED):
        parameters = planned_session(
            plan, federation.roster, attempt, task_hash=bytes(32), dimension=words
        )
        data = np.frombuffer(tiny.blob(tmp_path, facts["sum"]), dtype=parameters.grid.dtype)
        total, _ = unpack(data, parameters)
        sent = draw_sent(size, 0.25, attempt)
        updates = tiny.plain_updates(federation, trainers, attempt, facts["cohort"])
        shares = [parameters.share(site) for site in facts["cohort"]]
        plain = np.sum([s * u.astype(float) for s, u in zip(shares, updates, strict=True)], axis=0)
        error = np.linalg.norm(total - plain)
        assert error < 2 * parameters.grid.gamma * math.sqrt(words * len(updates) / 6)
        assert np.linalg.norm(total - plain + updates[0]) > 50 * error, "negative control"
        mean = total / math.fsum(shares)
        vector[sent] = (vector[sent].astype(np.float64) + rate * mean).astype(np.float32)
        times += sent
        assert np.array_equal(vector_of(tiny.blob(tmp_path, facts["adapter"]), layout), vector)
    assert np.array_equal(vector_of(adapter, layout), vector)
    assert times.min() == 1
    assert times.sum() == 4 * words
    assert {len(result.update) for result in trainers["a"].results} == {size}, "all are trained"


def test_a_part_costs_what_the_whole_costs(tmp_path, base):
    found = []
    for share in (1.0, 0.25):
        folder = tmp_path / str(share)
        plan = tiny.make_plan(base, aggregation=Aggregation(scheme="fedavg", coordinates=share))
        federation = tiny.make_federation(folder, plan, tiny.recorders(tiny.make_sites(4)))
        federation.run()
        epsilons = [federation.epsilon_spent(name) for name in federation.names]
        found.append((epsilons, [tiny.sent(folder, site) for site in range(4)]))
    assert found[0] == found[1]
    assert found[0][0][0] > 0


def test_groups_take_the_median_of_parts(tmp_path, base):
    plan = tiny.make_plan(
        base,
        aggregation=Aggregation(scheme="fedavg", coordinates=0.5),
        cohort=Cohort(minimum=3, colluders=1, groups=3),
        rounds=tiny.make_rounds(count=1),
    )
    trainers = tiny.recorders(tiny.make_sites(9))
    federation = tiny.make_federation(tmp_path, plan, trainers)
    adapter = federation.run()
    ((attempt, facts),) = tiny.facts_of(tmp_path, Phase.COMMITTED)
    layout, start = tuned_model(plan).layout, tuned_model(plan).start
    before, after = vector_of(start, layout), vector_of(adapter, layout)
    sent = draw_sent(len(before), 0.5, attempt)
    assert np.array_equal(before[~sent], after[~sent])
    means = [
        np.stack(tiny.plain_updates(federation, trainers, attempt, group))
        .astype(float)
        .mean(axis=0)
        for group in facts["groups"][1:]
    ]
    moved = after[sent].astype(np.float64) - before[sent]
    assert np.abs(moved - middle(means)).max() < 1e-6
    assert np.abs(moved - means[0]).max() > 1e-4, "control"


def test_metrics_follow_the_part_and_personal_parts_stay(tmp_path, base):
    plan = tiny.make_plan(
        base,
        aggregation=Aggregation(scheme="fedavg", coordinates=0.25),
        metrics=Metrics(epsilon=1.0),
        tuner=Tuner(
            arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, personal=("score",)
        ),
    )
    records = tiny.make_sites(4)
    trainers = {
        name: LocalTrainer(own, held_out=own, key=tiny.key(name), keep=tmp_path / name)
        for name, own in records.items()
    }
    seen = list[Message]()
    federation = tiny.make_federation(tmp_path / "run", plan, trainers, watch=seen.append)
    federation.run()
    layout = tuned_model(plan).layout
    assert not any("score" in name for name, _ in layout)
    size = sum(math.prod(shape) for _, shape in layout)
    assert set(bytes_of_masked(federation, seen)) == {4 * (math.ceil(size / 4) + 3)}
    assert masked_bytes(plan, layout)[0] == 4 * (math.ceil(size / 4) + 3)
    slots = [facts["slots"] for _, facts in tiny.facts_of(tmp_path / "run", Phase.COMMITTED)]
    assert [set(each) for each in slots] == [{"loss", "correct", "units"}] * 2
    assert all(list((tmp_path / name).rglob("*.safetensors")) for name in records)


def test_pooled_rounds_send_whole_gradients(base):
    with pytest.raises(InvalidValue, match="coordinates"):
        tiny.make_plan(
            base,
            mode="pooled",
            rounds=tiny.make_rounds(optimizer="sgd"),
            aggregation=Aggregation(scheme="fedavg", coordinates=0.5),
        )
