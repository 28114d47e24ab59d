import decimal
import hashlib
import math
from bisect import bisect_right
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats  # type: ignore[import-untyped]  # no py.typed

from fedward.errors import InvalidValue
from fedward.privacy import discrete
from fedward.privacy.discrete import discrete_gaussian
from fedward.privacy.noise import SecureStream

KEY = bytes(range(32))
ACCEPT = 1e-4
TABLE = discrete._table


def exact_entries(sigma: float, lowest: int, count: int) -> list[Fraction]:
    """2^192 · P[X <= lowest + j], term by term in 150 decimal digits."""
    with decimal.localcontext(prec=150):
        variance = Decimal(sigma) * Decimal(sigma)
        reach = int(30 * sigma) + 30
        weights = [(-Decimal(k * k) / (2 * variance)).exp() for k in range(-reach, reach + 1)]
        whole, total, entries = sum(weights), Decimal(0), dict[int, Fraction]()
        for k, weight in zip(range(-reach, reach + 1), weights, strict=True):
            total += weight
            entries[k] = Fraction(total / whole) * 2**192
    return [entries[lowest + j] for j in range(count)]


@pytest.mark.parametrize("sigma", [0.25, 0.7, 4.0, 17.3])
def test_every_entry_of_the_table_is_exact(sigma):
    table = TABLE(Fraction(sigma) ** 2)
    exact = exact_entries(sigma, table.lowest, len(table.entries))
    assert max(abs(a - b) for a, b in zip(table.entries, exact, strict=True)) <= 1
    assert list(table.entries) == sorted(table.entries)
    # What is cut off would have been rounded away or weighs less than 2^-175.
    assert exact[0] < 2**17 or len(exact) < 40


def test_another_sigma_would_be_noticed():
    """Negative control: one part in 2^50 of sigma moves the entries by far more than one."""
    table = TABLE(Fraction(4) ** 2)
    exact = exact_entries(4.0 * (1 + 2**-50), table.lowest, len(table.entries))
    assert max(abs(a - b) for a, b in zip(table.entries, exact, strict=True)) > 2**130


@pytest.mark.parametrize("sigma", [0.3, 4.0, 250.0])
def test_samples_are_the_inversion_of_the_stream(sigma):
    """The guide and the vector code against one bisection a sample."""
    table, draws = TABLE(Fraction(sigma) ** 2), SecureStream(KEY).words(20_000)
    expected = [bisect_right(table.entries, int(u) << 128) + table.lowest for u in draws]
    assert discrete_gaussian(SecureStream(KEY), 20_000, sigma).tolist() == expected


class Scripted(SecureStream):
    """A stream that gives the words it was told."""

    def __init__(self, words: list[int]) -> None:
        super().__init__(KEY)
        self._words = words

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        given, self._words = self._words[:n], self._words[n:]
        return np.array(given, dtype=np.uint64)


@pytest.mark.parametrize("place", [0, 40, 60, -1])
def test_a_draw_at_an_entry_is_compared_to_the_last_bit(place):
    table = TABLE(Fraction(4) ** 2)
    entry = table.entries[place]
    for draw in (entry - 1, entry, entry + 1):
        words = [draw >> 128, (draw >> 64) % 2**64, draw % 2**64]
        found = discrete_gaussian(Scripted(words), 1, 4.0)[0]
        assert found == bisect_right(table.entries, draw) + table.lowest
    assert bisect_right(table.entries, entry) == bisect_right(table.entries, entry - 1) + 1


def p_value(samples: discrete.Integers, sigma: float) -> float:
    """Chi-square against the discrete Gaussian, in bins of about a quarter of a deviation."""
    width = max(1, round(sigma / 4))
    edges = np.arange(-14, 14) * width + 0.5
    cumulative = stats.norm.cdf(edges / sigma)
    if sigma < 50:
        k = np.arange(-3000, 3001)
        weights = np.exp(-(k**2) / (2 * sigma**2))
        cumulative = np.array([weights[k < edge].sum() for edge in edges]) / weights.sum()
    expected = np.diff(np.concatenate([[0.0], cumulative, [1.0]])) * len(samples)
    counts = np.bincount(np.searchsorted(edges, samples), minlength=len(expected))
    keep = expected > 5
    statistic = np.sum((counts[keep] - expected[keep]) ** 2 / expected[keep])
    return float(stats.chi2.sf(statistic, keep.sum() - 1))


@pytest.mark.parametrize("sigma", [4.0, 16.0, 100.0, 300.0, 76_000.0])
def test_the_distribution(sigma):
    samples = discrete_gaussian(SecureStream(KEY), 100_000, sigma)
    assert p_value(samples, sigma) > ACCEPT
    assert p_value(samples, sigma * 2 / 3) < ACCEPT, "negative control"
    assert p_value(samples, sigma * 3 / 2) < ACCEPT, "negative control"


@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_narrow_distributions_are_discrete_not_rounded(sigma):
    samples = discrete_gaussian(SecureStream(KEY), 200_000, sigma)
    k = np.arange(-30, 31)
    weights = np.exp(-(k**2) / (2 * sigma**2))
    share = weights[k == 0][0] / weights.sum()
    zeros = int(np.sum(samples == 0))
    assert stats.binomtest(zeros, len(samples), share).pvalue > ACCEPT
    rounded = math.erf(0.5 / (sigma * math.sqrt(2)))
    assert stats.binomtest(zeros, len(samples), rounded).pvalue < ACCEPT, "negative control"


def composed(
    fine: float, step: int, wide: float, reach: int
) -> tuple[npt.NDArray[np.float64], ...]:
    """The probabilities of fine + step · wide, and those of the discrete Gaussian it stands for."""
    x = np.arange(-reach, reach + 1)
    total = np.zeros(len(x))
    for j in range(-int(12 * wide) - 1, int(12 * wide) + 2):
        total += np.exp(-((x - step * j) ** 2) / (2 * fine**2) - j**2 / (2 * wide**2))
    sigma = math.hypot(fine, step * wide)
    direct = np.exp(-(x**2) / (2 * sigma**2))
    return total / total[reach], direct


def test_a_wide_distribution_is_a_sum_of_narrow_ones():
    """Lemma 1 at the smallest composition in use, to the last bits of float64."""
    variance = Fraction(discrete._WIDEST**2 - discrete._FINE**2, discrete._STEP**2)
    total, direct = composed(192.0, 32, math.sqrt(variance), 1000)
    assert np.max(np.abs(total / direct - 1)) < 1e-12
    total, direct = composed(16.0, 32, math.sqrt(variance), 1000)
    assert np.max(np.abs(total / direct - 1)) > 0.01, "negative control: too fine a part"


def test_the_samples_never_change_for_a_key():
    # A recorded value: a silent change would break the replay of interrupted runs.
    samples = discrete_gaussian(SecureStream(KEY), 70_000, 1234.5)
    recorded = hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()
    assert recorded == "ca80745cbff22d9c3b32ae15ad669c23ced1c5ae1c542e9e48334b2adf82618d"


def test_none():
    assert discrete_gaussian(SecureStream(KEY), 0, 4.0).shape == (0,)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 0.2, 2.0**31, math.inf, math.nan])
def test_impossible_sigmas(sigma):
    with pytest.raises(InvalidValue, match="sigma"):
        discrete_gaussian(SecureStream(KEY), 1, sigma)
