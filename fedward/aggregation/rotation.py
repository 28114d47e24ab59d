"""A public random rotation that spreads an update evenly, so that 16-bit words suffice (§6, §7).

The coordinates of an update of L2 norm ``c`` differ by orders of magnitude, and a grid wide enough
for the largest (±c) loses the others in 16 bits. After random signs and a Hadamard transform every
coordinate is a sum of random signs with standard deviation at most ``c / sqrt(p)``, where p is the
largest power of two up to d: the grid need not be wider than a few of those (Suresh et al. 2017,
"Distributed Mean Estimation with Limited Communication", section 3). Two overlapping transforms of
p coordinates, the first p and the last p, cover any d without padding.

Only float64 additions, subtractions and one product with a constant are used, each element-wise in
a fixed order, so that everyone who takes the rotation back gets the same bits.
"""

import math

import numpy as np
import numpy.typing as npt

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.masks import fastest_mode, keystream

Real = npt.NDArray[np.float64]

SPREAD = 5.0
"""Standard deviations that the grid covers; one coordinate in 10^5 at most is clipped."""

_GROUP = 1 << 8  # one pass over memory transforms eight bits of the index ...
_WIDTH = 1 << 7  # ... in blocks of 256 KiB that stay in the cache
_PIECE = 1 << 16


def rotated_grid(update_clip: float, dimension: int, *, sites: int, word_bits: int = 16) -> Grid:
    """The grid of a rotated update.

    Args:
        update_clip: L2 bound of the update, > 0.
        dimension: Its coordinates, 1 or more.
        sites: Most sites in a sum.
        word_bits: 16 or 32.
    """
    deviation = update_clip / math.sqrt(_window(dimension))
    clip = min(update_clip, SPREAD * deviation)
    return Grid(clip=clip, sites=sites, word_bits=word_bits)


def rotate(update: npt.NDArray[np.floating], key: bytes) -> Real:
    """Rotate an update.

    Args:
        update: ``(d,)``.
        key: 32 public bytes, new for every session.

    Returns:
        ``(d,)`` float64 of the same L2 norm.
    """
    vector = update.astype(np.float64)
    if len(vector):
        window, (first, last) = _window(len(vector)), _signs(key, len(vector))
        _flip(vector, first)
        _hadamard(vector[:window])
        _flip(vector, last)
        _hadamard(vector[-window:])
    return vector


def rotate_back(vector: Real, key: bytes) -> Real:
    """Undo :func:`rotate`; a sum of rotated updates gives the sum of the updates.

    Args:
        vector: ``(d,)`` float64.
        key: The same 32 bytes.
    """
    update = vector.copy()
    if len(update):
        window, (first, last) = _window(len(update)), _signs(key, len(update))
        _hadamard(update[-window:])
        _flip(update, last)
        _hadamard(update[:window])
        _flip(update, first)
    return update


def _window(dimension: int) -> int:
    """The largest power of two up to the dimension."""
    return 1 << max(0, dimension.bit_length() - 1)


def _signs(key: bytes, dimension: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Two vectors of random bits, packed."""
    stream, size = keystream(key, 0, fastest_mode()), -(-dimension // 8)
    first, last = (np.frombuffer(stream.update(bytes(size)), dtype=np.uint8) for _ in range(2))
    return first, last


def _flip(vector: Real, bits: npt.NDArray[np.uint8]) -> None:
    """Change the sign of every coordinate whose bit is set, in place."""
    for start in range(0, len(vector), _PIECE):
        piece = vector[start : start + _PIECE]
        some = bits[start // 8 : (start + _PIECE) // 8]
        piece *= 1.0 - 2.0 * np.unpackbits(some, count=len(piece))


def _hadamard(vector: Real) -> None:
    """The orthonormal Walsh-Hadamard transform of 2^k coordinates, in place.

    The transform of 2^(a+b) coordinates is one over a bits of the index after one over the other b:
    each pass takes eight bits and works on blocks that fit the cache.
    """
    size, stride = len(vector), 1
    while stride < size:
        group = min(_GROUP, size // stride)
        if stride == 1:
            _transform_rows(vector.reshape(-1, group).T)
        else:
            for matrix in vector.reshape(-1, group, stride):
                _transform_rows(matrix)
        stride *= group
    vector *= 1.0 / math.sqrt(size)


def _transform_rows(matrix: Real) -> None:
    """The transform along the first axis of ``(rows, columns)``, in place and unscaled."""
    rows, columns = matrix.shape
    for start in range(0, columns, _WIDTH):
        part = matrix[:, start : start + _WIDTH]
        block = part.copy(order="C")
        half = 1
        while half < rows:
            pairs = block.reshape(rows // (2 * half), 2, -1)
            upper, lower = pairs[:, 0], pairs[:, 1]
            difference = upper - lower
            upper += lower
            lower[:] = difference
            half *= 2
        part[:] = block
