"""Attacks work where nothing defends, and fail under the plan's privacy."""

import dataclasses
import math

import numpy as np
import pytest

from fedward.errors import ModelError
from fedward.plan import Model, Plan, Privacy, Rounds, Task, Tuner
from fedward.plan_aggregation import Aggregation
from fedward.privacy.audit_membership import judge_membership, rmia_scores
from fedward.privacy.noise import SecureStream
from fedward.simulations.attack_inversion import token_scores
from fedward.simulations.attacks import attack_membership, attack_updates
from fedward.simulations.notes import generate, vocabulary
from fedward.tuning.models import fingerprint
from fedward.tuning.records import group
from fedward.tuning.small import build_llama, build_tokenizer
from fedward.tuning.tuned import tuned_model
from tests.simulations import tiny

PRIVATE = Privacy(epsilon=4.0, delta=1e-5, clip=0.5, records_per_unit=2)
NAKED = dataclasses.replace(PRIVATE, epsilon=math.inf)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks") / "llama"
    labels = ("a", "b", "c", "d")
    tokenizer = build_tokenizer(vocabulary(), 1200)
    build_llama(folder, tokenizer, hidden=128, layers=1, max_length=64, labels=labels)
    return Plan(
        name="attacked",
        model=Model(path=str(folder), sha256=fingerprint(folder)),
        tuner=Tuner(arguments={"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}),
        task=Task(objective="classify", labels=labels, max_length=48),
        rounds=Rounds(
            count=3, spare=0, steps=20, sampling_rate=0.5, normaliser=8, learning_rate=0.01
        ),
        aggregation=Aggregation(scheme="fedavg"),
        privacy=PRIVATE,
    )


@pytest.fixture(scope="module")
def records():
    """Notes with classes drawn at random: whoever knows one has seen it."""
    notes = generate(0).train["summit"]
    drawn = np.random.default_rng(0).integers(4, size=len(notes))
    rows = [{**row, "label": "abcd"[n]} for row, n in zip(notes, drawn, strict=True)]
    return group(rows, "patient")


def stream() -> SecureStream:
    return SecureStream(tiny.key("attack"))


def test_words_are_read_out_of_a_bare_update_and_not_out_of_a_private_one(plan, records):
    plain = dataclasses.replace(plan, rounds=dataclasses.replace(plan.rounds, optimizer="sgd"))
    for one in (plan, plain):
        bare = attack_updates(dataclasses.replace(one, privacy=NAKED), records, stream(), 6)
        private = attack_updates(one, records, stream(), 6)
        assert bare.found > 0.3 > 6 * bare.chance
        assert bare.auc > 0.75
        assert private.found < 0.1
        assert private.auc == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_members_are_found_without_privacy_and_not_with_it(plan, records):
    naked = dataclasses.replace(plan, privacy=NAKED)
    bare = attack_membership(naked, records, stream(), 16, 2)
    private = attack_membership(plan, records, stream(), 16, 2)
    assert bare.auc - 0.5 > 3 * bare.deviation
    assert abs(private.auc - 0.5) < 2.5 * private.deviation


def test_an_update_without_the_first_layer_is_refused(plan):
    with pytest.raises(ModelError, match="LoRA on q_proj"):
        token_scores(tuned_model(plan).model, {})


def test_rmia_finds_units_that_only_the_target_finds_easy():
    generator = np.random.default_rng(0)
    hard = generator.uniform(0.5, 3.0, 300)  # as hard for every model
    members, others, population = hard[:100] * 0.5, hard[100:200], hard[200:]
    given = {"population": population, "reference": hard[None, 200:]}
    scores = [
        rmia_scores(members, hard[None, :100], **given),
        rmia_scores(others, hard[None, 100:200], **given),
    ]
    found = judge_membership(*scores)
    assert found.auc > 0.9
    # Their loss alone would not tell them so well, and equal groups are not told at all.
    assert judge_membership(-members, -others).auc < found.auc
    same = judge_membership(scores[1][::2], scores[1][1::2])
    assert abs(same.auc - 0.5) < 3 * same.deviation


def test_the_deviation_is_that_of_many_repetitions():
    generator = np.random.default_rng(1)
    found = [
        judge_membership(generator.normal(1, 1, 50), generator.normal(0, 1, 50)) for _ in range(300)
    ]
    spread = float(np.std([one.auc for one in found]))
    assert found[0].deviation == pytest.approx(spread, rel=0.25)
