"""The classical baseline: what it reaches on the demo, and what it cannot."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from fedward.errors import ConfigurationError
from fedward.plan import Data
from fedward.simulations.baseline import accuracy
from fedward.simulations.demo import demo_plan
from fedward.simulations.notes import SERVICES, generate
from fedward.tuning.records import group

PLAN = demo_plan()

Rows = Sequence[Mapping[str, Any]]


def reached(train: Rows, test: Rows) -> float:
    return accuracy(PLAN, group(train, None), group(test, None))


def test_it_learns_a_separable_task():
    rows = [{"text": f"{name} now", "label": name} for name in SERVICES] * 5
    assert reached(rows, rows) == 1.0


def test_labels_dealt_at_random_are_not_learned():
    train = [{"text": f"word{i % 7}", "label": SERVICES[i % 5]} for i in range(700)]
    assert reached(train, train) < 0.4


def test_it_reads_no_more_words_than_the_model_sees_tokens():
    few = dataclasses.replace(PLAN, task=dataclasses.replace(PLAN.task, max_length=8))
    rows = [{"text": "word " * 8 + name, "label": name} for name in SERVICES] * 5
    records = group(rows, None)
    assert accuracy(few, records, records) < 0.4
    assert accuracy(PLAN, records, records) == 1.0


def test_the_demo_is_worth_learning_and_not_trivial():
    world = generate(0)
    pooled = [row for rows in world.train.values() for row in rows]
    together = reached(pooled, world.test)
    assert 0.75 < together < 0.93
    # The words alone decide less: each hospital's own notes do not carry over to the others.
    assert reached(world.train["valley"], world.test) < together - 0.15


def test_columns_are_the_plans():
    rows = [{"note": word, "service": word} for word in ("heart", "lungs")] * 3
    plan = dataclasses.replace(PLAN, data=Data(text="note", label="service"))
    assert accuracy(plan, group(rows, None), group(rows, None)) == 1.0


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ConfigurationError, match=r"fedward\[demo\]"):
        reached([], [])
