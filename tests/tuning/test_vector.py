import math

import numpy as np
import pytest
from safetensors.numpy import save

from fedward.errors import ModelError
from fedward.tuning.vector import (
    dimension,
    layout_from_bytes,
    layout_to_bytes,
    moments_of,
    replace_vector,
    vector_of,
    without_moments,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(7, dtype=np.float32),
    "frozen": np.ones(2, dtype=np.float32),
}
LAYOUT = (("a", (2, 3)), ("b", ()))
ADAPTER = save(TENSORS)


def test_a_vector_is_taken_out_and_put_back():
    vector = vector_of(ADAPTER, LAYOUT)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert dimension(LAYOUT) == vector.size
    changed = replace_vector(ADAPTER, LAYOUT, vector * 2)
    assert vector_of(changed, LAYOUT).tolist() == (vector * 2).tolist()
    assert vector_of(changed, (("frozen", (2,)),)).tolist() == [1, 1]
    assert replace_vector(changed, LAYOUT, vector) == ADAPTER
    assert vector_of(ADAPTER, ()).size == 0


@pytest.mark.parametrize("wrong", [(("a", (3, 2)),), (("c", ()),), (("a", (2, 3)), ("b", (1,)))])
def test_another_layout_is_refused(wrong):
    with pytest.raises(ModelError, match="is not float32 of shape"):
        vector_of(ADAPTER, wrong)


def test_another_type_is_refused():
    with pytest.raises(ModelError):
        vector_of(save({"a": np.ones(2)}), (("a", (2,)),))
    for vector in (np.ones(6, np.float32), np.ones((7, 1), np.float32)):
        with pytest.raises(ModelError, match="7 numbers"):
            replace_vector(ADAPTER, LAYOUT, vector)


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, ADAPTER[:-1]])
def test_other_bytes_are_refused(data):
    with pytest.raises(ModelError, match="not a safetensors"):
        vector_of(data, LAYOUT)


def test_a_layout_has_one_spelling():
    data = layout_to_bytes(LAYOUT)
    assert layout_from_bytes(data) == LAYOUT
    assert dimension(LAYOUT) == sum(math.prod(shape) for _, shape in LAYOUT)
    for wrong in (data + b" ", b"", b"3", b"[1]", b'[["b",[]],["a",[]]]', b'[["a",[]],["a",[]]]'):
        with pytest.raises(ModelError):
            layout_from_bytes(wrong)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[" * 100_000, b'[["a",[Infinity]]]', rb'[["\ud800",[1]]]', b"{}", b"[1]"],
)
def test_a_malformed_layout_is_a_model_error(data):
    with pytest.raises(ModelError):
        layout_from_bytes(data)


def test_moments_lie_in_the_file_and_come_out_again():
    vector = vector_of(ADAPTER, LAYOUT)
    moments = {"first": vector + 1, "second": vector + 2}
    with_them = replace_vector(ADAPTER, LAYOUT, vector, moments)
    assert {k: v.tolist() for k, v in moments_of(with_them).items()} == {
        k: v.tolist() for k, v in moments.items()
    }
    assert without_moments(with_them) == ADAPTER
    assert without_moments(ADAPTER) is ADAPTER
    assert moments_of(ADAPTER) == {}
    again = replace_vector(with_them, LAYOUT, vector, {"first": vector})
    assert sorted(moments_of(again)) == ["first", "second"], "only those given are replaced"


def test_moments_must_be_finite_float32():
    for moment in (np.ones(2), np.array([np.nan], dtype=np.float32)):
        with pytest.raises(ModelError, match="moment 'first'"):
            moments_of(save({**TENSORS, "server_optimizer.first": moment}))
