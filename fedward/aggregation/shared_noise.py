"""One site's share of distributed noise, added to its words before they are masked.

The ring adds the shares up with the inputs, so that only a sum with all its noise is ever readable.
"""

import math

from fedward.aggregation.fixed_point import Grid
from fedward.aggregation.masks import Words, check_vector
from fedward.aggregation.parameters import SessionParameters
from fedward.errors import InvalidValue, ProtocolError
from fedward.privacy.discrete import discrete_gaussian
from fedward.privacy.distributed import LEAST_SIGMA
from fedward.privacy.noise import SecureStream

HEADROOM = 12.0
"""Deviations of the summed noise that fit the ring: beyond with probability 2e-31 a coordinate."""

_PIECE = 1 << 15


def noisy_grid(bound: float, *, share: float, sites: int, word_bits: int = 32) -> Grid:
    """The grid of an input with noise: wide enough that the sum of both does not wrap.

    A wrapped coordinate would cost accuracy, never privacy.

    Args:
        bound: L2 bound of one site's input, > 0.
        share: Deviation of one site's noise, same unit, > 0.
        sites: Most sites in a sum.
        word_bits: 16 or 32; 16 are rarely fine enough for the accounting.
    """
    clip = bound + HEADROOM * share / math.sqrt(sites)
    return Grid(clip=clip, sites=sites, word_bits=word_bits)


def add_noise_share(words: Words, parameters: SessionParameters, stream: SecureStream) -> None:
    """Add a discrete Gaussian of deviation ``parameters.noise`` to each coordinate, in place.

    Slots are left as they are: each metric brings its own noise.

    Args:
        words: ``(words,)``: a packed input.
        parameters: The session's parameters, with ``noise`` > 0.
        stream: Fresh cryptographic randomness, used for nothing else.

    Raises:
        InvalidValue: The noise is below 4 grid steps: the sum of such shares has no guarantee.
        ProtocolError: Words of another session, or masked already.

    Guarantees:
        See :class:`fedward.privacy.distributed.SharedGaussian`.
    """
    check_vector(words)
    if words.shape != (parameters.words,) or not words.flags.writeable:
        raise ProtocolError(f"expected {parameters.words} words that are not masked yet")
    sigma = parameters.noise / parameters.grid.gamma
    if not sigma >= LEAST_SIGMA:
        least = f"at least {LEAST_SIGMA * parameters.grid.gamma:.3g}: 4 grid steps"
        raise InvalidValue("noise", parameters.noise, least)
    for start in range(0, parameters.dimension, _PIECE):
        piece = words[start : min(start + _PIECE, parameters.dimension)]
        piece += discrete_gaussian(stream, len(piece), sigma).astype(words.dtype)
