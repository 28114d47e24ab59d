"""Discrete Gaussian noise, sampled exactly and fast from a cryptographic stream.

The discrete Gaussian on the integers gives k the probability exp(-k^2 / 2 sigma^2) / Z (Canonne,
Kamath and Steinke 2020, arXiv 2004.00010). Noise shares that are summed modulo 2^w must be
integers, and rounded continuous noise has no known guarantee for a sum of shares.

A sample inverts a table of the cumulative distribution, scaled to 2^192: 64 random bits decide,
but where they equal the first 64 bits of an entry, 128 more are drawn and compared exactly. A guide
over the first 16 bits answers most samples by one look-up. Wide distributions are the sum of narrow
ones: if x and y are discrete Gaussians of deviation s and t, then x + m·y is one of deviation
sqrt(s^2 + m^2 t^2), up to a factor 1 ± 5 exp(-2 pi^2 / (m^2 / s^2 + 1 / t^2)) in each probability
(``docs/distributed-noise.md``, lemma 1).
"""

import decimal
import functools
import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fedward.errors import InvalidValue
from fedward.privacy.noise import SecureStream

Integers = npt.NDArray[np.int64]

_PRECISION = 320  # bits of the probabilities that the table is summed from
_SCALE = 192  # bits of an entry of the table
_FIRST = 64  # bits of an entry that are compared at once
_GUIDE = 16  # bits that the guide looks at
_BUSY = np.iinfo(np.int32).min  # marks a place of the guide where an entry must be looked for
_WIDEST = 256  # widest deviation of one table: a quarter of a MiB
_FINE, _STEP = 192, 32  # of the composition: fine + 32 * wide
_CHUNK = 1 << 15  # samples at a time stay in the L2 cache


def discrete_gaussian(stream: SecureStream, n: int, sigma: float) -> Integers:
    """Draw ``n`` independent discrete Gaussians.

    Args:
        stream: Fresh cryptographic randomness.
        n: How many, 0 or more.
        sigma: The distribution's parameter, 0.25 to 2^30; above 1 also its standard deviation, to
            one part in 10^7.

    Returns:
        ``(n,)`` int64.

    Guarantees:
        Each sample is within 2^-170 in statistical distance of the discrete Gaussian whose sigma
        is exactly this float, as far as the stream is uniform.

    >>> discrete_gaussian(SecureStream(bytes(32)), 8, 4.0).tolist()
    [-3, 5, 3, 6, 2, -2, -5, -1]
    """
    if not 0.25 <= sigma <= 2**30:
        raise InvalidValue("sigma", sigma, "0.25 to 2^30 grid steps")
    samples = np.empty(n, dtype=np.int64)
    for start in range(0, n, _CHUNK):
        piece = samples[start : start + _CHUNK]
        piece[:] = _draw(stream, len(piece), Fraction(sigma) ** 2)
    return samples


def _draw(stream: SecureStream, n: int, variance: Fraction) -> Integers:
    if variance <= _WIDEST**2:
        return _look_up(stream, n, _table(variance))
    fine = _look_up(stream, n, _table(Fraction(_FINE**2)))
    return fine + _STEP * _draw(stream, n, (variance - _FINE**2) / _STEP**2)


@dataclass(frozen=True, kw_only=True)
class _Table:
    """A cumulative distribution.

    Args:
        lowest: The smallest outcome.
        entries: 2^192 · P[X <= lowest + j], strictly inside 0 and 2^192, ascending.
        firsts: The first 64 bits of each entry.
        guide: By the first 16 bits of a draw: the outcome, or ``_BUSY``.
    """

    lowest: int
    entries: tuple[int, ...]
    firsts: npt.NDArray[np.uint64]
    guide: npt.NDArray[np.int32]


@functools.lru_cache(maxsize=16)
def _table(variance: Fraction) -> _Table:
    reach = 16 * (math.isqrt(math.ceil(variance)) + 1)
    half = _probabilities(variance, reach)
    weights = [*reversed(half[1:]), *half]
    whole, total, entries = sum(weights), 0, list[int]()
    for weight in weights:
        total += weight
        entries.append(((total << (_SCALE + 1)) + whole) // (2 * whole))
    never = sum(entry == 0 for entry in entries)
    kept = tuple(entry for entry in entries if 0 < entry < 1 << _SCALE)
    lowest = never - reach
    firsts = np.array([entry >> (_SCALE - _FIRST) for entry in kept], dtype=np.uint64)
    edges = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(_FIRST - _GUIDE)
    starts = np.searchsorted(firsts, edges)
    quiet = starts == np.append(starts[1:], len(firsts))
    guide = np.where(quiet, starts + lowest, _BUSY).astype(np.int32)
    return _Table(lowest=lowest, entries=kept, firsts=firsts, guide=guide)


def _probabilities(variance: Fraction, reach: int) -> list[int]:
    """exp(-k^2 / 2 variance) for k = 0 .. reach, times 2^320."""
    with decimal.localcontext(prec=120) as context:
        exponent = context.divide(-variance.denominator, 2 * variance.numerator)
        first = int(exponent.exp() * (1 << _PRECISION))
    # exp(-(k+1)^2 / 2v) = exp(-k^2 / 2v) · a^(2k+1) with a = exp(-1 / 2v).
    value, ratio, square = 1 << _PRECISION, first, (first * first) >> _PRECISION
    values = [value]
    for _ in range(reach):
        value = (value * ratio) >> _PRECISION
        ratio = (ratio * square) >> _PRECISION
        values.append(value)
    return values


def _look_up(stream: SecureStream, n: int, table: _Table) -> Integers:
    """Samples by inversion: the number of entries that are not above a uniform draw."""
    draws = stream.words(n)
    samples = table.guide[(draws >> np.uint64(_FIRST - _GUIDE)).astype(np.intp)].astype(np.int64)
    busy = np.flatnonzero(samples == _BUSY)
    if len(busy):
        looked_for = draws[busy]
        counts = np.searchsorted(table.firsts, looked_for, side="right")
        samples[busy] = counts + table.lowest
        for place in busy[table.firsts[np.maximum(counts, 1) - 1] == looked_for]:
            samples[place] = _exactly(stream, int(draws[place]), table)
    return samples


def _exactly(stream: SecureStream, first: int, table: _Table) -> int:
    """The sample of a draw whose first 64 bits equal those of an entry."""
    draw = first
    for word in stream.words((_SCALE - _FIRST) // 64):
        draw = draw << 64 | int(word)
    return bisect_right(table.entries, draw) + table.lowest
