"""Schemes: the naive rule and the real one agree, and every machine gets the same bits."""

import hashlib

import numpy as np
import pytest

from fedward.aggregation.schemes import fedavg, ffa, next_vector
from fedward.errors import ProtocolError


@pytest.mark.parametrize("scheme", [fedavg(), ffa()], ids=lambda s: s.rule)
def test_three_rounds_against_the_naive_rule(scheme):
    generator = np.random.default_rng(0)
    start = generator.normal(size=50).astype(np.float32)
    state = scheme.init(start)
    naive = [float(v) for v in start]
    for _ in range(3):
        mean = generator.normal(size=50)
        state = scheme.apply(state, mean)
        naive = [float(np.float32(a + b)) for a, b in zip(naive, mean.tolist(), strict=True)]
    assert state.vector.tolist() == naive
    assert state.vector.dtype == np.float32


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
