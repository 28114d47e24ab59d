"""The grid: exact to a step, unbiased, and unable to overflow."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward.aggregation.fixed_point import Grid, clip_update, decode, encode
from fedward.errors import InvalidValue, ProtocolError
from fedward.privacy.noise import SecureStream

STREAM = SecureStream(bytes(32))
GRIDS = st.builds(
    Grid,
    clip=st.floats(1e-6, 1e6),
    sites=st.integers(2, 4096),
    word_bits=st.just(32),
) | st.builds(
    Grid, clip=st.floats(1e-6, 1e6), sites=st.integers(2, 64), word_bits=st.sampled_from([16, 32])
)


@given(GRIDS)
def test_no_sum_can_overflow(grid):
    assert grid.bits + math.ceil(math.log2(grid.sites)) <= grid.word_bits
    assert grid.sites * grid.steps < 2 ** (grid.word_bits - 1)
    extremes = np.array([grid.clip, -grid.clip, 1e300, -1e300, math.nextafter(grid.clip, 0)])
    words = encode(extremes, grid, STREAM)
    signed = words.view(np.int32 if grid.word_bits == 32 else np.int16)
    assert np.all(np.abs(signed.astype(np.int64)) <= grid.steps)
    total = np.zeros_like(words)
    for _ in range(min(grid.sites, 200)):
        total += words
    if grid.sites <= 200:
        expected = decode(words, grid) * grid.sites
        np.testing.assert_allclose(decode(total, grid), expected, rtol=1e-12)


def test_one_site_more_would_overflow():
    """Negative control: the bound on the number of sites is the reason why sums are exact."""
    grid = Grid(clip=1.0, sites=4, word_bits=32)
    words = encode(np.ones(1), grid, STREAM)
    total = sum(np.repeat(words, 5).tolist()) % 2**32
    assert decode(np.array([total], dtype=np.uint32), grid)[0] < 0


@given(GRIDS, st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40))
def test_within_a_step(grid, values):
    wanted = np.array(values) * grid.clip
    found = decode(encode(wanted, grid, STREAM), grid)
    assert np.all(np.abs(found - wanted) <= grid.gamma * (1 + 1e-9))


def test_gamma_as_specified():
    """N = 1000 leaves 22 bits; the step is clip / (2^21 - 1)."""
    grid = Grid(clip=0.01, sites=1000, word_bits=32)
    assert grid.bits == 22
    assert grid.gamma == 0.01 / (2**21 - 1)
    assert Grid(clip=1.0, sites=64, word_bits=16).bits == 10


def bias(round_to_grid: Callable[[Any, Grid], Any]) -> float:
    """Mean error in steps, over many values a third of a step above the grid."""
    grid = Grid(clip=1.0, sites=4, word_bits=32)
    values = np.full(200_000, (1000 + 1 / 3) * grid.gamma)
    return float(np.mean(decode(round_to_grid(values, grid), grid) - values) / grid.gamma)


def test_rounding_is_unbiased():
    allowed = 5 * math.sqrt(2 / 9 / 200_000)
    assert abs(bias(lambda v, grid: encode(v, grid, SecureStream(b"u" * 32)))) < allowed
    nearest = bias(lambda v, grid: np.rint(v / grid.gamma).astype(np.int32).view(np.uint32))
    assert abs(nearest) > allowed, "negative control: rounding to nearest"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1, 70_000])
def test_not_finite(bad, place):
    values = np.zeros(70_001, dtype=np.float32)
    values[place] = bad
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        encode(values, Grid(clip=1.0, sites=3, word_bits=32), STREAM)
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        clip_update(values, 1.0)


def test_the_same_key_gives_the_same_words():
    values = np.random.default_rng(0).normal(size=100_003).astype(np.float32)
    grid = Grid(clip=1.0, sites=3, word_bits=32)
    one, two, other = (encode(values, grid, SecureStream(bytes([k]) * 32)) for k in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50),
    st.floats(1e-3, 1e3),
)
def test_clipped_to_the_bound(values, clip):
    update = np.array(values, dtype=np.float32)
    before = math.sqrt(math.fsum(float(v) ** 2 for v in update))
    found = clip_update(update, clip)
    after = math.sqrt(math.fsum(float(v) ** 2 for v in found))
    assert after <= clip * (1 + 2**-40)
    if before <= clip:
        assert found is update
    else:
        np.testing.assert_allclose(found, update * (clip / before), rtol=1e-6, atol=1e-36)


def test_the_margin_for_float32_matters():
    """Negative control: scaling by clip / norm alone rounds above the bound now and then."""
    generator, above = np.random.default_rng(0), 0
    for _ in range(100):
        update = generator.normal(size=5).astype(np.float32)
        norm = math.sqrt(math.fsum(float(v) ** 2 for v in update))
        plain = (update.astype(np.float64) * (0.5 / norm)).astype(np.float32)
        above += math.sqrt(math.fsum(float(v) ** 2 for v in plain)) > 0.5 * (1 + 2**-40)
    assert above > 10


@pytest.mark.parametrize(
    "fields",
    [
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
        {"clip": 5e-324},
        {"sites": 1},
        {"sites": 65537},
        {"word_bits": 8},
        {"word_bits": 16, "sites": 4097},
    ],
)
def test_impossible_grids(fields):
    with pytest.raises(InvalidValue):
        Grid(**{"clip": 1.0, "sites": 4, "word_bits": 32, **fields})
