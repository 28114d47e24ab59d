"""The next adapter: the naive rule and the real one agree, to the same bits on every machine."""

import hashlib

import numpy as np
import pytest

from fedward.aggregation.schemes import next_vector, round_layout
from fedward.errors import ProtocolError


def test_three_rounds_against_the_naive_rule():
    generator = np.random.default_rng(0)
    vector = generator.normal(size=50).astype(np.float32)
    naive = [float(v) for v in vector]
    for _ in range(3):
        mean = generator.normal(size=50)
        vector = next_vector(vector, mean)
        naive = [float(np.float32(a + b)) for a, b in zip(naive, mean.tolist(), strict=True)]
    assert vector.tolist() == naive
    assert vector.dtype == np.float32


def test_bit_for_bit():
    """A known answer: element-wise float64 has one result everywhere."""
    start = (np.arange(1000, dtype=np.float64) / 7).astype(np.float32)
    mean = np.arange(1000, dtype=np.float64) / -11
    digest = hashlib.sha256(next_vector(start, mean).tobytes()).hexdigest()
    expected = np.float32(start.astype(np.float64) + mean)
    assert digest == hashlib.sha256(expected.tobytes()).hexdigest()
    in_float32 = start + mean.astype(np.float32)
    assert in_float32.tobytes() != expected.tobytes(), "control: float32 gives other bits"


def test_other_shapes_and_types():
    with pytest.raises(ProtocolError, match="shape"):
        next_vector(np.zeros(3, dtype=np.float32), np.zeros(4))
    with pytest.raises(ProtocolError, match="float32"):
        next_vector(np.zeros(3), np.zeros(3))  # type: ignore[arg-type]  # what the test is about


def test_alternating_trains_one_factor_at_a_time():
    layout = (("x.lora_A.default.weight", (2, 3)), ("x.lora_B.default.weight", (3, 2)), ("y", (2,)))
    assert round_layout(layout, "alternating", 1) == layout[1:]
    assert round_layout(layout, "alternating", 2) == (layout[0], layout[2])
    assert round_layout(layout, "fedavg", 2) == layout
