from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedward.errors import ModelError
from fedward.plan_aggregation import Aggregation
from fedward.tuning.adapter import (
    adapter_state,
    flatten,
    from_bytes,
    layout,
    load_adapter,
    to_bytes,
    unflatten_into,
)
from fedward.tuning.models import load_base
from fedward.tuning.tuners import attach, trainable
from fedward.tuning.vector import replace_vector, vector_of
from tests.tuning.rig import make_plan

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4)}


@pytest.fixture(scope="module", params=["fedavg", "ffa"])
def model(request, models):
    plan = make_plan(models["bert"], aggregation=Aggregation(scheme=request.param))
    return attach(load_base(plan.model, plan.task)[0], plan)


def test_the_state_is_what_is_trained_and_what_the_tuner_added(model):
    names = set(adapter_state(model))
    assert set(trainable(model)) <= names
    frozen = names - set(trainable(model))
    assert all("lora_A" in name for name in frozen)
    assert all(any(part in name for part in ("lora_", "classifier.modules_to")) for name in names)


def test_a_state_goes_through_bytes_into_another_start(model):
    state = adapter_state(model)
    vector = flatten(model)
    unflatten_into(model, vector + 1)
    assert np.array_equal(flatten(model), vector + 1)
    load_adapter(model, from_bytes(to_bytes(state)))
    assert np.array_equal(flatten(model), vector)
    assert all(torch.equal(part, state[name]) for name, part in adapter_state(model).items())


def test_the_state_is_a_copy(model):
    state = adapter_state(model)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    unflatten_into(model, flatten(model) + 1)
    assert all(torch.equal(state[name], kept[name]) for name in state)
    load_adapter(model, state)


def test_vector_and_layout_agree_with_the_file(model):
    data, shapes = to_bytes(adapter_state(model)), layout(model)
    assert [name for name, _ in shapes] == sorted(trainable(model))
    vector = flatten(model)
    assert vector.dtype == np.float32
    assert vector.shape == (sum(p.numel() for p in trainable(model).values()),)
    assert np.array_equal(vector_of(data, shapes), vector)
    changed = replace_vector(data, shapes, vector + 1)
    load_adapter(model, from_bytes(changed))  # the same spelling, or it would be refused
    assert np.array_equal(flatten(model), vector + 1)
    load_adapter(model, from_bytes(data))


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype", "nan"])
def test_a_state_that_does_not_fit_changes_nothing(model, change):
    state, before = adapter_state(model), flatten(model)
    name = sorted(trainable(model))[0]
    state = {key: tensor + 1 for key, tensor in state.items()}
    match change:
        case "missing":
            del state[name]
        case "extra":
            state["more"] = torch.zeros(1)
        case "shape":
            state[name] = state[name].T
        case "dtype":
            state[name] = state[name].double()
        case _:
            state[name].view(-1)[0] = torch.nan
    with pytest.raises(ModelError):
        load_adapter(model, state)
    assert np.array_equal(flatten(model), before)


def test_a_vector_that_does_not_fit_is_refused(model):
    vector = flatten(model)
    wrong: list[Any] = [vector[:-1], vector[None], vector.astype(np.float64)]
    for other in [*wrong, np.full_like(vector, np.inf)]:
        with pytest.raises(ModelError):
            unflatten_into(model, other)


class TestBytes:
    def test_do_not_depend_on_the_order_of_names(self):
        data = to_bytes(STATE)
        assert to_bytes(dict(reversed(STATE.items()))) == data
        assert list(from_bytes(data)) == ["a", "b"]

    def test_no_tensors_at_all(self):
        assert from_bytes(to_bytes({})) == {}

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\x00" * 8,
            b"\xff" * 64,
            save({"a": torch.ones(2, dtype=torch.float16)}),
            save({"a": torch.ones(2)}, metadata={"note": "x"}),
            to_bytes(STATE) + b"\x00",
            to_bytes(STATE)[:-1],
            to_bytes(STATE).replace(b"[2,3]", b"[3,3]"),
            to_bytes(STATE).replace(b"F32", b"F99"),
        ],
    )
    def test_of_anything_else_are_refused(self, data):
        with pytest.raises(ModelError):
            from_bytes(data)

    def test_of_a_nonsense_size_are_refused_before_memory_is_taken(self):
        header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
        with pytest.raises(ModelError):
            from_bytes(len(header).to_bytes(8, "little") + header)

    @given(st.binary(max_size=300))
    def test_of_noise_raise_one_error(self, data):
        with pytest.raises(ModelError):
            from_bytes(data)

    @given(st.integers(0, 200), st.integers(0, 255))
    def test_with_one_changed_byte_are_refused_or_another_state(self, place, value):
        data = bytearray(to_bytes(STATE))
        same = data[place % len(data)] == value
        data[place % len(data)] = value
        try:
            state = from_bytes(bytes(data))
        except ModelError:
            return
        equal = state.keys() == STATE.keys() and all(torch.equal(state[n], STATE[n]) for n in STATE)
        assert equal == same
