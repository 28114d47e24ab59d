"""The rotation: orthonormal, undone exactly, flat whatever comes in, and worth it at 16 bits."""

import numpy as np
import numpy.typing as npt
import pytest

from fedward.aggregation.fixed_point import Grid, decode, encode
from fedward.aggregation.rotation import SPREAD, _hadamard, rotate, rotate_back, rotated_grid
from fedward.privacy.noise import SecureStream

KEY = bytes(range(32))
SIZES = [1, 2, 3, 7, 8, 255, 256, 257, 1000, 4096, 65_537, 200_000]


@pytest.mark.parametrize("bits", [0, 1, 3, 8, 9])
def test_against_the_matrix(bits):
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    vector = np.random.default_rng(bits).normal(size=1 << bits)
    expected = matrix @ vector / np.sqrt(1 << bits)
    _hadamard(vector)
    np.testing.assert_allclose(vector, expected, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_same_length_and_back_again(size):
    update = np.random.default_rng(size).normal(size=size).astype(np.float32)
    rotated = rotate(update, KEY)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(update.astype(float)), rel=1e-12)
    np.testing.assert_allclose(rotate_back(rotated, KEY), update, atol=1e-12)


def test_nothing_to_rotate():
    assert rotate(np.zeros(0), KEY).shape == rotate_back(np.zeros(0), KEY).shape == (0,)


def test_sums_rotate_back():
    one, two = (np.random.default_rng(seed).normal(size=1000) for seed in (1, 2))
    total = rotate(one, KEY) + rotate(two, KEY)
    np.testing.assert_allclose(rotate_back(total, KEY), one + two, atol=1e-12)


@pytest.mark.parametrize("place", [0, 50_000, 131_071, 131_072, 199_999])
def test_a_single_coordinate_is_spread(place):
    update = np.zeros(200_000)
    update[place] = 1.0
    grid = rotated_grid(1.0, 200_000, sites=8)
    assert np.abs(update).max() > 50 * grid.clip, "control: before the rotation it is not"
    rotated = np.abs(rotate(update, KEY))
    assert np.mean(rotated > grid.clip) < 1e-5
    assert rotated.max() < 2 * grid.clip


def test_another_key_is_another_rotation():
    update = np.random.default_rng(0).normal(size=1000)
    other = rotate(update, bytes(32))
    assert abs(np.corrcoef(rotate(update, KEY), other)[0, 1]) < 0.2
    assert np.linalg.norm(rotate_back(other, KEY) - update) > 10


def error(update: npt.NDArray[np.float64], rotated: bool) -> float:
    """Relative L2 error of one update of norm 1 through 16-bit words."""
    stream, size = SecureStream(KEY), len(update)
    if rotated:
        grid = rotated_grid(1.0, size, sites=64)
        found = rotate_back(decode(encode(rotate(update, KEY), grid, stream), grid), KEY)
    else:
        grid = Grid(clip=1.0, sites=64, word_bits=16)
        found = decode(encode(update, grid, stream), grid)
    return float(np.linalg.norm(found - update))


def test_sixteen_bits_need_it():
    update = np.random.default_rng(1).standard_t(3, size=100_000)
    update /= np.linalg.norm(update)
    assert error(update, rotated=True) < 0.01
    assert error(update, rotated=False) > 0.2, "negative control: the same words, unrotated"


def test_the_grid():
    grid = rotated_grid(2.0, 1 << 20, sites=64)
    assert (grid.bits, grid.clip) == (10, SPREAD * 2.0 / 1024)
    assert rotated_grid(2.0, 3, sites=8).clip == 2.0
