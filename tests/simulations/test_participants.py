"""Whole federations of six sites of which each round asks three, over real models."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedward.aggregation.fixed_point import decode
from fedward.aggregation.participants import asked_sites
from fedward.aggregation.shared_noise import noisy_grid
from fedward.attempt import Attempt
from fedward.client.trainer import LocalTrainer
from fedward.plan import Plan, Tuner
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.privacy.pooled import noise_share
from fedward.server.store import Phase
from fedward.simulations.federation import RUN, Federation
from fedward.tuning.records import Records
from fedward.tuning.tuned import tuned_model
from fedward.tuning.vector import dimension
from tests.simulations import tiny
from tests.simulations.test_federation import reviving_at_once
from tests.simulations.test_kill import Killed, check_books, killing

SITES = tiny.make_sites(6, patients=2)


def make_plan(base: Path, mode: str = "local", **sections: Any) -> Plan:
    rounds = {"count": 3, "participants": 3, "optimizer": "sgd", "learning_rate": 0.5}
    return tiny.make_plan(base, mode=mode, rounds=tiny.make_rounds(**rounds), **sections)


def samples(federation: Federation, plan: Plan, attempts: list[Attempt]) -> list[list[int]]:
    return [list(asked_sites(plan, federation.roster, attempt)) for attempt in attempts]


def committed(folder: Path) -> list[Attempt]:
    return [attempt for attempt, _ in tiny.facts_of(folder, Phase.COMMITTED)]


@pytest.mark.parametrize("mode", ["local", "pooled"])
def test_a_killed_federation_goes_on_and_ledgers_have_lines_for_the_rounds_that_asked(
    tmp_path, base, mode
):
    plan = make_plan(base, mode)
    with pytest.raises(Killed):
        tiny.make_federation(tmp_path, plan, tiny.recorders(SITES)).run(killing(Phase.SHARED, 2))
    federation = tiny.make_federation(tmp_path, plan, tiny.recorders(SITES))
    adapter = federation.run()
    assert adapter != tuned_model(plan).start
    attempts = committed(tmp_path)
    assert [attempt.order for attempt in attempts] == [(1, 1, 2), (2, 1, 1), (3, 1, 1)]
    assert tiny.cohorts(tmp_path) == samples(federation, plan, attempts)
    check_books(tmp_path, plan, federation)
    first = Attempt(run=RUN, round=1)
    for site, name in enumerate(federation.names):
        asked = [a.order for a in attempts if site in asked_sites(plan, federation.roster, a)]
        assert tiny.sent(tmp_path, site) == asked
        lost = [first.order] if site in asked_sites(plan, federation.roster, first) else []
        reserved = [
            (entry["round"], entry["session"], entry["attempt"])
            for entry in tiny.ledger_entries(tmp_path, site)
            if entry["kind"] == "reserve"
        ]
        assert reserved == lost + asked
        assert federation.epsilon_spent(name) <= plan.privacy.epsilon
        assert (federation.epsilon_spent(name) > 0) is bool(asked)


def test_the_noise_in_a_pooled_sum_is_that_of_minimum_and_colluders(tmp_path, base):
    """Sites without a patient send their shares alone: three of them, of a roster of six."""
    plan = make_plan(base, "pooled")
    nobody = {name: Records(rows=(), units=()) for name in SITES}
    tiny.make_federation(tmp_path, plan, tiny.recorders(nobody)).run()
    length = dimension(tuned_model(plan).layout)
    share = noise_share(plan, length)
    grid = noisy_grid(plan.aggregation.update_clip, share=share, sites=3)
    sums = [
        decode(tiny.words_of(tiny.blob(tmp_path, facts["sum"])), grid)
        for _, facts in tiny.facts_of(tmp_path, Phase.COMMITTED)
    ]
    numbers = np.concatenate(sums)
    found, error = numbers.std() / share, 1 / np.sqrt(2 * len(numbers))
    assert abs(found / np.sqrt(3) - 1) < 4 * error
    assert abs(found / np.sqrt(2) - 1) > 4 * error, "negative control: a share less"
    assert abs(found / np.sqrt(6) - 1) > 4 * error, "negative control: everybody's shares"


@pytest.mark.parametrize(
    "sections",
    [
        {"aggregation": Aggregation(scheme="sketch", update_clip=10.0)},
        {
            "aggregation": Aggregation(scheme="sketch", update_clip=10.0),
            "tuner": Tuner(
                arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
                ranks={"a": 1, "c": 1, "e": 1},
            ),
        },
        {
            "aggregation": Aggregation(
                scheme="fedavg", word_bits=16, optimizer="adam", update_clip=10.0
            )
        },
        {"aggregation": Aggregation(scheme="fedavg", coordinates=0.5, update_clip=10.0)},
        {
            "cohort": Cohort(minimum=3, colluders=0),
            "aggregation": Aggregation(
                scheme="fedavg", weights=dict.fromkeys("abcdef", 1.0) | {"f": 0.5}, update_clip=10.0
            ),
        },
    ],
    ids=["sketch", "ranks", "narrow words and adam", "coordinates", "weights"],
)
def test_what_else_a_plan_may_say_goes_with_a_sample(tmp_path, base, sections):
    """Sites make every adapter from the sums of rounds that they may not have been in."""
    plan = make_plan(base, **sections)
    federation = tiny.make_federation(tmp_path, plan, tiny.recorders(SITES))
    adapter = federation.run()
    attempts = committed(tmp_path)
    assert len(attempts) == 3
    assert tiny.cohorts(tmp_path) == samples(federation, plan, attempts)
    assert adapter != tuned_model(plan).start
    assert tiny.facts_of(tmp_path, Phase.ABORTED) == []


def test_a_second_pass_that_lost_a_site_is_tried_with_another_sample(tmp_path, base):
    plan = make_plan(base, aggregation=Aggregation(scheme="sketch", update_clip=10.0))
    federation = tiny.make_federation(
        tmp_path, plan, tiny.recorders(SITES), fault=lambda node, message: lost(node, message)
    )
    gone, seen = samples(federation, plan, [Attempt(run=RUN, round=1)])[0][1], list[int]()

    def lost(node: int, message: Any) -> bool:
        kind = message.metadata.message_type
        if (node, kind) != (federation.nodes[gone], "train.second") or seen:
            return False
        seen.append(node)
        return True

    federation.run(reviving_at_once(federation))
    assert committed(tmp_path)[0].order == (1, 4, 2)
    assert tiny.cohorts(tmp_path) == samples(federation, plan, committed(tmp_path))


def test_personal_parts_of_a_site_that_sat_out_go_on_from_its_last_charged_ones(
    tmp_path, base, caplog
):
    plan = make_plan(
        base,
        tuner=Tuner(
            arguments={"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}, personal=("score",)
        ),
    )
    plan = dataclasses.replace(plan, rounds=dataclasses.replace(plan.rounds, count=5))
    trainers = {
        name: LocalTrainer(records, key=tiny.key(name), keep=tmp_path / "personal" / name)
        for name, records in SITES.items()
    }
    federation = tiny.make_federation(tmp_path, plan, trainers)
    federation.run()
    times = [len(tiny.sent(tmp_path, site)) for site in range(6)]
    assert sum(times) == 15
    for name, sent in zip(federation.names, times, strict=True):
        kept = {path.stem for path in (tmp_path / "personal" / name).rglob("*.safetensors")}
        assert kept == {str(n) for n in (sent - 1, sent) if n > 0}
    assert "begin anew" not in caplog.text
