"""Which numbers of an update a round sends, where ``[aggregation] coordinates`` is below 1.

Sites train all of an update and send a part of it: the subsampling of Konečný et al. 2016 (arXiv
1610.05492, section 3), whose pattern all sites share, as that of their random mask (section 2), so
that parts can be summed under masks. It is not scaled up: the numbers that are sent move by their
whole mean, the others stay.

A public permutation of all numbers is cut in parts, one for a round, so that each number is sent
in every cycle of ``ceil(d / k)`` rounds; independent draws would leave some out for long. What
the last part of a cycle lacks is taken from its first. The permutation is another in each cycle.

Guarantees:
    The draw is a function of the run's name, the round and the update's length: all attempts at a
    round, and all sites, have the same. It knows nothing of the update, so that sending a part is
    post-processing: epsilon is that of the whole update, and no amplification is claimed.
"""

import math

import numpy as np
import numpy.typing as npt

from fedward.aggregation.masks import fastest_mode, keystream
from fedward.attempt import Attempt
from fedward.canonical import digest

_PIECE = 1 << 16  # numbers under one nonce; they stay in the cache

Sent = npt.NDArray[np.bool_]
"""``(d,)``: True where a number is sent."""


def count_sent(dimension: int, share: float) -> int:
    """How many numbers every round sends.

    Args:
        dimension: Numbers of the update, ``d``.
        share: The plan's, 0 < share <= 1.

    >>> count_sent(1001, 0.25)
    251
    """
    return math.ceil(share * dimension)


def draw_sent(dimension: int, share: float, attempt: Attempt) -> Sent:
    """The numbers that a round sends.

    Args:
        dimension: Numbers of the update, up to 2^34.
        share: The plan's, 0 < share <= 1.
        attempt: Any attempt at the round.

    Returns:
        ``(d,)``, of which exactly :func:`count_sent` are True.
    """
    count = count_sent(dimension, share)
    if count == dimension:
        return np.ones(dimension, dtype=np.bool_)
    cycle, part = divmod(attempt.round - 1, -(-dimension // count))
    key = digest("coordinates", attempt.run.encode(), cycle.to_bytes(4, "big"))
    places = _places(key, dimension)
    first, behind = part * count, (part + 1) * count % dimension
    ordered = np.partition(places, (first, behind))
    from_first, before_end = places >= ordered[first], places < ordered[behind]
    # The last part of a cycle goes on with the first numbers.
    sent: Sent = from_first & before_end if first < behind else from_first | before_end
    return sent


def _places(key: bytes, dimension: int) -> npt.NDArray[np.uint64]:
    """Random numbers whose order is the permutation; no two are equal.

    The lowest bits of each are its own index, so that the order is the same whatever sorts them.
    """
    places = np.empty(dimension, dtype="<u8")
    low = np.uint64((dimension - 1).bit_length())
    for start in range(0, dimension, _PIECE):
        piece = places[start : start + _PIECE]
        stream = keystream(key, start // _PIECE, fastest_mode())
        piece[:] = np.frombuffer(stream.update(bytes(piece.nbytes)), dtype="<u8")
        piece >>= low
        piece <<= low
        piece |= np.arange(start, start + len(piece), dtype=np.uint64)
    return places
