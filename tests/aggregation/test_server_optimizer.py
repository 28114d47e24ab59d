"""Server optimizers against a naive one, to the last bit; moments that do not fit are refused."""

import math

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.schemes import next_vector
from fedward.aggregation.server_optimizer import next_state
from fedward.errors import InvalidValue, ProtocolError
from fedward.plan_aggregation import Aggregation

KINDS = ("momentum", "adam", "yogi", "adagrad")


Moments = dict[str, npt.NDArray[np.float32]]


def rounded(value: float) -> float:
    return float(np.float32(value))


def naive(
    kind: str, x: float, means: list[float], rate: float, beta_1: float, beta_2: float, tau: float
) -> float:
    """One coordinate through several rounds, as Algorithm 2 of Reddi et al. has it."""
    m, v = 0.0, tau**2
    for mean in means:
        if kind == "momentum":
            m = beta_1 * m + mean
            step = rate * m
        else:
            m = beta_1 * m + (1 - beta_1) * mean
            square = mean * mean
            if kind == "adagrad":
                v = v + square
            elif kind == "yogi":
                sign = (v > square) - (v < square)
                v = v - (1 - beta_2) * square * sign
            else:
                v = beta_2 * v + (1 - beta_2) * square
            step = rate * m / (math.sqrt(v) + tau)
        x, m, v = rounded(x + step), rounded(m), rounded(v)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_four_rounds_against_the_naive_rule(kind):
    generator = np.random.default_rng(0)
    start = generator.normal(size=40).astype(np.float32)
    means = generator.normal(scale=0.1, size=(4, 40))
    settings = Aggregation(
        optimizer=kind, server_learning_rate=0.3, beta_1=0.8, beta_2=0.95, tau=0.01
    )
    vector, moments = start, Moments()
    for mean in means:
        vector, moments = next_state(vector, moments, mean, settings)
    expected = [
        naive(kind, float(x), means[:, i].tolist(), 0.3, 0.8, 0.95, 0.01)
        for i, x in enumerate(start)
    ]
    assert vector.tolist() == expected
    forgetful = next_state(start, {}, means[-1], settings)[0]
    assert forgetful.tolist() != expected, "control: what was kept matters"


def test_none_adds_the_mean():
    start, mean = np.array([1, 2, 3], dtype=np.float32), np.array([0.1, 0.2, 0.3])
    vector, moments = next_state(start, {}, mean, Aggregation())
    assert vector.tobytes() == next_vector(start, mean).tobytes()
    assert moments == {}
    halved, _ = next_state(start, {}, mean, Aggregation(server_learning_rate=0.5))
    assert halved.tobytes() == next_vector(start, 0.5 * mean).tobytes()


def test_adam_moves_small_coordinates_as_far_as_large_ones():
    means = np.array([1e-3, 1e-1])
    settings = Aggregation(optimizer="adam", tau=1e-6)
    vector, moments = np.zeros(2, dtype=np.float32), Moments()
    for _ in range(50):
        vector, moments = next_state(vector, moments, means, settings)
    assert vector[1] / vector[0] == pytest.approx(1, rel=0.01)
    plain = next_state(np.zeros(2, dtype=np.float32), {}, means, Aggregation())[0]
    assert plain[1] / plain[0] == pytest.approx(100), "control"


@pytest.mark.parametrize(
    "moments",
    [
        {"first": np.zeros(3, dtype=np.float32)},
        {"first": np.zeros(3, dtype=np.float32), "third": np.zeros(3, dtype=np.float32)},
        {"first": np.zeros(2, dtype=np.float32), "second": np.zeros(3, dtype=np.float32)},
        {"first": np.zeros(3, dtype=np.float32), "second": np.array([0, -1, 0], dtype=np.float32)},
    ],
)
def test_moments_that_do_not_fit_are_refused(moments):
    with pytest.raises(ProtocolError, match="moment"):
        next_state(
            np.zeros(3, dtype=np.float32), moments, np.zeros(3), Aggregation(optimizer="adam")
        )


def test_moments_without_an_optimizer_are_refused():
    moments = {"first": np.zeros(3, dtype=np.float32)}
    with pytest.raises(ProtocolError, match="moments"):
        next_state(np.zeros(3, dtype=np.float32), moments, np.zeros(3), Aggregation())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server_learning_rate", 0.0),
        ("server_learning_rate", math.nan),
        ("beta_1", 1.0),
        ("beta_2", -0.1),
        ("tau", 0.0),
    ],
)
def test_limits(key, value):
    with pytest.raises(InvalidValue, match=key):
        Aggregation(**{key: value})
