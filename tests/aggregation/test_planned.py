"""What a plan says is what a session does: word size, rotation, weights, over real sites."""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.packing import pack, unpack, weighed
from fedward.aggregation.parameters import SessionParameters
from fedward.aggregation.planned import planned_session
from fedward.aggregation.published import SumResult
from fedward.attempt import Attempt
from fedward.errors import CohortTooSmall, ConfigurationError, InvalidValue, ProtocolError
from fedward.plan import Metrics, Plan
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.noise import SecureStream
from fedward.server.store import Phase
from fedward.tuning.vector import vector_of
from tests.aggregation.rig import make_roster
from tests.client.desk import LAYOUT, PLAN, RUN, START
from tests.server.test_rounds import Rig

ROSTER = make_roster((1, 2, 3, 4))
NAMES = [member.name for member in ROSTER.members]


def plan_with(minimum: int = 3, colluders: int = 0, **changes: Any) -> Plan:
    return dataclasses.replace(
        PLAN,
        aggregation=Aggregation(**changes),
        cohort=Cohort(minimum=minimum, colluders=colluders),
    )


def session_of(plan: Plan, dimension: int = 1000) -> SessionParameters:
    attempt = Attempt(run="run", round=1)
    return planned_session(plan, ROSTER, attempt, task_hash=bytes(32), dimension=dimension)


def test_sixteen_bits_are_rotated_and_two_bytes_a_parameter():
    narrow, wide = session_of(plan_with(word_bits=16)), session_of(plan_with())
    assert (narrow.rotated, narrow.grid.word_bits, narrow.grid.dtype.itemsize) == (True, 16, 2)
    assert (wide.rotated, wide.grid.word_bits, wide.grid.clip) == (False, 32, 1.0)
    assert narrow.grid.clip == pytest.approx(5 / math.sqrt(512))
    assert SessionParameters.from_bytes(narrow.to_bytes()) == narrow


@pytest.mark.parametrize("sites", [4, 64])
def test_the_error_of_sixteen_bits_is_what_the_page_says(sites):
    """An update as a LoRA's is: heavy-tailed, and as long as the clip lets it be."""
    d, roster = 100_000, make_roster(range(sites))
    parameters = planned_session(
        plan_with(word_bits=16),
        roster,
        Attempt(run="run", round=1),
        task_hash=bytes(32),
        dimension=d,
    )
    generator = np.random.default_rng(5)
    total = np.zeros(d, dtype=np.uint16)
    plain = np.zeros(d)
    for site in range(sites):
        update = generator.standard_t(3, size=d).astype(np.float32)
        update /= np.float32(np.linalg.norm(update) * 1.0001)
        total += pack(update, np.zeros(0), parameters, SecureStream(bytes([site]) * 32))
        plain += update
    found = unpack(total, parameters)[0] / sites
    error = float(np.linalg.norm(found - plain / sites))
    expected = parameters.grid.gamma * math.sqrt(d / (6 * sites))
    assert 0.8 * expected < error < 1.3 * expected
    assert error < 1e-3, "a thousandth of update_clip"
    unturned = dataclasses.replace(parameters, rotated=False)
    wrong = unpack(total, unturned)[0] / sites
    assert np.linalg.norm(wrong - plain / sites) > 100 * error, "negative control: not turned back"


@pytest.mark.parametrize("clip", [1e-12, 1e15])
@pytest.mark.parametrize("word_bits", [16, 32])
def test_whatever_update_clip_a_plan_may_have_both_passes_have_a_grid(clip, word_bits):
    plan = plan_with(scheme="sketch", update_clip=clip, word_bits=word_bits)
    for cohort in ((), (1, 2, 3)):
        parameters = planned_session(
            plan,
            ROSTER,
            Attempt(run="run", round=1, session=1 + bool(cohort)),
            task_hash=bytes(32),
            dimension=1 << 34,
            cohort=cohort,
        )
        assert SessionParameters.from_bytes(parameters.to_bytes()) == parameters


def test_metrics_need_wide_words():
    with pytest.raises(InvalidValue, match="word_bits = 16"):
        dataclasses.replace(plan_with(word_bits=16), metrics=Metrics(epsilon=1.0))


def weights_of(*weights: float) -> dict[str, float]:
    return dict(zip(NAMES, weights, strict=True))


def test_weights_stand_in_the_parameters_and_make_the_mean():
    parameters = session_of(plan_with(weights=weights_of(1.0, 2.0, 4.0, 3.0), minimum=4), 10)
    assert parameters.weights == ((1, 1.0), (2, 2.0), (3, 4.0), (4, 3.0))
    assert SessionParameters.from_bytes(parameters.to_bytes()) == parameters
    assert parameters.share(3) == 1.0
    assert parameters.share(1) == 0.25
    assert parameters.divisor((1, 3)) == 1.25
    assert session_of(plan_with(), 10).divisor((1, 2, 3)) == 3.0
    generator = np.random.default_rng(0)
    updates = {site: generator.normal(0, 0.1, 10).astype(np.float32) for site in (1, 2, 3, 4)}
    total = sum(
        pack(weighed(u, parameters, s), np.zeros(0), parameters, SecureStream(bytes([s]) * 32))
        for s, u in updates.items()
    )
    found = unpack(np.asarray(total), parameters)[0] / parameters.divisor(updates)
    expected = np.average(list(updates.values()), axis=0, weights=[1, 2, 4, 3])
    np.testing.assert_allclose(found, expected, atol=4 * parameters.grid.gamma)
    unweighed = np.mean(list(updates.values()), axis=0)
    assert np.abs(found - unweighed).max() > 1e-3, "negative control"


def test_the_heaviest_site_sends_no_more_than_the_clip_and_the_others_less():
    parameters = session_of(plan_with(weights=weights_of(1.0, 2.0, 4.0, 3.0), minimum=4), 10)
    update = np.full(10, 0.1, dtype=np.float32)
    lengths = [np.linalg.norm(weighed(update, parameters, site)) for site in (1, 2, 3, 4)]
    whole = np.linalg.norm(update)
    assert lengths == pytest.approx([whole * w / 4 for w in (1, 2, 4, 3)])


def test_every_site_of_the_roster_needs_a_weight():
    fewer = dict(list(weights_of(1.0, 1.0, 1.0, 1.0).items())[:3])
    with pytest.raises(InvalidValue, match="also one for 'site 4'"):
        session_of(plan_with(weights=fewer))
    with pytest.raises(ProtocolError, match="no weight for site 9"):
        session_of(plan_with(weights=weights_of(1.0, 1.0, 1.0, 1.0))).share(9)


@pytest.mark.parametrize(
    ("weights", "minimum", "colluders", "allowed"),
    [
        ((1.0, 1.0, 1.0, 1.0), 3, 1, True),
        ((1.0, 1.0, 1.0, 1.1), 3, 1, False),
        ((1.0, 1.0, 1.0, 2.0), 3, 0, True),
        ((1.0, 1.0, 1.0, 2.1), 3, 0, False),
        ((1.0, 1.0, 5.0, 2.0), 4, 1, False),
        ((1.0, 1.0, 2.0, 2.0), 4, 1, True),
    ],
)
def test_no_site_outweighs_what_colluders_do_not_know(weights, minimum, colluders, allowed):
    if allowed:
        session_of(plan_with(minimum, colluders, weights=weights_of(*weights)))
    else:
        with pytest.raises(ConfigurationError, match="lightest others"):
            plan_with(minimum, colluders, weights=weights_of(*weights))


def test_twin_a_weight_that_reads_one_site_out_of_the_sum():
    """Without the rule a thousandfold weight makes the sum of four sites nearly one's update."""
    parameters = dataclasses.replace(
        session_of(plan_with(), 10), weights=((1, 1000.0), (2, 1.0), (3, 1.0), (4, 1.0))
    )
    generator = np.random.default_rng(1)
    updates = {site: generator.normal(0, 0.1, 10).astype(np.float32) for site in (1, 2, 3, 4)}
    total = sum(weighed(update, parameters, site) for site, update in updates.items())
    assert np.linalg.norm(total - updates[1]) < 0.01 * np.linalg.norm(updates[1])


DESK_WEIGHTS = {"site 0": 1.0, "site 1": 2.0, "site 2": 1.0, "site 3": 1.5}


@pytest.mark.parametrize("word_bits", [16, 32])
def test_a_run_with_weights_a_dropout_and_either_word_size(tmp_path, word_bits):
    """Sites recompute each adapter bit for bit: they would refuse the next round otherwise."""
    plan = plan_with(word_bits=word_bits, weights=DESK_WEIGHTS)
    rig = Rig(tmp_path, plan=plan)
    lost = (Attempt(run=RUN, round=1), "train.masked")

    def fault(node, message):
        metadata = message.metadata
        return (node, metadata.message_type, metadata.group_id) == (rig.nodes[2], lost[1], "1")

    rig.grid._fault = fault

    def revive(attempt, phase, site, facts):
        if phase is Phase.COMMITTED:
            rig.grid.revive(rig.nodes[2])

    adapter = rig.run(observer=revive)
    assert rig.cohorts == [[0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    vector = vector_of(START, LAYOUT).astype(np.float64)
    for number, cohort in enumerate(rig.cohorts):
        updates = []
        for site in cohort:
            call = number if site != 2 else number + 0
            generator = np.random.default_rng([site, call + 1])
            updates.append(generator.normal(0, 0.1, 10).astype(np.float32))
        weights = [DESK_WEIGHTS[f"site {site}"] for site in cohort]
        vector += np.average(updates, axis=0, weights=weights)
    allowed = 3 * 5e-3 if word_bits == 16 else 1e-6
    np.testing.assert_allclose(vector_of(adapter, LAYOUT), vector, atol=allowed)
    sums = [facts["sum"] for _, facts in rig.facts(Phase.COMMITTED)]
    assert all(len(rig.store.blob(name)) == 10 * word_bits // 8 for name in sums)
    rig.close()


def test_a_coordinator_that_weighs_otherwise_is_refused(tmp_path, monkeypatch):
    """It sums honestly and then forgets the weights: every site refuses the next task."""

    def plain_mean(result: SumResult) -> npt.NDArray[np.float64]:
        return unpack(result.words, result.parameters)[0] / len(result.cohort)

    monkeypatch.setattr(SumResult, "mean", property(plain_mean))
    rig = Rig(tmp_path, plan=plan_with(weights=DESK_WEIGHTS))
    with pytest.raises(CohortTooSmall, match="round 2: 0 of 4 sites are ready"):
        rig.run()
    rig.close()


def test_a_plan_without_a_weight_for_each_site_stops_before_anybody_trains(tmp_path):
    rig = Rig(tmp_path, plan=plan_with(weights={"a": 1.0, "b": 1.0, "c": 1.0}))
    with pytest.raises(InvalidValue, match="also one for 'site 0'"):
        rig.run()
    assert rig.seen == []
    rig.close()
