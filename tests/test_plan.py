"""Every limit of a plan, its one spelling and its hash."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.errors import ConfigurationError, InvalidValue
from fedward.plan import (
    Data,
    Metrics,
    Model,
    Plan,
    Privacy,
    Rounds,
    Split,
    Task,
    Tuner,
    from_json,
    load_plan,
)
from fedward.plan_aggregation import Aggregation, Cohort
from fedward.plan_fallback import Fallback
from fedward.plan_gate import Gate

FULL = """\
name = "ward-7"
mode = "local"
seed = 11

[model]
path = "models/base"
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
quantize = "nf4"

[tuner]
method = "lora"
r = 16
lora_dropout = 0.1
target_modules = ["q_proj", "v_proj"]
rank_pattern = { q_proj = 8 }

[task]
objective = "classify"
max_length = 128
labels = ["yes", "no"]

[data]
text = "note"
label = "service"
template = "{note}"
unit = "patient"
split = { by = "service", alpha = 0.5, sites = 6, seed = 1 }

[rounds]
count = 20
spare = 3
steps = 10
sampling_rate = 0.02
normaliser = 32
learning_rate = 2e-4
optimizer = "sgd"
deadline = "90s"

[cohort]
minimum = 4
colluders = 2

[aggregation]
scheme = "ffa"
update_clip = 0.5
word_bits = 32

[privacy]
epsilon = 4.0
delta = 1e-5
clip = 0.7
records_per_unit = 2

[metrics]
epsilon = 0.5
loss_bound = 3.0
"""

Tables = dict[str, dict[str, Any]]

MINIMAL: Tables = {
    "": {"name": "ward"},
    "model": {"path": "base"},
    "rounds": {
        "count": 2,
        "steps": 3,
        "sampling_rate": 0.5,
        "normaliser": 8.0,
        "learning_rate": 0.1,
    },
}
ALSO: Tables = {  # what a section needs before one of its keys can be tried
    "data.split": {"by": "label", "alpha": 0.5, "sites": 6},
    "metrics": {"epsilon": 1.0},
    "fallback": {"after": 1, "job": "a"},
    "gate": {"data": "a"},
}

TEXT, WHOLE, NUMBER = "text", "a whole number", "a number"
POSITIVE = "a number above 0"
REFUSED: list[tuple[Any, ...]] = [
    ("", "name", ["", "-a", "Ward", "a b", "a" * 65, "a\n"], "1 to 64 of a-z, 0-9 and '-'"),
    ("", "mode", ["central", ""], "one of 'local', 'pooled'"),
    ("", "seed", [-1, 2**32], "0 to 2^32 - 1"),
    ("model", "path", [""], "a folder or hub id"),
    ("model", "sha256", ["", "0" * 63, "A" * 64, "0" * 64 + "\n"], "64 lower-case hex digits"),
    ("model", "quantize", ["int4", 8], "one of 'none', 'nf4', 'int8'"),
    ("model", "gradient_checkpointing", [1, "yes"], "true or false"),
    ("tuner", "method", ["Lora"], "one of 'lora', 'rslora'"),
    ("tuner", "method", [1], TEXT),
    ("tuner", "method", ["pissa"], "another method: it changes the base"),
    ("tuner", "method", ["adalora"], "another method: each site would deal out ranks"),
    ("tuner", "method", ["full"], "a method of fewer numbers"),
    ("tuner", "method", ["qlora"], "'lora', and quantize = 'nf4' in [model]"),
    ("tuner", "personal", [["a*"], [""]], "plain names, of letters, digits"),
    ("tuner", "personal", ["score"], "a list"),
    ("tuner", "ranks", [[4], "a"], "a section"),
    ("tuner", "r", [math.nan], "text, numbers, true, false, or lists of them"),
    ("task", "objective", ["ppo"], "one of 'sft', 'classify', 'dpo', 'kto'"),
    ("task", "beta", [0.2], "none: it belongs to dpo and kto"),
    ("task", "beta", [0.0, 101.0, math.inf], "above 0 and at most 100"),
    ("task", "desirable_weight", [2.0], "none: it belongs to kto"),
    ("task", "desirable_weight", [-1.0], "above 0 and at most 100"),
    ("task", "undesirable_weight", [2.0], "none: it belongs to kto"),
    ("task", "undesirable_weight", [0.0], "above 0 and at most 100"),
    ("task", "max_length", [7, 131073], "8 to 131072 tokens"),
    ("task", "labels", [["a"], ["a", "b", "a"]], "at least two classes, each once"),
    ("task", "labels", ["a"], "a list"),
    ("data", "text", [1], TEXT),
    ("data", "label", [1], TEXT),
    ("data", "messages", [1], TEXT),
    ("data", "prompt", ["q"], "prompt with completion, or with chosen and rejected"),
    ("data", "completion", [1], TEXT),
    ("data", "chosen", ["a"], "chosen and rejected together, or neither"),
    ("data", "rejected", [1], TEXT),
    ("data", "template", [1], TEXT),
    ("data", "unit", [1], TEXT),
    ("data", "site", [1], TEXT),
    ("data", "split", ["label", [1]], "a section"),
    ("data.split", "by", [1], TEXT),
    ("cohort", "groups", [0, 2, 1001], "1, or 3 to 1000"),
    ("gate", "data", [""], "a file of records"),
    ("gate", "worse_by", [-1.0, math.inf], "0 or more"),
    ("gate", "norm", [0.0, -1.0], POSITIVE),
    ("gate", "refusals", [0, 1001], "1 to 1000 rounds"),
    ("fallback", "after", [0, 1001], "1 to 1000 attempts"),
    ("fallback", "job", [""], "a job's file"),
    ("fallback", "adapter", ["", "A" * 64, "a" * 63], "64 lower-case hex digits"),
    ("data.split", "alpha", [0.0, -0.5, math.inf], POSITIVE),
    ("data.split", "sites", [2, 10001], "3 to 10000"),
    ("data.split", "seed", [-1], "0 or more"),
    ("rounds", "count", [0, 100001], "1 to 100000 rounds"),
    ("rounds", "spare", [-1, 100001], "0 to 100000 rounds"),
    ("rounds", "steps", [0, 10001], "1 to 10000 steps"),
    ("rounds", "sampling_rate", [0.0, -0.1, 1.01], "a rate above 0 and at most 1"),
    ("rounds", "normaliser", [0.0, -1.0, math.inf], POSITIVE),
    ("rounds", "learning_rate", [0.0, -1.0, math.inf], POSITIVE),
    ("rounds", "optimizer", ["adam"], "one of 'adamw', 'sgd'"),
    ("rounds", "proximal", [-0.1, math.inf], "0 or more"),
    ("rounds", "scaffold", [1, "yes"], "true or false"),
    ("rounds", "deadline", ["", "60", "0m", "-5m", "1d", "1.5h", "12345678s"], "like '60m'"),
    ("rounds", "physical_batch", [0, 4097], "1 to 4096 records"),
    ("rounds", "participants", [0, 2, 5001], "3 to 5000 sites, or left out"),
    ("cohort", "minimum", [-3, 2, 100001], "3 to 100000 with 1 colluders"),
    ("cohort", "colluders", [-1], "0 or more"),
    ("aggregation", "scheme", ["mean"], "one of 'fedavg', 'ffa', 'alternating', 'sketch', 'sketch"),
    ("aggregation", "update_clip", [0.0, -1.0, 9e-13, 2e15, math.inf], "1e-12 to 1e15"),
    ("aggregation", "word_bits", [8, 64, "32"], "one of 16, 32"),
    ("aggregation", "weights", [[1.0], "uniform"], "a section"),
    ("aggregation", "optimizer", ["sgd"], "one of 'none', 'momentum', 'adam', 'yogi', 'adagrad'"),
    ("aggregation", "server_learning_rate", [0.0, -1.0, math.inf], "above 0 and at most 1e6"),
    ("aggregation", "beta_1", [-0.1, 1.0], "at least 0 and below 1"),
    ("aggregation", "beta_2", [-0.1, 1.0], "at least 0 and below 1"),
    ("aggregation", "tau", [0.0, 2.0], "1e-9 to 1"),
    ("aggregation", "coordinates", [0.0, 1.1], "0.001 to 1"),
    ("privacy", "epsilon", [0.0, -1.0], "above 0, or inf for no privacy"),
    ("privacy", "delta", [0.0, -1e-6, 0.1, 1.0], "above 0 and below 0.1"),
    ("privacy", "clip", [0.0, -1.0, 9e-7, 2e6, math.inf], "1e-6 to 1e6"),
    ("privacy", "records_per_unit", [0, 1001], "1 to 1000"),
    ("metrics", "epsilon", [0.0, math.inf], POSITIVE),
    ("metrics", "loss_bound", [0.0, math.inf], POSITIVE),
]
ACCEPTED: list[tuple[Any, ...]] = [
    ("", "name", ["a", "0-" + "a" * 62]),
    ("", "seed", [0, 2**32 - 1]),
    ("task", "max_length", [8, 131072]),
    ("task", "labels", [[], ["a", "b"]]),
    ("data.split", "sites", [3, 10000]),
    ("rounds", "count", [1, 100000]),
    ("rounds", "spare", [0, 100000]),
    ("rounds", "steps", [1, 10000]),
    ("rounds", "sampling_rate", [5e-324, 1, 1.0]),
    ("rounds", "normaliser", [1, 1e300]),
    ("rounds", "deadline", ["1s", "9999999h"]),
    ("rounds", "physical_batch", [1, 4096]),
    ("rounds", "participants", [3, 5000]),
    ("cohort", "minimum", [3, 100000]),
    ("cohort", "colluders", [0, 1]),
    ("privacy", "epsilon", [0.01, math.inf]),
    ("privacy", "delta", [1e-12, 0.099]),
    ("privacy", "records_per_unit", [1, 1000]),
]


def each(table: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [
        (section, key, value, *rest) for section, key, values, *rest in table for value in values
    ]


def kinds(field: dataclasses.Field[Any]) -> set[Any]:
    """The types that a key allows."""
    return {field.type, *typing.get_args(field.type)}


def sections(cls: Any = Plan, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every section of a plan with its class."""
    yield name, cls
    for field in dataclasses.fields(cls):
        for kind in filter(dataclasses.is_dataclass, kinds(field)):
            yield from sections(kind, f"{name}.{field.name}".lstrip("."))


SECTIONS = list(sections())
KEYS = [
    (section, field.name, kinds(field))
    for section, cls in SECTIONS
    for field in dataclasses.fields(cls)
    if field.name != "arguments" and not any(map(dataclasses.is_dataclass, kinds(field)))
]


def write(
    path: Path, section: str = "", key: str = "", value: Any = None, base: Tables = MINIMAL
) -> Path:
    """A plan file with one key of one section changed."""
    tables = {name: dict(keys) for name, keys in base.items()}
    tables.setdefault(section, dict(ALSO.get(section, {})))
    if key:
        tables[section][key] = value
    lines = []
    for name, keys in sorted(tables.items()):
        lines += [f"[{name}]"] if name else []
        # json's strings, numbers and lists are TOML too, but for these two names
        lines += [f"{k} = {json.dumps(v)}" for k, v in keys.items()]
    text = "\n".join(lines).replace("Infinity", "inf").replace("NaN", "nan")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "plan.toml"


@pytest.fixture
def full(file):
    file.write_text(FULL, encoding="utf-8")
    return load_plan(file)


@pytest.mark.parametrize(("section", "key", "value", "allowed"), each(REFUSED))
def test_a_bad_value_names_file_section_key_value_and_what_is_allowed(
    file, section, key, value, allowed
):
    with pytest.raises(ConfigurationError) as caught:
        load_plan(write(file, section, key, value))
    message = str(caught.value)
    place = f"[{section}] " if section else ""
    assert message.startswith(f"{file}: {place}{key} = {value!r}: expected ")
    assert allowed in message


@pytest.mark.parametrize(("section", "key", "value"), each(ACCEPTED))
def test_a_value_at_its_limit_is_accepted(file, section, key, value):
    load_plan(write(file, section, key, value))


def test_the_table_tries_every_key_of_a_plan():
    tried = {(section, key) for section, key, *_ in REFUSED}
    assert {(section, key) for section, key, _ in KEYS} <= tried


@pytest.mark.parametrize(("section", "key", "allowed"), KEYS)
def test_a_key_of_the_wrong_type_is_refused(file, section, key, allowed):
    wrong = 1 if str in allowed else "1"
    with pytest.raises(ConfigurationError, match=rf"{key} = {wrong!r}: expected"):
        load_plan(write(file, section, key, wrong))


@pytest.mark.parametrize(("section", "key"), [k[:2] for k in KEYS if k[2] & {int, float}])
def test_true_is_not_a_number(file, section, key):
    with pytest.raises(ConfigurationError, match=rf"{key} = True: expected a (whole )?number"):
        load_plan(write(file, section, key, True))


@pytest.mark.parametrize(("section", "key"), [k[:2] for k in KEYS if float in k[2]])
def test_nan_is_refused_from_a_file_and_from_code(file, full, section, key):
    with pytest.raises(ConfigurationError, match=rf"{key} = nan: expected"):
        load_plan(write(file, section, key, math.nan))
    part = replace(full, gate=GATES[0])
    for name in section.split("."):
        part = vars(part)[name]
    with pytest.raises(InvalidValue):
        replace(part, **{key: math.nan})


@pytest.mark.parametrize(("section", "cls"), [pair for pair in SECTIONS if pair[1] is not Tuner])
def test_an_unknown_key_is_refused_with_the_nearest(file, section, cls):
    known = dataclasses.fields(cls)[-1].name
    with pytest.raises(
        ConfigurationError, match=rf"unknown key '{known}x'; did you mean '{known}'"
    ):
        load_plan(write(file, section, f"{known}x", 1))


@pytest.mark.parametrize("key", MINIMAL["rounds"])
def test_what_has_no_default_must_be_there(file, key):
    rounds = {k: v for k, v in MINIMAL["rounds"].items() if k != key}
    with pytest.raises(ConfigurationError, match=rf"\[rounds\] missing key '{key}'"):
        load_plan(write(file, base=MINIMAL | {"rounds": rounds}))


@pytest.mark.parametrize("key", ["name", "model", "rounds"])
def test_a_plan_needs_name_model_and_rounds(file, key):
    base = {k: v for k, v in MINIMAL.items() if k != ("" if key == "name" else key)}
    with pytest.raises(ConfigurationError, match=f"missing key '{key}'"):
        load_plan(write(file, base=base))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Data(messages="m", prompt="p", completion="c"), "either messages or prompt"),
        (lambda: Data(completion="c"), "prompt with completion"),
        (
            lambda: Data(site="s", split=Split(by="label", alpha=1, sites=3)),
            "either site or split",
        ),
        (lambda: Cohort(minimum=4, colluders=3), "5 to 100000 with 3 colluders"),
        (lambda: Tuner(arguments={"method": "lora"}), "a key of PEFT"),
        (lambda: Tuner(arguments={"r": [1, {"x": math.nan}]}), "text, numbers"),
        (lambda: Tuner(arguments={"target_modules": {"q"}}), "text, numbers"),
    ],
)
def test_a_combination_that_does_not_hold_is_refused(build, message):
    with pytest.raises(InvalidValue, match=message):
        build()


def test_sections_that_do_not_fit_each_other_are_refused(full):
    with pytest.raises(InvalidValue, match=r"sites = 6: expected at least \[cohort\] minimum = 7"):
        replace(full, cohort=Cohort(minimum=7))
    with pytest.raises(InvalidValue, match="'classify' reads text"):
        replace(full, data=Data(prompt="q", completion="a"))
    replace(full, data=Data(prompt="q", completion="a"), task=Task(objective="sft"))
    pairs = Data(prompt="q", chosen="a", rejected="b")
    for task, data, message in (
        (Task(objective="sft"), pairs, "'dpo' with chosen"),
        (Task(objective="dpo"), Data(prompt="q", completion="a"), "prompt, chosen and rejected"),
        (Task(objective="kto"), pairs, "prompt and completion"),
        (Task(objective="kto"), Data(), "prompt and completion"),
    ):
        with pytest.raises(InvalidValue, match=message):
            replace(full, data=data, task=task)
    replace(full, data=pairs, task=Task(objective="dpo", beta=0.5))
    kto = Task(objective="kto", beta=0.5, desirable_weight=2.0, undesirable_weight=0.5)
    replace(full, data=Data(prompt="q", completion="a"), task=kto)
    with pytest.raises(InvalidValue, match="prompt with completion, or with chosen"):
        Data(prompt="q", completion="a", chosen="b", rejected="c")


def test_a_full_plan_is_read(full):
    assert full.rounds.deadline_seconds == 90
    assert (full.rounds.normaliser, type(full.rounds.normaliser)) == (32.0, float)
    assert full.task.labels == ("yes", "no")
    assert full.tuner.arguments == {
        "r": 16,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 8},
    }
    assert full.data.split == Split(by="service", alpha=0.5, sites=6, seed=1)
    assert full.privacy.enabled
    assert not replace(full.privacy, epsilon=math.inf).enabled


@pytest.mark.parametrize(("deadline", "seconds"), [("5s", 5), ("60m", 3600), ("2h", 7200)])
def test_a_deadline_in_seconds(full, deadline, seconds):
    assert replace(full.rounds, deadline=deadline).deadline_seconds == seconds


def test_a_minimal_plan_has_the_documented_defaults(file):
    plan = load_plan(write(file))
    assert plan.metrics is None
    assert (plan.privacy, plan.aggregation, plan.cohort) == (Privacy(), Aggregation(), Cohort())
    assert from_json(plan.to_json()) == plan


def test_the_hash_of_a_plan_is_fixed(file, full):
    # Sites approve this hash: when it changes, every approval is void.
    assert load_plan(write(file)).to_json() == (
        b'{"aggregation":{"beta_1":0.9,"beta_2":0.99,"optimizer":"none","scheme":"ffa",'
        b'"server_learning_rate":1.0,"tau":0.001,"update_clip":1.0,"weights":null,"word_bits":32},'
        b'"cohort":{"colluders":1,"minimum":3},'
        b'"data":{"completion":null,"label":"label","messages":null,"prompt":null,"site":null,'
        b'"split":null,"template":null,"text":"text","unit":null},'
        b'"metrics":null,"mode":"local",'
        b'"model":{"gradient_checkpointing":false,"path":"base","quantize":"none","sha256":null},'
        b'"name":"ward",'
        b'"privacy":{"clip":1.0,"delta":1e-06,"epsilon":8.0,"records_per_unit":4},'
        b'"rounds":{"count":2,"deadline":"60m","learning_rate":0.1,"normaliser":8.0,'
        b'"optimizer":"adamw","physical_batch":64,"proximal":0.0,"sampling_rate":0.5,"spare":2,'
        b'"steps":3},'
        b'"seed":0,'
        b'"task":{"labels":[],"max_length":512,"objective":"sft"},'
        b'"tuner":{"arguments":{},"method":"lora"}}'
    )
    assert full.hash().hex() == "f1c671ecbc5e8787b907b82ace7b2bc6ba588b5721d35fa48d67a676d860eb97"


GATES = [
    Gate(data="a"),
    Gate(data="b"),
    Gate(data="a", worse_by=0.2),
    Gate(data="a", norm=1.0),
    Gate(data="a", refusals=4),
]
FALLBACKS = [
    Fallback(after=1, job="a"),
    Fallback(after=2, job="a"),
    Fallback(after=1, job="b"),
    Fallback(after=1, job="a", adapter="c" * 64),
]
CHANGES: dict[str, list[dict[str, Any]]] = {
    "": [
        {"name": "other"},
        {"seed": 12},
        {"metrics": None},
        *({"fallback": fallback} for fallback in FALLBACKS),
        *({"gate": gate} for gate in GATES),
        {"task": Task(objective="classify")},
        {"data": Data()},
        {"cohort": Cohort()},
        {"aggregation": Aggregation()},
        {"privacy": Privacy()},
    ],
    "model": [
        {"path": "other"},
        {"sha256": None},
        {"sha256": "0" * 64},
        {"quantize": "int8"},
        {"gradient_checkpointing": True},
    ],
    "tuner": [
        {"personal": ("score",)},
        {"arguments": {}},
        {"arguments": {"r": 8}},
        {"arguments": {"r": 8.0}},
    ],
    "task": [{"objective": "sft"}, {"max_length": 64}, {"labels": ("no", "yes")}],
    "data": [
        {"text": "a"},
        {"label": "a"},
        {"template": None},
        {"unit": None},
        {"split": None},
        {"split": None, "site": "a"},
    ],
    "data.split": [{"by": "a"}, {"alpha": 1.0}, {"sites": 5}, {"seed": 2}],
    "rounds": [
        {"count": 21},
        {"spare": 4},
        {"steps": 11},
        {"sampling_rate": 0.03},
        {"normaliser": 33.0},
        {"learning_rate": 3e-4},
        {"optimizer": "adamw"},
        {"deadline": "91s"},
        {"proximal": 0.1},
        {"physical_batch": 32},
        {"participants": 5},
        {"scaffold": True},
    ],
    "cohort": [{"minimum": 5}, {"colluders": 1}, {"groups": 3}],
    "aggregation": [
        {"scheme": "fedavg"},
        {"update_clip": 0.25},
        {"weights": {"a": 1.0, "b": 1.0}},
        {"weights": {"a": 1.0, "c": 1.0}},
        {"optimizer": "momentum"},
        {"server_learning_rate": 0.5},
        {"beta_1": 0.5},
        {"beta_2": 0.5},
        {"tau": 0.01},
        {"coordinates": 0.5},
    ],
    "privacy": [{"epsilon": 5.0}, {"delta": 2e-5}, {"clip": 0.8}, {"records_per_unit": 3}],
    "metrics": [{"epsilon": 0.25}, {"loss_bound": 2.0}],
}


def changed(plan: Any, section: str, change: dict[str, Any]) -> Any:
    """The plan with some keys of one section changed."""
    if not section:
        return replace(plan, **change)
    head, _, tail = section.partition(".")
    return replace(plan, **{head: changed(vars(plan)[head], tail, change)})


def test_the_hash_changes_with_each_key(full):
    plans = [full, *(changed(full, s, change) for s, cs in CHANGES.items() for change in cs)]
    assert len({plan.hash() for plan in plans}) == len(plans)
    wide, bits = replace(full, metrics=None), {"word_bits": 16}  # 16 are refused beside [metrics]
    assert changed(wide, "aggregation", bits).hash() != wide.hash()
    ranks: list[Any] = [None, {"a": 4}, {"a": 2}, {"b": 4}]
    sketch = replace(full, aggregation=Aggregation(scheme="sketch"), tuner=Tuner())
    assert len({changed(sketch, "tuner", {"ranks": r}).hash() for r in ranks}) == len(ranks)
    one_value = {"mode", "method", "ranks", *bits}
    only_sft = {"messages", "prompt", "completion"}
    left = {(s, k) for s, k, _ in KEYS} - {
        (s, k) for s, cs in CHANGES.items() for c in cs for k in c
    }
    preferring = {"chosen", "rejected", "beta", "desirable_weight", "undesirable_weight"}
    later = vars(FALLBACKS[0]).keys() | vars(GATES[0]).keys()
    named = one_value | only_sft | preferring | later
    assert {key for _, key in left} == named
    sft = replace(full, task=Task())
    data = [Data(), Data(messages="m"), Data(prompt="p", completion="c")]
    data += [Data(prompt="x", completion="c"), Data(prompt="p", completion="x")]
    assert len({replace(sft, data=d).hash() for d in data}) == len(data)
    tasks: list[Any] = [{}, {"beta": 0.2}, {"desirable_weight": 2.0}, {"undesirable_weight": 2.0}]
    kto = replace(sft, data=data[2], task=Task(objective="kto"))
    assert len({changed(kto, "task", task).hash() for task in tasks}) == len(tasks)
    pairs = [Data(prompt="p", chosen=a, rejected=b) for a, b in ("ab", "xb", "ax")]
    assert len({replace(sft, data=d, task=Task(objective="dpo")).hash() for d in pairs}) == 3


def test_a_plan_without_a_fallback_has_the_hash_that_it_had(full):
    assert b"fallback" not in full.to_json()
    fallen = replace(full, fallback=FALLBACKS[0])
    assert fallen.after_fallback("c" * 64) == replace(full, fallback=FALLBACKS[3])
    with pytest.raises(ConfigurationError, match=r"no \[fallback\]"):
        full.after_fallback("c" * 64)


def test_equal_plans_have_equal_hashes(full):
    whole = replace(full, privacy=replace(full.privacy, epsilon=4))
    assert whole == full
    assert whole.hash() == full.hash()


POSITIVES = st.floats(1e-9, 1e9)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
ARGUMENTS = st.dictionaries(
    WORDS.filter(lambda word: word != "method"),
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
        max_leaves=4,
    )
    | st.none(),
    max_size=3,
)
PLANS = st.builds(
    Plan,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,5}", fullmatch=True),
    seed=st.integers(0, 2**32 - 1),
    model=st.builds(Model, path=WORDS, quantize=st.sampled_from(["none", "nf4", "int8"])),
    tuner=st.builds(Tuner, arguments=ARGUMENTS),
    task=st.builds(
        Task,
        objective=st.sampled_from(["sft", "classify"]),
        max_length=st.integers(8, 131072),
        labels=st.lists(WORDS, min_size=2, max_size=4, unique=True).map(tuple),
    ),
    data=st.builds(
        Data,
        text=WORDS,
        unit=st.none() | WORDS,
        split=st.none()
        | st.builds(Split, by=WORDS, alpha=POSITIVES, sites=st.integers(100, 10000)),
    ),
    rounds=st.builds(
        Rounds,
        count=st.integers(1, 100000),
        steps=st.integers(1, 10000),
        sampling_rate=st.floats(1e-6, 1),
        normaliser=POSITIVES | st.integers(1, 10),
        learning_rate=POSITIVES,
    ),
    cohort=st.builds(Cohort, minimum=st.integers(12, 100), colluders=st.integers(0, 10)),
    privacy=st.builds(Privacy, epsilon=POSITIVES | st.just(math.inf)),
    metrics=st.none() | st.builds(Metrics, epsilon=POSITIVES),
    fallback=st.none() | st.builds(Fallback, after=st.integers(1, 1000), job=WORDS),
)


@given(PLANS)
def test_a_plan_comes_back_from_its_json(plan):
    again = from_json(plan.to_json())
    assert again == plan
    assert again.hash() == plan.hash()


def test_only_the_one_spelling_is_read_back(full):
    spelled = full.to_json()
    values = json.loads(spelled)
    assert from_json(spelled) == full
    others = [
        spelled + b" ",
        spelled.replace(b'"epsilon":4.0', b'"epsilon":4'),
        spelled.replace(b'"name":"ward-7"', b'"name":"other","name":"ward-7"'),
        spelled.replace(b"ward-7", b"ward\\u002d7"),
        spelled.decode().encode("utf-16"),
        json.dumps({k: v for k, v in values.items() if k != "privacy"}).encode(),
        json.dumps(values | {"cohort": None}).encode(),
        json.dumps(values | {"tuner": {"method": "lora", "arguments": 5}}).encode(),
        json.dumps(
            values | {"tuner": {"method": "lora", "arguments": {"method": "lora"}}}
        ).encode(),
    ]
    for other in others:
        assert other != spelled
        with pytest.raises(ConfigurationError):
            from_json(other)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"name": "a"}',
        b"[" * 100_000,
        b'{"x": ' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "not UTF-8", "lacking", "deep", "deeper", "digits"],
)
def test_what_is_no_plan_is_refused(data):
    with pytest.raises(ConfigurationError):
        from_json(data)


@given(st.data())
def test_a_damaged_plan_is_refused_or_is_another_plan(data):
    plan = data.draw(PLANS)
    damaged = bytearray(plan.to_json())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = from_json(bytes(damaged))
    except ConfigurationError:
        return
    assert read.to_json() == damaged


def test_half_a_surrogate_pair_is_refused(full):
    with pytest.raises(ConfigurationError, match="not valid JSON"):
        from_json(full.to_json().replace(b"models/base", b"\\ud800"))
