"""The site's word is the last, and it says all of its reasons at once."""

import dataclasses
import math
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedward.client.policy import Policy, load_policy
from fedward.errors import ConfigurationError, InvalidValue, PolicyRefusal
from fedward.plan import Model, Plan, Privacy, Rounds, Tuner
from fedward.plan_aggregation import Cohort
from fedward.typed_toml import dump

PLAN = Plan(
    name="p",
    model=Model(path="m", sha256="a" * 64),
    rounds=Rounds(count=4, spare=1, steps=1, sampling_rate=0.1, normaliser=1, learning_rate=1),
    privacy=Privacy(epsilon=2.0, delta=1e-6),
    cohort=Cohort(minimum=3, colluders=1),
)
NOW = datetime(2026, 5, 1, 12)  # noqa: DTZ001  # a Friday, local time
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
        ({"methods": ()}, "method 'lora' is not in methods"),
        ({"clip": (0.1, 0.5)}, "clip 1 is not in 0.1 to 0.5"),
        ({"normaliser": (2.0, 3.0)}, "normaliser 1 is not in 2 to 3"),
        ({"learning_rate": (0.0, 0.9)}, "learning_rate 1 is not in 0 to 0.9"),
        ({"update_clip": (2.0, 2.0)}, "update_clip 1 is not in 2 to 2"),
        ({"max_steps": 1, "max_length": 511}, "512 tokens are above max_length = 511"),
        ({"quantize": ("nf4",)}, "quantisation 'none' is not in quantize"),
        ({"sampling_rate": (0.0, 0.05)}, "sampling_rate 0.1 is not in 0 to 0.05"),
        ({"max_records_per_unit": 3}, "4 records of a unit are above max_records_per_unit = 3"),
        ({"permit": "R-7", "permit_until": "2026-04-30"}, "permit R-7 ended on 2026-04-30"),
        ({"hours": ("20:00-06:00",)}, "it is Fri 12:00 here, outside of hours = 20:00-06:00"),
    ],
)
def test_each_limit_refuses_with_its_name(change, reason):
    with pytest.raises(PolicyRefusal, match=reason) as caught:
        dataclasses.replace(POLICY, **change).check(PLAN, NOW)
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


def test_steps_are_limited():
    long = dataclasses.replace(PLAN, rounds=dataclasses.replace(PLAN.rounds, steps=2))
    with pytest.raises(PolicyRefusal, match="2 steps a round are above max_steps = 1"):
        dataclasses.replace(POLICY, max_steps=1).check(long)


def tuned(**arguments: Any) -> Plan:
    return dataclasses.replace(PLAN, tuner=Tuner(arguments=arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj", "model.embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ".*"},
        {"target_modules": "embed_tokens|q_proj"},
        {"target_parameters": ["lm_head.weight"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["score", "lm_head"]},
        {"modules_to_save": ["mlp"]},
        {"modules_to_save": "lm_head"},
        {"trainable_token_indices": [1, 2]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
    ],
)
def test_embeddings_output_layers_and_whole_modules_are_not_trained(arguments):
    with pytest.raises(PolicyRefusal) as caught:
        POLICY.check(tuned(**arguments))
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"modules_to_save": ["model.classifier"]},
    ],
)
def test_layers_and_a_new_head_may_be_trained(arguments):
    POLICY.check(tuned(**arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank_pattern": {"(a+)+b": 4}},
        {"alpha_pattern": {"^x": 4}},
        {"exclude_modules": "(a|a)*c"},
        {"exclude_modules": ["q_proj", "v proj"]},
        {"layers_pattern": ["(.*)*h"]},
        {"modules_to_save": ["(a+)+.score"]},
        {"target_modules": ["x" * 201]},
        {"rank_pattern": {"é": 4}},
    ],
)
def test_a_name_that_is_a_pattern_is_refused(arguments):
    """PEFT would match every module of the model against it, which need never end."""
    with pytest.raises(PolicyRefusal, match="expected plain names") as caught:
        POLICY.check(tuned(**arguments))
    assert len(caught.value.reasons) == 1


def test_plain_names_of_layers_may_have_ranks_of_their_own():
    POLICY.check(tuned(rank_pattern={"layers.0.q_proj": 4}, exclude_modules=["k_proj"]))


def test_a_policy_may_let_an_embedding_be_trained():
    """The site's word is the last in both directions; the trainer refuses it all the same."""
    loose = dataclasses.replace(POLICY, frozen=())
    loose.check(tuned(target_modules=["embed_tokens"], trainable_token_indices=[1]))


def test_the_permit_holds_on_its_last_day():
    last = dataclasses.replace(POLICY, permit_until="2026-05-01")
    last.check(PLAN, NOW)
    with pytest.raises(PolicyRefusal):
        last.check(PLAN, NOW + timedelta(days=1))


def test_every_change_of_a_policy_changes_its_hash():
    changes: list[dict[str, Any]] = [
        {"max_epsilon": 1.0},
        {"models": ()},
        {"hours": ("20:00-06:00",)},
        {"automatic": False},
        {"permit": "x"},
        {"clip": (0.0, 1.0)},
    ]
    hashes = [dataclasses.replace(POLICY, **change).hash() for change in [{}, *changes]]
    assert len(set(hashes)) == len(hashes)


def test_a_full_policy_is_read_from_its_file(tmp_path):
    path = tmp_path / "policy.toml"
    full = dataclasses.replace(
        POLICY,
        hours=("mon-fri 20:00-06:00",),
        gpu_memory=24.0,
        datasets=("notes",),
        signers=("0a" * 32,),
        permit="R-7",
        permit_until="2027-01-31",
    )
    path.write_text(dump(full))
    assert load_policy(path) == full


def test_no_file_no_training(tmp_path):
    with pytest.raises(ConfigurationError, match="no such file"):
        load_policy(tmp_path / "policy.toml")


@pytest.mark.parametrize(
    "change",
    [
        {"max_epsilon": 0.0},
        {"delta": 0.5},
        {"minimum": 2},
        {"max_rounds": 0},
        {"colluders": -1},
        {"max_steps": 0},
        {"max_length": 7},
        {"max_records_per_unit": 0},
        {"sampling_rate": (0.5, 0.1)},
        {"gpu_memory": 0.0},
        {"clip": (1.0,)},
        {"learning_rate": (2.0, 1.0)},
        {"models": ("a",)},
        {"signers": ("A" * 64,)},
        {"hours": ("8-9",)},
        {"permit_until": "31.1.2027"},
    ],
)
def test_a_senseless_policy_is_refused(change):
    with pytest.raises(InvalidValue):
        dataclasses.replace(POLICY, **change)


def test_every_key_is_explained_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "site.md").read_text(encoding="utf-8")
    rows = page.partition("| key | meaning |")[2].partition("\n\n")[0]
    names = [row.split("|")[1] for row in rows.splitlines() if row]
    keys = re.findall(r"`(\w+)`", " ".join(names))
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(Policy))
