"""A federation with 16-bit words: half the bytes, the mean as near as the page says, to the bit."""

import math

import numpy as np

from fedward.aggregation.packing import unpack
from fedward.aggregation.planned import planned_session
from fedward.aggregation.schemes import next_vector
from fedward.messages import parts_of
from fedward.plan_aggregation import Aggregation
from fedward.server.store import Phase
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import vector_of
from tests.simulations import tiny
from tests.simulations.test_federation import VICTIM, Accident

CLIP = 0.3


def test_rounds_with_a_dropout(tmp_path, base):
    plan = tiny.make_plan(
        base, aggregation=Aggregation(scheme="fedavg", word_bits=16, update_clip=CLIP)
    )
    trainers = tiny.recorders(tiny.make_sites(4))
    sizes = set[int]()

    def watch(message):
        if message.metadata.message_type == "train.masked" and message.has_content():
            words = parts_of(message.content).get("words")
            sizes.update(() if words is None else (len(words),))

    federation = tiny.make_federation(
        tmp_path, plan, trainers, fault=Accident("masked"), watch=watch
    )
    federation.run(tiny.reviving(federation))
    assert tiny.cohorts(tmp_path) == [[0, 2, 3], [0, 1, 2, 3]], f"site {VICTIM} died in round 1"
    layout = tuned_model(plan).layout
    vector = vector_of(tuned_model(plan).start, layout)
    d = len(vector)
    assert sizes == {2 * d}
    for attempt, facts in tiny.facts_of(tmp_path, Phase.COMMITTED):
        parameters = planned_session(
            plan, federation.roster, attempt, task_hash=bytes(32), dimension=d
        )
        words = np.frombuffer(tiny.blob(tmp_path, facts["sum"]), dtype=parameters.grid.dtype)
        total, _ = unpack(words, parameters)
        updates = tiny.plain_updates(federation, trainers, attempt, facts["cohort"])
        plain = np.sum(updates, axis=0, dtype=np.float64)
        error = np.linalg.norm(total - plain)
        assert error < 2 * parameters.grid.gamma * math.sqrt(d * len(updates) / 6)
        assert np.linalg.norm(total - plain + updates[0]) > 50 * error, "negative control"
        vector = next_vector(vector, total / len(updates))
        assert np.array_equal(vector_of(tiny.blob(tmp_path, facts["adapter"]), layout), vector)
